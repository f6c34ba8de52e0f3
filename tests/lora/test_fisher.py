from pathlib import Path

import pytest
import torch
from helpers.families import WHOLE_BLOCKS
from helpers.reference import in_4_bits
from helpers.runs import QUERY_VALUE
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from litlora.__main__ import main
from litlora.lora.checkpoint import load_with_adapters, read_lora_config
from litlora.lora.fisher import Metric, Moments, add_moment, fit_low_rank, recording
from litlora.lora.layer import LoRALinear
from litlora.lora.selection import Weighted
from litlora.models.checkpoint import Checkpoint
from litlora.models.weights import Weights
from litlora.nn.nf4 import Quantization, dequantized

CPU = torch.device("cpu")
NF4 = Quantization("bnb.nf4", torch.float32)
TOKENS = torch.arange(3, 43)
EVERY_LAYER = ["--lora_key", "true", "--lora_projection", "true", "--lora_mlp", "true"]


def layer_of(rank: int, scaling: float) -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear(nn.Linear(24, 40, bias=False), rank=rank, scaling=scaling, dropout=0.0).requires_grad_(False)


def product(layer: LoRALinear) -> torch.Tensor:
    return layer.scaling * layer.lora_B.weight @ layer.lora_A.weight


@pytest.fixture
def wide(monkeypatch):
    """Record only the diagonal of sides with more than 30 channels."""
    monkeypatch.setattr("litlora.lora.fisher.MAX_FULL_MOMENT", 30)


def metric(vectors: torch.Tensor) -> Metric:
    moments: Moments = {}
    add_moment(moments, "layer", vectors)
    return Metric.of(moments["layer"])


def vectors(count: int, channels: int) -> torch.Tensor:
    """Return random vectors whose channels are correlated and differ in scale."""
    return torch.randn(count, channels) @ torch.randn(channels, channels) * torch.randn(channels).exp()


def damped(moment: torch.Tensor) -> torch.Tensor:
    mean = moment.diagonal().mean()
    return moment / mean + 0.01 * torch.eye(len(moment))


def loss_change(error: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """The second-order change of a loss by an error of a weight, whose Fisher information is a Kronecker product."""
    return (error.T @ gradients @ error @ inputs).trace()


@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_low_rank_product_is_optimal_in_the_fisher_metric(scaling):
    layer, rank = layer_of(6, scaling), 6
    error, x, g = torch.randn(40, 24), vectors(200, 24), vectors(200, 40)
    fit_low_rank(layer, error, metric(x), metric(g))
    inputs, gradients = damped(x.T @ x).double(), damped(g.T @ g).double()
    roots = [torch.linalg.cholesky(moment) for moment in (gradients, inputs)]
    least = torch.linalg.svdvals(roots[0].T @ error.double() @ roots[1])[rank:].square().sum()  # Eckart and Young 1936
    left = loss_change((error - product(layer)).double(), inputs, gradients)
    assert least * 0.999 < left < least * 1.01


def test_wide_side_uses_the_diagonal(wide):
    layer, rank = layer_of(6, 1.0), 6
    error, x, g = torch.randn(40, 24), vectors(200, 24), vectors(200, 40)
    fit_low_rank(layer, error, metric(x), metric(g))
    inputs, gradients = damped(x.T @ x).double(), damped((g.T @ g).diagonal().diag()).double()
    weighted = gradients.sqrt() @ error.double() @ torch.linalg.cholesky(inputs)
    least = torch.linalg.svdvals(weighted)[rank:].square().sum()
    left = loss_change((error - product(layer)).double(), inputs, gradients)
    assert least * 0.999 < left < least * 1.01


def test_rank_beyond_the_weight_reproduces_the_error_and_leaves_the_rest():
    layer, error = layer_of(30, 0.7), torch.randn(40, 24)
    fit_low_rank(layer, error, metric(torch.randn(50, 24)), metric(torch.randn(50, 40)))
    torch.testing.assert_close(product(layer), error, atol=1e-4, rtol=1e-4)
    assert layer.lora_A.weight[24:].any()
    assert not layer.lora_B.weight[:, 24:].any()


def test_signs_of_singular_vectors_are_fixed():
    layer = layer_of(12, 1.0)
    fit_low_rank(layer, torch.randn(40, 24), Metric(torch.ones(24)), Metric(torch.ones(40)))
    directions = layer.lora_A.weight
    assert directions.abs().amax(dim=1).equal(directions.amax(dim=1))


def test_unused_channels_give_finite_numbers():
    layer, used = layer_of(4, 1.0), torch.tensor([0.0] * 12 + [1.0] * 12)
    for factor in (used, 0 * used):
        fit_low_rank(layer, torch.randn(40, 24), metric(torch.randn(50, 24) * factor), metric(torch.zeros(50, 40)))
        assert product(layer).isfinite().all()


def test_recording_ends_with_its_block(wide):
    layer, parts = layer_of(4, 1.0), [(torch.randn(n, 24), torch.randn(n, 40)) for n in (5, 3, 2)]
    layer.lora_A.requires_grad_(True)
    with recording({"layer": layer}) as (inputs, gradients):
        for x, gradient in parts[:2]:
            layer(x).backward(gradient)
    layer(parts[2][0]).backward(parts[2][1])
    x, gradient = (torch.cat(some) for some in zip(*parts[:2], strict=True))
    torch.testing.assert_close(inputs, {"layer": x.T @ x})
    torch.testing.assert_close(gradients, {"layer": gradient.square().sum(dim=0)})


@pytest.fixture(scope="module")
def base(make_checkpoint) -> Path:
    return make_checkpoint(WHOLE_BLOCKS, dtype=torch.bfloat16)


def finetune(base: Path, data_dir: Path, out_dir: Path, *flags: object) -> Path:
    folders = ["--checkpoint_dir", base, "--data_dir", data_dir, "--out_dir", out_dir, *QUERY_VALUE, *EVERY_LAYER]
    settings = ["--precision", "32-true", "--lora_dropout", "0", "--quantize", "bnb.nf4", "--eval.max_new_tokens", "0"]
    assert main(["finetune_lora", *map(str, [*folders, *settings, *flags])]) == 0
    return out_dir / "final"


def distance(model: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        one, two = (m.lm_head(m(TOKENS, [len(TOKENS)])) for m in (model, other))
    return float((one - two).norm())


def test_higher_rank_starts_nearer_to_the_unquantized_base(base, data_dir, tmp_path):
    untrained = ["--train.max_steps", 1, "--train.learning_rate", 1e-12, "--lora_init", "fisher"]
    whole = Checkpoint.open(base).load(torch.float32, CPU)
    initial = distance(Checkpoint.open(base).load(torch.float32, CPU, NF4), whole)
    left = [initial]
    for rank in (4, 16, 64):
        adapter = finetune(base, data_dir, tmp_path / str(rank), *untrained, "--lora_r", rank)
        left.append(
            distance(load_with_adapters(Checkpoint.open(base), [Weighted(adapter)], torch.float32, CPU, NF4), whole)
        )
    assert left == sorted(left, reverse=True)
    assert left[-1] < initial / 100


def test_fisher_adapter_records_it_and_loads_in_peft(base, data_dir, tmp_path):
    flags = ["--train.max_steps", 2, "--train.global_batch_size", 4, "--lora_init", "fisher"]
    adapter = finetune(base, data_dir, tmp_path / "run", *flags)
    assert read_lora_config(adapter).init == "fisher"
    ours = load_with_adapters(Checkpoint.open(base), [Weighted(adapter)], torch.float32, CPU, NF4)
    theirs = PeftModel.from_pretrained(in_4_bits(base, NF4, CPU), adapter, is_trainable=True)
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
        torch.testing.assert_close(ours.lm_head(ours(TOKENS, [len(TOKENS)])), expected, atol=1e-4, rtol=0)


def test_fisher_is_deterministic_and_resumes(base, data_dir, tmp_path):
    flags = ["--train.global_batch_size", 4, "--train.epochs", 1, "--lora_init", "fisher", "--train.save_interval", 2]
    once, again = (finetune(base, data_dir, tmp_path / name, *flags) for name in ("once", "again"))
    step = next(path for path in once.parent.glob("step-*"))
    resumed = finetune(base, data_dir, tmp_path / "resumed", *flags, "--resume", step)
    contents = [(folder / "adapter_model.safetensors").read_bytes() for folder in (once, again, resumed)]
    assert contents[0] == contents[1] == contents[2]


def test_fisher_adapter_is_refused_on_an_unquantized_base(base, data_dir, tmp_path, capsys):
    adapter = finetune(base, data_dir, tmp_path / "run", "--train.max_steps", 1, "--lora_init", "fisher")
    reason = f"litlora: {adapter} compensates for the 4-bit quantization of its base (--lora_init fisher)"
    capsys.readouterr()
    merge = ["merge_lora", "--checkpoint_dir", str(adapter), "--out_dir", str(tmp_path / "merged")]
    assert main(merge) == 1
    assert capsys.readouterr().err == f"{reason}: pass --dequantized_base true\n"
    assert main(["generate", "--checkpoint_dir", str(adapter), "--prompt", "a", "--quantize", "none"]) == 1
    assert capsys.readouterr().err == f"{reason}: pass --quantize bnb.nf4, or leave the flag out\n"
    assert main([*merge, "--dequantized_base", "true"]) == 0
    name = "model.layers.0.mlp.up_proj"
    a, b = (load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{name}.lora_{m}.weight"] for m in "AB")
    whole = Weights(base)[f"{name}.weight"]
    expected = (dequantized(whole, NF4).float() + 2 * b @ a).to(whole.dtype)
    assert torch.equal(Weights(tmp_path / "merged")[f"{name}.weight"], expected)
