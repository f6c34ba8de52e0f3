"""PiSSA: its start, its gradients and the adapter that fits the base again are those of PEFT."""

import json
from pathlib import Path

import pytest
import torch
from helpers.families import WHOLE_BLOCKS
from helpers.parity import CPU, check_equals_peft, check_is_near_peft, logits
from helpers.reference import hugging_face, in_4_bits, with_peft
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from litlora.__main__ import main
from litlora.errors import LitLoraError
from litlora.lora.checkpoint import load_matrices, load_with_adapters, read_lora_config, write_adapter
from litlora.lora.config import LoRAConfig
from litlora.lora.init import INITIALIZERS, Calibration
from litlora.lora.layer import LoRALinear, add_lora, lora_layers, lora_parameters
from litlora.lora.pissa import fit_leading
from litlora.lora.selection import Weighted
from litlora.models.checkpoint import Checkpoint
from litlora.models.transformer import GPT
from litlora.nn.nf4 import Quantization

NF4 = Quantization("bnb.nf4", torch.float32)
OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 5}},
}
EACH = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
TARGETS = ("q_proj", "v_proj", "down_proj")


def started(
    base: Path,
    options: dict[str, object],
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    init: str = "pissa",
    targets: tuple[str, ...] = TARGETS,
) -> tuple[GPT, LoRAConfig]:
    """Return a model with an adapter that starts by PiSSA."""
    checkpoint, config = Checkpoint.open(base), LoRAConfig(4, 6, 0.0, targets, init=init, **options)
    model = checkpoint.load(dtype, CPU, quantization)
    add_lora(model, config)
    INITIALIZERS[init](lora_layers(model), Calibration(checkpoint, lambda: None, lambda tensor: tensor))
    return model, config


def started_by_peft(base: Path, options: dict[str, object], dtype: torch.dtype = torch.float32) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=list(TARGETS), **options)
    return get_peft_model(hugging_face(base, dtype), config)


def copy_adapter(model: GPT, theirs: PeftModel) -> None:
    """Give PEFT's model the same matrices, whose signs are free."""
    own = {f"base_model.model.{name}": p for name, p in lora_parameters(model).items()}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own[name.replace("vector.default.weight", "vector").replace(".default", "")])


@EACH
def test_start_equals_that_of_peft(options, checkpoints):
    base = checkpoints("llama-gqa")
    (model, _), theirs = started(base, options), started_by_peft(base, options)
    for name, layer in lora_layers(model).items():
        expected = theirs.base_model.model.get_submodule(name)
        product = expected.lora_B["default"].weight @ expected.lora_A["default"].weight
        torch.testing.assert_close(layer.lora_B.weight @ layer.lora_A.weight, product, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.weight, expected.base_layer.weight, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(Checkpoint.open(base).load(torch.float32, CPU)))
    copy_adapter(model, theirs)
    check_equals_peft(model, theirs, 1e-4)


def test_start_in_bfloat16_is_near_that_of_peft(checkpoints):
    base = checkpoints("llama-gqa", torch.bfloat16)
    (model, _), theirs = started(base, {}, torch.bfloat16), started_by_peft(base, {}, torch.bfloat16)
    for name, layer in lora_layers(model).items():
        rest = theirs.base_model.model.get_submodule(name).base_layer.weight
        assert layer.weight.dtype is torch.bfloat16
        assert (layer.weight - rest).float().norm() < 1e-3 * rest.float().norm()
    copy_adapter(model, theirs)
    check_is_near_peft(model, theirs, 0.03)


@EACH
def test_start_over_nf4_is_that_of_the_quantized_rest(options, make_checkpoint, tmp_path):
    """PEFT's way to QPiSSA: take the start out of the weights, save them, and load them in 4 bits."""
    base = make_checkpoint(WHOLE_BLOCKS)
    started_by_peft(base, options).unload().save_pretrained(tmp_path)
    rest = get_peft_model(
        in_4_bits(tmp_path, NF4, CPU), LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS), **options)
    )
    model, _ = started(base, options, quantization=NF4)
    copy_adapter(model, rest)
    check_equals_peft(model, rest, 2e-4)


def train(model: GPT) -> None:
    """Change an adapter as training does."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@EACH
def test_saved_adapter_fits_the_base_itself_in_peft(options, checkpoints, tmp_path):
    base = checkpoints("llama-gqa")
    model, config = started(base, options)
    train(model)
    write_adapter(tmp_path, model, config, base, Checkpoint.open(base).fingerprint(), "alpaca")
    with torch.no_grad():
        actual, theirs = logits(model), with_peft(base, tmp_path)
        torch.testing.assert_close(theirs(torch.arange(3, 43)[None]).logits[0], actual, atol=1e-4, rtol=1e-4)
        assert (actual - logits(Checkpoint.open(base).load(torch.float32, CPU))).abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, OPTIONS["ranks"]], ids=["lora", "rslora", "ranks"])
@pytest.mark.filterwarnings("ignore:`init_lora_weights`")
def test_saved_adapter_is_that_which_peft_converts(options, checkpoints, tmp_path):
    base, ours, theirs = checkpoints("llama-gqa"), tmp_path / "ours", tmp_path / "theirs"
    (model, config), reference = started(base, options), started_by_peft(base, options)
    copy_adapter(model, reference)
    reference.peft_config["default"].init_lora_weights = True
    reference.save_pretrained(tmp_path / "start")
    train(model)
    copy_adapter(model, reference)
    reference.save_pretrained(theirs, path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours.mkdir()
    write_adapter(ours, model, config, base, Checkpoint.open(base).fingerprint(), "alpaca")
    actual, expected = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs)]
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        assert configs[0][key] == pytest.approx(configs[1][key])


@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
def test_loaded_start_gives_the_same_rest_bit_for_bit(quantization, make_checkpoint, tmp_path):
    base = make_checkpoint(WHOLE_BLOCKS)
    model, config = started(base, {"use_dora": True}, quantization=quantization)
    train(model)
    write_adapter(tmp_path, model, config, base, Checkpoint.open(base).fingerprint(), "alpaca")
    again = Checkpoint.open(base).load(torch.float32, CPU, quantization)
    add_lora(again, config)
    load_matrices(again, tmp_path, Checkpoint.open(base))
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@EACH
def test_adapter_over_nf4_is_deployed_as_it_was_trained(options, make_checkpoint, tmp_path, capsys):
    """Merged into the dequantized weights or over 4 bits, the start is taken out before the weights are quantized."""
    base, adapter = make_checkpoint(WHOLE_BLOCKS), tmp_path / "adapter"
    adapter.mkdir()
    model, config = started(base, options, quantization=NF4)
    train(model)
    write_adapter(adapter, model, config, base, Checkpoint.open(base).fingerprint(), "alpaca")
    with torch.no_grad():
        expected = logits(model)
        loaded = load_with_adapters(Checkpoint.open(base), [Weighted(adapter)], torch.float32, CPU, NF4)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
        into = ["--out_dir", str(tmp_path / "merged"), "--dequantized_base", "true"]
        assert main(["merge_lora", "--checkpoint_dir", str(adapter), *into]) == 0
        merged = hugging_face(tmp_path / "merged")(torch.arange(3, 43)[None]).logits[0]
        torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
        over_whole = load_with_adapters(Checkpoint.open(base), [Weighted(adapter)], torch.float32, CPU)
        assert (logits(over_whole) - expected).abs().max() > 1e-2  # the quantization error
    assert main(["merge_lora", "--checkpoint_dir", str(adapter), "--out_dir", str(tmp_path / "into_whole")]) == 0
    assert f"{adapter} was trained on bnb.nf4, and is merged into the unquantized base: " in capsys.readouterr().err


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_configuration_of_a_file_leads_back_to_that_of_training(options):
    config = LoRAConfig(4, 6, 0.0, TARGETS, init="pissa", **options)
    again = config.saved.of_file("pissa")
    assert (again.r, again.rank_pattern, again.init) == (config.r, config.rank_pattern, config.init)
    for layer in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        assert again.scaling(layer) == pytest.approx(config.scaling(layer), rel=1e-12)
        assert config.saved.scaling(layer) == pytest.approx(config.scaling(layer), rel=1e-12)
        assert config.saved.rank(layer) == 2 * config.rank(layer)


def test_odd_rank_with_a_start_beside_it_is_refused(make_checkpoint, tmp_path):
    base = make_checkpoint(WHOLE_BLOCKS)
    model, config = started(base, {}, quantization=NF4)
    write_adapter(tmp_path, model, config, base, Checkpoint.open(base).fingerprint(), "alpaca")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 1}))
    with pytest.raises(LitLoraError, match='"r": 1, but it must be even'):
        read_lora_config(tmp_path)


def test_head_that_is_tied_leaves_the_embedding_unchanged(checkpoints, tmp_path):
    base, adapter = checkpoints("llama-3.2"), tmp_path / "adapter"
    adapter.mkdir()
    model, config = started(base, {}, targets=("q_proj", "lm_head"))
    train(model)
    assert torch.equal(model.model.embed_tokens.weight, Checkpoint.open(base).tensor("model.embed_tokens.weight"))
    write_adapter(adapter, model, config, base, Checkpoint.open(base).fingerprint(), "alpaca")
    assert main(["merge_lora", "--checkpoint_dir", str(adapter), "--out_dir", str(tmp_path / "merged")]) == 0
    with torch.no_grad():
        merged = hugging_face(tmp_path / "merged")(torch.arange(3, 43)[None]).logits[0]
        torch.testing.assert_close(merged, logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("iterations", [None, 4, 16])
def test_approximate_start_is_near_the_exact_one(iterations):
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 48))[0] for n in (96, 64))
    values = 0.8 ** torch.arange(48)
    layer = LoRALinear(nn.Linear(64, 96), rank=4, scaling=1.5, dropout=0.0)
    with torch.no_grad():
        fit_leading(layer, (u * values) @ v.t(), iterations)
        product = 1.5 * layer.lora_B.weight @ layer.lora_A.weight
        torch.testing.assert_close(product, (u[:, :4] * values[:4]) @ v[:, :4].t(), atol=1e-3, rtol=0)
        torch.testing.assert_close(layer.lora_A.weight.norm(dim=1), layer.lora_B.weight.norm(dim=0))


def test_rank_beyond_that_of_the_weight_leaves_no_rest():
    layer = LoRALinear(nn.Linear(3, 5), rank=4, scaling=1.0, dropout=0.0)
    weight = torch.randn(5, 3)
    with torch.no_grad():
        fit_leading(layer, weight, None)
    torch.testing.assert_close(layer.lora_B.weight @ layer.lora_A.weight, weight)
