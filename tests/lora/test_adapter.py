"""Weighted sums of adapters: live, merged, and as PEFT combines them."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.reference import hugging_face, with_peft
from peft import LoraConfig, PeftModel, get_peft_model

from litlora.__main__ import main
from litlora.errors import LitLoraError
from litlora.lora.checkpoint import load_with_adapters, read_adapter, read_adapters, shared_quantization
from litlora.lora.selection import Weighted
from litlora.lora.variants import A, B
from litlora.models.checkpoint import Checkpoint
from litlora.nn.nf4 import NAMES, Quantization

TOKENS = torch.arange(7, 30)
LAYER = "model.layers.0.self_attn.q_proj"
OPTIONS = {
    "a": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "lm_head"], "use_rslora": True},
    "same rank": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "use_dora": True},
}
WEIGHTS = [0.7, -1.3]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> dict[str, Path]:
    """Return adapters of different ranks and layers on one base, made by PEFT."""
    folders = {}
    for seed, (name, options) in enumerate(OPTIONS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(**options, init_lora_weights=False, task_type="CAUSAL_LM")
        folders[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
        model = get_peft_model(hugging_face(tiny), config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # so that logits, and their rounding, stay of the base's size
                parameter.data *= 0.2
        model.save_pretrained(folders[name], save_embedding_layers=False)
    return folders


def combined_by_peft(base: Path, folders: list[Path], weights: list[float], kind: str) -> PeftModel:
    model = with_peft(base, folders[0])
    names = ["default", *map(str, range(1, len(folders)))]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, name)
    model.add_weighted_adapter(names, weights, "sum", combination_type=kind)
    model.set_adapter("sum")
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS[None]).logits[0]


@torch.no_grad()
def live(base: Path, adapters: list[Weighted], quantization: Quantization | None = None) -> torch.Tensor:
    """Return the logits of a base with adapters."""
    model = load_with_adapters(Checkpoint.open(base), adapters, torch.float32, torch.device("cpu"), quantization)
    return model.lm_head(model(TOKENS, [len(TOKENS)]))


def test_sum_of_adapters_live_and_merged_equals_the_cat_of_peft(tiny, made, tmp_path):
    folders = [made["a"], made["b"]]
    expected = logits_of(combined_by_peft(tiny, folders, WEIGHTS, "cat"))
    torch.testing.assert_close(live(tiny, list(map(Weighted, folders, WEIGHTS))), expected, atol=1e-5, rtol=2e-6)
    flags = ["--adapters", ",".join(map(str, folders)), "--adapter_weights", ",".join(map(str, WEIGHTS))]
    assert main(["merge_lora", str(tiny), *flags, "--out_dir", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(logits_of(hugging_face(tmp_path / "merged")), expected, atol=1e-5, rtol=2e-6)


def test_one_adapter_with_a_weight_equals_the_linear_of_peft(tiny, made):
    expected = logits_of(combined_by_peft(tiny, [made["a"]], [0.4], "linear"))
    torch.testing.assert_close(live(tiny, [Weighted(made["a"], 0.4)]), expected, atol=1e-5, rtol=2e-6)
    assert (live(tiny, [Weighted(made["a"])]) - expected).abs().max() > 1e-2


def test_linear_of_peft_adds_products_of_different_adapters(tiny, made):
    """PEFT's "linear" sums the A and the B apart, so that B of one adapter meets A of the other as well."""
    folders, weights = [made["a"], made["same rank"]], [0.7, 0.3]
    theirs = combined_by_peft(tiny, folders, weights, "linear").get_submodule(f"base_model.model.{LAYER}")
    base = Checkpoint.open(tiny)
    ours = read_adapters(list(map(Weighted, folders, weights)), base, is_quantized=False).of(LAYER)
    singles = [read_adapter(folder, base) for folder in folders]
    roots = [math.sqrt(w * adapter.layers[LAYER].scaling) for w, adapter in zip(weights, singles, strict=True)]
    (a, b), (c, d) = (
        (root * own.of(LAYER)[A], root * own.of(LAYER)[B]) for root, own in zip(roots, singles, strict=True)
    )
    torch.testing.assert_close(theirs.get_delta_weight("sum") - ours[B] @ ours[A], b @ c + d @ a)


def test_sum_has_the_ranks_of_its_adapters(tiny, made):
    total = read_adapters([Weighted(made["a"]), Weighted(made["b"])], Checkpoint.open(tiny), is_quantized=False)
    ranks = {name.split(".")[-1]: settings.rank for name, settings in total.layers.items()}
    assert ranks == {"q_proj": 6, "v_proj": 4, "up_proj": 2, "lm_head": 2}


def test_weights_are_1_by_default(tiny, made):
    once, twice = [Weighted(made["a"])], [Weighted(made["a"]), Weighted(made["a"])]
    torch.testing.assert_close(live(tiny, twice), live(tiny, [Weighted(made["a"], 2.0)]))
    assert (live(tiny, twice) - live(tiny, once)).abs().max() > 1e-2


def test_sum_over_a_4_bit_base_is_merged_into_its_dequantized_weights(tiny, made, tmp_path):
    quantization = Quantization(NAMES[0], torch.float32)
    folders = [made["a"], made["b"]]
    for folder in folders:
        change_config(folder, auto_mapping={"quantization_config": quantization.hub})
    assert shared_quantization([Weighted(folder) for folder in folders], "hint") == quantization
    flags = ["--adapters", ",".join(map(str, folders)), "--dequantized_base", "true"]
    assert main(["merge_lora", str(tiny), *flags, "--out_dir", str(tmp_path / "merged")]) == 0
    expected = live(tiny, [Weighted(folder) for folder in folders], quantization)
    torch.testing.assert_close(logits_of(hugging_face(tmp_path / "merged")), expected, atol=1e-5, rtol=2e-6)
    change_config(folders[1], auto_mapping=None)
    with pytest.raises(LitLoraError, match="different quantization: hint"):
        shared_quantization([Weighted(folder) for folder in folders], "hint")
    assert shared_quantization([Weighted(folder) for folder in folders], None) is None
    change_config(folders[0], auto_mapping=None)


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("others", [["a"], []], ids=["sum", "weight"])
def test_dora_is_refused_in_a_sum(tiny, made, others):
    with pytest.raises(LitLoraError, match="is a DoRA adapter, which has no weight and no sum with others"):
        live(tiny, [Weighted(made["dora"], 0.5), *(Weighted(made[name]) for name in others)])


def test_pissa_over_4_bits_is_refused_in_a_sum_over_them(tiny, made):
    hub = Quantization(NAMES[0], torch.float32).hub
    change_config(made["a"], auto_mapping={"quantization_config": hub, "lora_init": "pissa"})
    halves = [Weighted(made["a"], 0.5), Weighted(made["b"], 0.5)]
    with pytest.raises(LitLoraError, match=r"quantized without its start \(--lora_init pissa\)"):
        live(tiny, halves, Quantization(NAMES[0], torch.float32))
    as_lora = live(tiny, halves)
    change_config(made["a"], auto_mapping=None)
    torch.testing.assert_close(as_lora, live(tiny, halves))
