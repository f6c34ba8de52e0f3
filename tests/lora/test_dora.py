"""DoRA: equal to PEFT in logits, gradients and merge, over every kind of base, and the same at decoding."""

from pathlib import Path

import pytest
import torch
from helpers import parity
from helpers.families import WHOLE_BLOCKS
from helpers.parity import CPU, TOKENS, check_equals_peft, logits, perturb
from helpers.reference import hugging_face, in_4_bits, with_peft
from helpers.runs import QUERY_VALUE
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from litlora.__main__ import main
from litlora.generation.compile import compile_decode_step, prepare_for_decoding
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate
from litlora.lora.checkpoint import load_with_adapters, read_lora_config
from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.lora.layer import LoRALinear, add_lora, freeze_adapter
from litlora.lora.selection import Weighted
from litlora.lora.variants import MAGNITUDE, DoRA
from litlora.models.checkpoint import Checkpoint
from litlora.models.transformer import GPT
from litlora.nn.dropout import Dropout
from litlora.nn.linear import Joint, Linear
from litlora.nn.nf4 import Quantization

NF4 = Quantization("bnb.nf4", torch.float32)
ALL = tuple(module for modules in TARGET_MODULES.values() for module in modules)
TARGETS = pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL], ids=["two", "all"])


def adapted(
    base: Path,
    folder: Path,
    targets: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
) -> GPT:
    """Return a model with a DoRA adapter that looks trained, and write the adapter."""
    return parity.adapted(base, folder, LoRAConfig(4, 6, 0.0, targets, use_dora=True), dtype, quantization)


@TARGETS
@pytest.mark.parametrize("name", ["llama-gqa", "llama-3.2"], ids=["untied", "tied"])
def test_dora_logits_and_gradients_equal_peft(name, targets, checkpoints, tmp_path):
    model = adapted(checkpoints(name), tmp_path, targets)
    check_equals_peft(model, with_peft(checkpoints(name), tmp_path, trainable=True), 1e-4)
    assert (logits(model) - hugging_face(checkpoints(name))(TOKENS[None]).logits[0]).abs().max() > 0.1


@TARGETS
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_dora_over_nf4_equals_peft(targets, make_checkpoint, tmp_path):
    base = make_checkpoint(WHOLE_BLOCKS)
    model = adapted(base, tmp_path, targets, quantization=NF4)
    check_equals_peft(model, PeftModel.from_pretrained(in_4_bits(base, NF4, CPU), tmp_path, is_trainable=True), 2e-4)


def peft_layer(base: nn.Linear, ours: LoRALinear) -> nn.Module:
    """Return PEFT's layer of the same base and parameters."""
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"], lora_dropout=ours.dropout)
    layer = get_peft_model(nn.Sequential(base), config).base_model.model[0]
    with torch.no_grad():
        for name, theirs in zip("AB", (layer.lora_A, layer.lora_B), strict=True):
            theirs["default"].weight.copy_(ours.get_parameter(f"lora_{name}.weight"))
        layer.lora_magnitude_vector["default"].weight.copy_(ours.get_parameter(MAGNITUDE))
    return layer


class FixedDropout(nn.Module):
    """Drops what litlora's dropout of the same seed drops."""

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.dropout.mask(x).ne(0) * self.dropout.factor


def outcome(layer: nn.Module, x: torch.Tensor, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output, and the gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *parameters], torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))]


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["f32", "bf16"])
def test_dora_layer_equals_peft_with_bias_and_dropout(dtype, tolerance, dropout, bias):
    torch.manual_seed(0)
    base = nn.Linear(64, 48, bias=bias, dtype=dtype).requires_grad_(False)
    layer = LoRALinear(base, rank=4, scaling=1.5, dropout=dropout, variant=DoRA())
    perturb(layer.adapter_parameters())
    theirs, x = peft_layer(base, layer).train(), torch.randn(21, 64).to(dtype)
    torch.manual_seed(4)
    drawn = Dropout.draw(dropout)
    if dropout:
        theirs.lora_dropout["default"] = FixedDropout(drawn)
    named = (theirs.lora_A["default"], theirs.lora_B["default"], theirs.lora_magnitude_vector["default"])
    expected = outcome(theirs, x, [module.weight for module in named])
    torch.manual_seed(4)
    for actual, reference in zip(outcome(layer, x, [*layer.adapter_parameters().values()]), expected, strict=True):
        assert actual.dtype is reference.dtype
        assert (actual - reference).float().norm() < tolerance * reference.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_dora_starts_as_its_base(dtype, tiny):
    model = Checkpoint.open(tiny).load(dtype, CPU)
    before = logits(model)
    add_lora(model, LoRAConfig(4, 6, 0.1, ALL, use_dora=True))
    with torch.no_grad():
        model.eval()
        assert torch.equal(logits(model), before)


@TARGETS
def test_dora_keys_are_those_that_peft_saves(targets, tiny, tmp_path):
    adapted(tiny, tmp_path, targets)
    with_peft(tiny, tmp_path).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "theirs"))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert read_lora_config(tmp_path / "theirs").use_dora


def merge(adapter: Path, out_dir: Path) -> Path:
    assert main(["merge_lora", "--checkpoint_dir", str(adapter), "--out_dir", str(out_dir)]) == 0
    return out_dir


def test_dora_merge_equals_peft(checkpoints, tmp_path):
    base, adapter = checkpoints("llama-gqa", torch.bfloat16), tmp_path / "adapter"
    adapter.mkdir()
    adapted(base, adapter, ALL)
    theirs = with_peft(base, adapter).merge_and_unload().state_dict()
    ours = load_file(merge(adapter, tmp_path / "merged") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for weight, tensor in ours.items():
        expected = theirs[weight].bfloat16()
        assert (tensor != expected).sum() <= 0.001 * tensor.numel()  # sums in float32 in another order
        torch.testing.assert_close(tensor, expected, atol=0, rtol=2**-7)


def test_dora_merge_of_a_tied_head(checkpoints, tmp_path):
    base, adapter = checkpoints("llama-3.2"), tmp_path / "adapter"
    adapter.mkdir()
    with torch.no_grad():
        expected = logits(adapted(base, adapter, ALL))
        actual = hugging_face(merge(adapter, tmp_path / "merged"))(TOKENS[None]).logits[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


@TARGETS
@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
def test_dora_decodes_as_it_trained(quantization, targets, checkpoints, tmp_path):
    base = checkpoints("llama-gqa")
    with torch.no_grad():
        expected = logits(adapted(base, tmp_path, targets, quantization=quantization))
        model = load_with_adapters(Checkpoint.open(base), [Weighted(tmp_path)], torch.float32, CPU, quantization).eval()
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
        prepare_for_decoding(model)
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-5)


def test_compiled_decode_step_generates_the_same_tokens(checkpoints, tmp_path):
    torch._dynamo.reset()
    adapted(checkpoints("llama-gqa"), tmp_path, ("q_proj", "down_proj", "lm_head"))
    base, adapters = Checkpoint.open(checkpoints("llama-gqa")), [Weighted(tmp_path)]
    model = load_with_adapters(base, adapters, torch.float32, CPU)
    eager = tokens_of(model)
    compile_decode_step(model)
    assert tokens_of(model) == eager
    assert eager != tokens_of(base.load(torch.float32, CPU))


def tokens_of(model: GPT) -> list[int]:
    return list(generate(model, [5, 6, 7, 8, 9], Sampler(), max_new_tokens=12, stop_ids=[]))


@torch.no_grad()
def test_joint_product_retains_the_bias_of_dora_layers():
    torch.manual_seed(0)
    bases = [Linear(64, out).requires_grad_(False) for out in (48, 16)]
    layers = [LoRALinear(base, rank=4, scaling=1.5, dropout=0.0, variant=DoRA()).eval() for base in bases]
    for layer in layers:
        perturb(layer.adapter_parameters())
    x = torch.randn(1, 64)
    expected = [layer(x) for layer in layers]
    freeze_adapter(nn.ModuleList(layers))
    torch.testing.assert_close(Joint(*layers)(x), expected, atol=1e-5, rtol=1e-5)


def finetune(base: Path, data_dir: Path, out_dir: Path, *flags: object) -> int:
    folders = ["--checkpoint_dir", base, "--data_dir", data_dir, "--out_dir", out_dir, "--eval.max_new_tokens", 0]
    settings = ["--precision", "32-true", "--lora_use_dora", "true", "--lora_head", "true", "--train.save_interval", 1]
    rates = ["--train.learning_rate", "1e-2", "--train.global_batch_size", 4, "--train.lr_warmup_steps", 0]
    return main(["finetune_lora", *map(str, [*folders, *settings, *rates, *QUERY_VALUE, *flags])])


def test_dora_run_resumes_bit_for_bit_and_trains_magnitudes(tiny, data_dir, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert finetune(tiny, data_dir, whole, "--train.max_steps", 4) == 0
    assert finetune(tiny, data_dir, resumed, "--train.max_steps", 4, "--resume", whole / "step-000002") == 0
    first, last = (load_file(whole / folder / "adapter_model.safetensors") for folder in ("step-000001", "final"))
    assert all(not torch.equal(first[name], last[name]) for name in last if name.endswith(MAGNITUDE))
    for name in ("final/adapter_model.safetensors", "step-000004/training_state.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_fisher_start_of_dora_has_the_magnitudes_of_its_start(make_checkpoint, data_dir, tmp_path):
    """The start is the weight W + BA itself, as that of plain LoRA."""
    base, out = make_checkpoint(WHOLE_BLOCKS), tmp_path / "out"
    untrained = ["--lora_init", "fisher", "--quantize", "bnb.nf4", "--train.max_steps", 1, "--lora_head", "false"]
    assert finetune(base, data_dir, out, *untrained, "--train.learning_rate", "1e-12") == 0
    model = load_with_adapters(Checkpoint.open(base), [Weighted(out / "final")], torch.float32, CPU, NF4)
    layer = model.model.layers[1].self_attn.q_proj
    assert isinstance(layer, LoRALinear)
    merged = layer.weight.to_dense() + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer.get_parameter(MAGNITUDE), merged.norm(dim=1), atol=1e-5, rtol=1e-5)
    assert layer.lora_B.weight.any()
