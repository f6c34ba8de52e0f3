"""`verify` finds each of these faults of a copy, and says which it is; it finds none in a sound copy.

A copy in 8 or 4 bits is compared with the rounding of its type, so that a fault smaller than this rounding shows too.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.copies import (
    ADAPTER_FAULTS,
    DIFFERENT,
    SETTINGS,
    STORED,
    TOKENIZER,
    Fault,
    add_bos,
    changed,
    edit_each,
    edit_json,
    edit_number,
    edit_tokenizer,
    edit_weights,
    export,
    merge,
    other_merges,
    verify,
)
from helpers.runs import finetune
from safetensors.torch import load_file

from litlora.export.receipt import Receipt, largest_difference

TRAINING = ["--train.max_steps", 8, "--train.global_batch_size", 5, "--train.learning_rate", 0.02, "--lora_mlp", "true"]
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


class Trained(NamedTuple):
    """A base, an adapter whose training moved the network as far as one of a real model does, and a merge of it."""

    base: Path
    adapter: Path
    merged: Path


@pytest.fixture(scope="module")
def networks(tiny, checkpoints, data_dir, tmp_path_factory) -> Callable[[str], Trained]:
    """Return a function that gives a trained network by its name."""
    fin = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("base") / "fin"))
    for path in (fin / TOKENIZER, fin / SETTINGS):
        path.write_text(path.read_text(encoding="utf-8").replace('"</s>"', '"<fin>"'), encoding="utf-8")
    bases = {"bf16": checkpoints("llama", torch.bfloat16), "tied": checkpoints("llama-3.2"), "<fin>": fin}
    flags = {"DoRA": ["--lora_use_dora", "true"], "rsLoRA": ["--lora_use_rslora", "true", "--lora_alpha", "6"],
             "tied": ["--lora_head", "true"], "bf16": ["--precision", "bf16-true"]}  # fmt: skip
    found: dict[str, Trained] = {}

    def network(name: str) -> Trained:
        if name not in found:
            base, folder = bases.get(name, tiny), tmp_path_factory.mktemp("network")
            adapter = finetune(base, data_dir, folder / "run", *TRAINING, *flags.get(name, ()))
            found[name] = Trained(base, adapter, merge(adapter, folder / "merged"))
        return found[name]

    return network


def gguf_file(trained: Trained, outtype: str, out_dir: Path) -> Path:
    return export(trained.adapter, out_dir, "--outtype", outtype)


SOUND = [
    *(("LoRA", copy) for copy in ("adapter", "merged", *TYPES, "gguf-lora")),
    *(("DoRA", copy) for copy in ("merged", "q4_0")),
    *(("rsLoRA", copy) for copy in ("merged", "q8_0", "gguf-lora")),
    *(("tied", copy) for copy in ("merged", "q4_0")),
    *(("bf16", copy) for copy in ("merged", "bf16")),
]


@pytest.mark.parametrize(("name", "copy"), SOUND)
def test_a_sound_copy_is_verified(name, copy, networks, tmp_path, capfd):
    trained = networks(name)
    flags: list[object] = []
    if copy == "gguf-lora":
        folder = export(trained.adapter, tmp_path / "out", "--format", "gguf-lora")
        flags = ["--base_dir", export(trained.base, tmp_path / "base", "--outtype", "f32")]
    else:
        folder = getattr(trained, copy, None) or gguf_file(trained, copy, tmp_path / "out")
    assert verify(folder, *flags) == 0
    storage = {"gguf-lora": "f32"}.get(copy, copy if copy in TYPES else "bfloat16" if name == "bf16" else "float32")
    assert f" for {storage} weights: the same" in capfd.readouterr().out


def test_a_sound_file_in_4_bits_is_within_a_small_tolerance(networks, tmp_path, capfd):
    trained = networks("LoRA")
    assert verify(gguf_file(trained, "q4_0", tmp_path / "out")) == 0
    tolerance = float(re.search(r"tolerance (\S+) for q4_0", capfd.readouterr().out)[1])
    receipt = Receipt.read(trained.adapter)
    rounding = max(largest_difference(p.expected("q4_0"), p.expected()) for p in receipt.prompts)
    assert tolerance < rounding / 3


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_a_fault_of_an_adapter_is_found(fault, networks, tmp_path, capfd):
    change, verdict = ADAPTER_FAULTS[fault]
    assert verify(changed(networks("LoRA").adapter, tmp_path / "final", change)) == 1
    assert verdict in capfd.readouterr().err


def test_another_base_of_an_adapter_is_found(networks, tmp_path, capfd):
    base = Path(shutil.copytree(networks("LoRA").base, tmp_path / "base"))
    edit_each(base / STORED, lambda weight: 1.001 * weight)
    assert verify(networks("LoRA").adapter, "--base_dir", base) == 1
    assert f"trained on a base other than {base}" in capfd.readouterr().err


def without_stop_token(folder: Path) -> None:
    edit_json(folder / SETTINGS, eos_token="<s>")
    for name in ("config.json", "generation_config.json"):
        edit_json(folder / name, eos_token_id=0)


MERGED_FAULTS: dict[str, Fault] = {
    "base weights rounded": Fault(
        lambda f, _: edit_each(f / STORED, lambda weight: weight.bfloat16().float()), DIFFERENT
    ),
    "wrong dtype": Fault(
        lambda f, _: edit_each(f / STORED, torch.Tensor.half), "the weights are stored as float16, not as float32"
    ),
    "missing stop token": Fault(lambda f, _: without_stop_token(f), "generation does not stop at the token 1"),
    "adapter left out": Fault(lambda f, base: shutil.copy(base / STORED, f / STORED), DIFFERENT),
    "merged twice": Fault(
        lambda f, base: edit_weights(
            f / STORED, lambda t: {n: 2 * t[n] - each for n, each in load_file(base / STORED).items()}
        ),
        DIFFERENT,
    ),
}


@pytest.mark.parametrize("fault", MERGED_FAULTS)
def test_a_fault_of_a_merged_checkpoint_is_found(fault, networks, tmp_path, capfd):
    trained, (change, verdict) = networks("LoRA"), MERGED_FAULTS[fault]
    assert verify(changed(trained.merged, tmp_path / "merged", change, trained.base)) == 1
    assert verdict in capfd.readouterr().err


IN_GGUF = {
    "q4_0": ["scale ignored", "rsLoRA", "one layer zero", "adapter left out"],
    "q8_0": ["alpha not divided by r", "A of another layer", "one layer zero"],
    "bf16": ["alpha not divided by r"],
    "f32": ["rsLoRA"],
}


@pytest.mark.parametrize(("outtype", "fault"), [(kind, fault) for kind, faults in IN_GGUF.items() for fault in faults])
def test_a_fault_of_an_adapter_is_found_in_a_gguf_file(outtype, fault, networks, tmp_path, capfd):
    adapter = changed(networks("LoRA").adapter, tmp_path / "final", ADAPTER_FAULTS[fault].change)
    assert verify(export(adapter, tmp_path / "out", "--outtype", outtype)) == 1
    assert DIFFERENT in capfd.readouterr().err


BEFORE_EXPORT: dict[str, Fault] = {
    "merged twice": MERGED_FAULTS["merged twice"],
    "base weights rounded to 4 bits": Fault(lambda f, _: edit_each(f / STORED, in_4_bits), DIFFERENT),
    "changed tokenizer": Fault(
        lambda f, _: edit_tokenizer(f, other_merges), "llama.cpp makes other tokens of a prompt"
    ),
    "second BOS": Fault(
        lambda f, _: edit_tokenizer(f, add_bos),
        "llama.cpp puts the token 0 before a prompt, which training did not",
    ),
}


def in_4_bits(tensor: torch.Tensor) -> torch.Tensor:
    step = tensor.abs().max() / 8
    return (tensor / step).round() * step if tensor.ndim > 1 else tensor


@pytest.mark.parametrize("fault", BEFORE_EXPORT)
def test_a_fault_of_what_is_exported_is_found(fault, networks, tmp_path, capfd):
    trained, (change, verdict) = networks("LoRA"), BEFORE_EXPORT[fault]
    merged = changed(trained.merged, tmp_path / "merged", change, trained.base)
    assert verify(export(merged, tmp_path / "out", "--outtype", "q8_0")) == 1
    assert verdict in capfd.readouterr().err


def other_template(folder: Path) -> None:
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    (folder / "Modelfile").write_text(text.replace("### Response", "### Answer"), encoding="utf-8")


AFTER_EXPORT = {
    "wrong template": Fault(other_template, "the template in its Modelfile is not the one that was trained"),
    "wrong dtype": Fault(lambda f: edit_number(f / "model.gguf", "general.file_type", 7), DIFFERENT),
}


@pytest.mark.parametrize("fault", AFTER_EXPORT)
def test_a_fault_of_a_file_in_4_bits_is_found(fault, networks, tmp_path, capfd):
    change, verdict = AFTER_EXPORT[fault]
    change(folder := gguf_file(networks("LoRA"), "q4_0", tmp_path / "out"))
    assert verify(folder) == 1
    assert verdict in capfd.readouterr().err


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0"])
def test_a_missing_stop_token_of_a_file_is_found(outtype, networks, tmp_path, capfd):
    """llama.cpp stops at tokens with well-known texts, such as </s>, whatever the file says."""
    trained = networks("<fin>")
    merged = Path(shutil.copytree(trained.merged, tmp_path / "merged"))
    assert verify(export(merged, tmp_path / "sound", "--outtype", outtype)) == 0
    without_stop_token(merged)
    folder = export(merged, tmp_path / "out", "--outtype", outtype)
    shutil.copy(tmp_path / "sound/Modelfile", folder)
    assert verify(folder) == 1
    assert "generation does not stop at <fin>" in capfd.readouterr().err


def test_a_stop_token_that_only_the_modelfile_of_an_adapter_names_is_noted(networks, tmp_path, capfd):
    trained = networks("<fin>")
    base = export(trained.base, tmp_path / "base", "--outtype", "f32")
    edit_number(base / "model.gguf", "tokenizer.ggml.eos_token_id", 0)
    folder = export(trained.adapter, tmp_path / "out", "--format", "gguf-lora")
    assert verify(folder, "--base_dir", base) == 0
    assert "llama.cpp stops at <fin> only if told to, as Modelfile does" in capfd.readouterr().out
    (folder / "Modelfile").unlink()
    assert verify(folder, "--base_dir", base) == 1


@pytest.mark.parametrize(("dtype", "outtype"), [(torch.float16, "f32"), (torch.bfloat16, "f16")])
def test_weights_cast_on_the_way_to_a_file_are_found(dtype, outtype, networks, tmp_path, capfd):
    merged = Path(shutil.copytree(networks("LoRA").merged, tmp_path / "merged"))
    edit_each(merged / STORED, lambda weight: weight.to(dtype).float())
    assert verify(export(merged, tmp_path / "out", "--outtype", outtype)) == 1
    assert DIFFERENT in capfd.readouterr().err


def test_peft_finds_a_fault(networks, tmp_path, capfd):
    adapter = changed(networks("LoRA").adapter, tmp_path / "final", ADAPTER_FAULTS["rsLoRA"].change)
    assert verify(adapter, "--engine", "peft") == 1
    assert DIFFERENT in capfd.readouterr().err
