import json
import os
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES
from helpers.reference import hugging_face, with_peft
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from litlora.__main__ import main
from litlora.lora.checkpoint import load_with_adapters, write_adapter
from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
from litlora.lora.selection import Weighted
from litlora.models.checkpoint import Checkpoint
from litlora.models.weights import Weights
from litlora.nn.nf4 import NAMES, Quantization

ALL = tuple(module for modules in TARGET_MODULES.values() for module in modules)
TOKENS = torch.arange(3, 43)


def make_adapter(
    folder: Path, checkpoint: Path, targets: tuple[str, ...], quantization: Quantization | None = None
) -> Path:
    """Write an adapter whose B is not zero, as if trained."""
    torch.manual_seed(0)
    config = LoRAConfig(4, 8, 0.0, targets)
    model = Checkpoint.open(checkpoint).load(torch.float32, torch.device("cpu"), quantization)
    add_lora(model, config)
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    folder.mkdir()
    write_adapter(folder, model, config, checkpoint, Checkpoint.open(checkpoint).fingerprint(), "alpaca")
    return folder


def merge(adapter: Path, out_dir: Path, *flags: str) -> Path:
    assert main(["merge_lora", "--checkpoint_dir", str(adapter), "--out_dir", str(out_dir), *flags]) == 0
    return out_dir


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL], ids=["two", "all"])
def test_the_merged_folder_loads_in_transformers_with_the_logits_of_base_and_adapter(checkpoint, targets, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", checkpoint, targets)
    merged = merge(adapter, tmp_path / "merged")
    expected = logits(with_peft(checkpoint, adapter))
    torch.testing.assert_close(logits(hugging_face(merged)), expected, atol=1e-5, rtol=2e-6)
    ours = Checkpoint.open(merged).load(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(ours.lm_head(ours(TOKENS, [len(TOKENS)])), expected, atol=1e-5, rtol=2e-6)
    assert (expected - logits(hugging_face(checkpoint))).abs().max() > 0.1


def test_the_merged_folder_is_complete(tiny, tmp_path):
    merged = merge(make_adapter(tmp_path / "adapter", tiny, ("q_proj",)), tmp_path / "merged")
    assert {path.name for path in merged.iterdir()} == {path.name for path in tiny.iterdir()} | {"prompt_style.yaml"}
    assert json.loads((merged / "config.json").read_text()) == json.loads((tiny / "config.json").read_text())
    assert (
        AutoTokenizer.from_pretrained(merged)("Hello").input_ids
        == AutoTokenizer.from_pretrained(tiny)("Hello").input_ids
    )


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[3]], ids=["untied", "tied"])
def test_a_sharded_base_gives_a_sharded_checkpoint_with_its_index(family, make_checkpoint, tmp_path):
    base = make_checkpoint(family, max_shard_size="40KB")
    adapter = make_adapter(tmp_path / "adapter", base, ALL)
    merged = merge(adapter, tmp_path / "merged")
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in Weights(merged).values())
    for name, file in index["weight_map"].items():
        assert name in load_file(merged / file)
    torch.testing.assert_close(logits(hugging_face(merged)), logits(with_peft(base, adapter)), atol=1e-5, rtol=0)


def test_a_head_that_was_tied_is_a_tensor_of_its_own_once_it_is_adapted(checkpoints, tmp_path):
    base = checkpoints("llama-3.2")
    merged = merge(make_adapter(tmp_path / "adapter", base, ("lm_head",)), tmp_path / "merged")
    weights = load_file(merged / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert torch.equal(weights["model.embed_tokens.weight"], Weights(base)["model.embed_tokens.weight"])
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_sum_is_taken_in_float32_and_stored_in_the_dtype_of_the_base(make_checkpoint, tmp_path):
    base = make_checkpoint(FAMILIES[1], dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, ("q_proj",))
    merged = merge(adapter, tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{name}.lora_{m}.weight"] for m in "AB")
    expected = (Weights(base)[f"{name}.weight"].double() + 2 * b.double() @ a.double()).bfloat16()
    assert torch.equal(Weights(merged)[f"{name}.weight"], expected)
    assert AutoModelForCausalLM.from_pretrained(merged).dtype is torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL], ids=["two", "all"])
def test_a_merge_into_the_dequantized_base_is_the_network_that_was_trained(checkpoint, name, targets, tmp_path):
    quantization = Quantization(name, torch.float32)
    adapter = make_adapter(tmp_path / "adapter", checkpoint, targets, quantization)
    trained = load_with_adapters(
        Checkpoint.open(checkpoint), [Weighted(adapter)], torch.float32, torch.device("cpu"), quantization
    )
    with torch.no_grad():
        expected = trained.lm_head(trained(TOKENS, [len(TOKENS)]))
    merged = hugging_face(merge(adapter, tmp_path / "merged", "--dequantized_base", "true"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=2e-6)


def test_an_adapter_trained_on_4_bits_is_merged_into_the_whole_base_by_default(tiny, tmp_path, capsys):
    over_4_bits = make_adapter(tmp_path / "quantized", tiny, ALL, Quantization("bnb.nf4", torch.float32))
    over_all = make_adapter(tmp_path / "whole", tiny, ALL)
    merged, expected = (merge(a, tmp_path / f"merged-{a.name}") for a in (over_4_bits, over_all))
    assert (merged / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    notes = [line for line in capsys.readouterr().err.splitlines() if "--dequantized_base" in line]
    said = f"{over_4_bits} was trained on bnb.nf4, and is merged into the unquantized base"
    assert notes == [f"{said}: --dequantized_base true merges into the weights that it was trained on"]
    merge(over_4_bits, tmp_path / "dequantized", "--dequantized_base", "true")
    assert "--dequantized_base" not in capsys.readouterr().err


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)], ids=["022", "027"])
def test_files_get_the_permissions_of_the_umask(umask, mode, tiny, data_dir, tmp_path):
    before = os.umask(umask)
    try:
        out = tmp_path / "out"
        folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", out]
        flags = ["--precision", "32-true", "--train.max_steps", 1, "--train.save_interval", 1]
        assert main(["finetune_lora", *map(str, [*folders, *flags])]) == 0
        merge(out / "final", tmp_path / "merged")
    finally:
        os.umask(before)
    files = [path for folder in (out, tmp_path / "merged") for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "adapter_model.safetensors", "training_state.json"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}
