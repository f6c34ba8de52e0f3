"""A receipt finds what goes wrong with an export, and nothing on a sound one."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers.families import WHOLE_BLOCKS
from helpers.reference import with_peft
from helpers.runs import finetune
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from litlora.__main__ import main
from litlora.data.tokenizer import Tokenizer
from litlora.export.receipt import Receipt, largest_difference

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(tiny, data_dir, tmp_path_factory) -> tuple[Path, Path]:
    """Return an adapter and the checkpoint that it is merged into."""
    folder = tmp_path_factory.mktemp("receipt")
    flags = ["--train.max_steps", 4, "--train.global_batch_size", 5, "--lora_key", "true", "--lora_mlp", "true"]
    adapter = finetune(tiny, data_dir, folder / "run", *flags)
    assert main(["merge_lora", str(adapter), "--out_dir", str(folder / "merged")]) == 0
    return adapter, folder / "merged"


def verify(folder: Path, *flags: object) -> int:
    return main(["verify", str(folder), *map(str, flags)])


def export(source: Path, out_dir: Path, *flags: object) -> Path:
    """Export a receipt's network, unverified, and return the folder."""
    command = ["export", str(source), "--out_dir", str(out_dir), "--verify", "false", "--outtype", "f32"]
    assert main([*command, *map(str, flags)]) == 0
    return out_dir


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")


def edit_weights(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, metadata)


def test_the_receipt_is_what_peft_computes(tiny, trained):
    model = with_peft(tiny, trained[0])
    for probe in Receipt.read(trained[0]).prompts:
        ids = torch.tensor([probe.ids])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            added = model.generate(torch.tensor([probe.prompt]), max_new_tokens=8, do_sample=False, eos_token_id=-1)
        actual = log_probs.gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(actual, torch.tensor(probe.log_probs), atol=1e-4, rtol=0)
        assert added[0, len(probe.prompt) :].tolist() == probe.continuation


def test_sound_exports_are_verified(trained, capsys):
    assert [verify(folder) for folder in trained] == [0, 0]
    assert "the same" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--lora_use_dora true", "--lora_use_rslora true", "--precision bf16-true",
                                   "--quantize bnb.nf4", "--lora_init pissa", "--lora_head true"])  # fmt: skip
def test_each_kind_of_adapter_is_verified(flags, tiny, data_dir, tmp_path):
    adapter = finetune(tiny, data_dir, tmp_path / "run", "--train.max_steps", 1, *flags.split())
    assert verify(adapter) == 0
    dequantized = ["--dequantized_base", "true"] if "nf4" in flags else []
    assert main(["merge_lora", str(adapter), "--out_dir", str(tmp_path / "merged"), *dequantized]) == 0
    assert (tmp_path / "merged" / "receipt.json").is_file()


def test_a_merge_into_bfloat16_is_verified_within_its_rounding(checkpoints, data_dir, tmp_path):
    base = checkpoints("llama", torch.bfloat16)
    adapter = finetune(base, data_dir, tmp_path / "run", "--train.max_steps", 3, "--precision", "bf16-true")
    assert main(["merge_lora", str(adapter), "--out_dir", str(tmp_path / "merged")]) == 0
    assert main(["verify", str(tmp_path / "merged")]) == 0


ADAPTER_FAULTS = {
    "scale ignored": lambda f: edit_json(f / CONFIG, lora_alpha=8),
    "alpha not divided by r": lambda f: edit_json(f / CONFIG, lora_alpha=16 * 8),
    "rsLoRA": lambda f: edit_json(f / CONFIG, use_rslora=True),
    "A of another layer": lambda f: edit_weights(f / WEIGHTS, swapped_layers),
    "one layer zero": lambda f: edit_weights(f / WEIGHTS, one_layer_zero),
    "one layer missing": lambda f: edit_weights(f / WEIGHTS, lambda t: dict(list(t.items())[2:])),
    "keys that do not match": lambda f: edit_weights(f / WEIGHTS, renamed),
    "A and B swapped": lambda f: edit_weights(f / WEIGHTS, swapped_matrices),
    "adapter left out": lambda f: edit_weights(f / WEIGHTS, lambda t: {name: 0 * each for name, each in t.items()}),
    "wrong template": lambda f: (f / "prompt_style.yaml").write_text("prompt_style: none\n"),
    "changed tokenizer": lambda f: edit_tokenizer(f, lambda t: t["model"]["merges"].pop(0)),
    "second BOS": lambda f: edit_tokenizer(f, add_bos),
}


def swapped_layers(tensors: Tensors) -> Tensors:
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    return {name.replace(name[23:32], other[name[23:32]]): each for name, each in tensors.items()}


def one_layer_zero(tensors: Tensors) -> Tensors:
    name = next(name for name in tensors if "lora_B" in name)
    return tensors | {name: 0 * tensors[name]}


def renamed(tensors: Tensors) -> Tensors:
    return {name.replace("base_model.model.", ""): each for name, each in tensors.items()}


def swapped_matrices(tensors: Tensors) -> Tensors:
    pairs = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {name.replace(kind, pairs[kind]): each.T for name, each in tensors.items() for kind in pairs if kind in name}


def edit_tokenizer(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def add_bos(content: dict) -> None:
    piece, bos = [{"Sequence": {"id": "A", "type_id": 0}}], {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, *piece], "pair": [bos, *piece],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }  # fmt: skip


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_a_faulty_adapter_is_found(fault, trained, tmp_path):
    folder = Path(shutil.copytree(trained[0], tmp_path / "final"))
    ADAPTER_FAULTS[fault](folder)
    assert verify(folder) == 1


def merged_weights(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder / "model.safetensors", change)


MERGED_FAULTS = {
    "base weights rounded": merged_weights(lambda t: {name: each.bfloat16().float() for name, each in t.items()}),
    "wrong dtype": merged_weights(lambda t: {name: each.half() for name, each in t.items()}),
    "missing stop token": lambda f: edit_json(f / "receipt.json", stop_ids=[1, 7]),
}


@pytest.mark.parametrize("fault", MERGED_FAULTS)
def test_a_faulty_merge_is_found(fault, trained, tmp_path):
    folder = Path(shutil.copytree(trained[1], tmp_path / "merged"))
    MERGED_FAULTS[fault](folder)
    assert verify(folder) == 1


def test_peft_computes_what_the_receipt_has(trained, capsys):
    assert [verify(folder, "--engine", "peft") for folder in trained] == [0, 0]
    assert "tolerance 1.00e-03 for float32 weights: the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("qwen2", ["--lora_use_rslora", "true", "--lora_rank_pattern", "{v_proj: 4}"]),
        ("llama-3.2", ["--lora_use_dora", "true", "--lora_head", "true"]),
    ],
)
def test_exports_of_biased_and_tied_models_are_sound(family, flags, checkpoints, data_dir, tmp_path):
    adapter = finetune(checkpoints(family), data_dir, tmp_path / "run", "--train.max_steps", 1, *flags)
    assert main(["merge_lora", str(adapter), "--out_dir", str(tmp_path / "merged")]) == 0
    assert main(["export", str(adapter), "--out_dir", str(tmp_path / "gguf"), "--outtype", "f32"]) == 0
    assert main(["export", str(tmp_path / "merged"), "--out_dir", str(tmp_path / "again")]) == 0
    assert verify(tmp_path / "merged", "--engine", "peft") == 0


def test_peft_computes_over_4_bits_what_the_receipt_has(make_checkpoint, data_dir, tmp_path, capsys):
    flags = ["--train.max_steps", 1, "--quantize", "bnb.nf4"]
    base = make_checkpoint(WHOLE_BLOCKS)
    adapter = finetune(base, data_dir, tmp_path / "run", *flags)
    assert verify(adapter, "--engine", "peft") == 0
    assert "float32 weights: the same" in capsys.readouterr().out
    edit_weights(adapter / WEIGHTS, lambda t: {name: 100 * each for name, each in t.items()})
    assert verify(adapter, "--engine", "peft") == 1


def test_peft_finds_a_fault(trained, tmp_path):
    folder = Path(shutil.copytree(trained[0], tmp_path / "final"))
    edit_json(folder / CONFIG, use_rslora=True)
    assert verify(folder, "--engine", "peft") == 1


GGUF_FILES = {
    "f32": ["--outtype", "f32"],
    "f16": ["--outtype", "f16"],
    "bf16": ["--outtype", "bf16"],
    "q8_0": ["--outtype", "q8_0"],
    "q4_0": ["--outtype", "q4_0"],
    "alone": ["--format", "gguf-lora"],
}


@pytest.mark.parametrize("kind", GGUF_FILES)
def test_llama_cpp_computes_what_the_receipt_has(kind, tiny, trained, tmp_path, capsys):
    folder = export(trained[0], tmp_path / "out", *GGUF_FILES[kind])
    base = ["--base_dir", export(tiny, tmp_path / "base")] if kind == "alone" else []
    assert verify(folder, *base) == 0
    assert f"for {'f32' if base else kind} weights: the same" in capsys.readouterr().out


def test_a_gross_fault_of_a_file_in_bf16_is_found(trained, tmp_path):
    adapter = Path(shutil.copytree(trained[0], tmp_path / "final"))
    edit_weights(adapter / WEIGHTS, lambda t: {name: 3 * each for name, each in t.items()})
    folder = export(adapter, tmp_path / "out", *GGUF_FILES["bf16"])
    shutil.copy(trained[0] / "receipt.json", folder)
    assert verify(folder) == 1


@pytest.fixture(scope="module")
def strong(tiny, data_dir, tmp_path_factory) -> Path:
    """Return an adapter whose training moved the network as far as one of a real model does."""
    flags = ["--train.max_steps", 8, "--train.global_batch_size", 5, "--train.learning_rate", 0.02]
    return finetune(tiny, data_dir, tmp_path_factory.mktemp("strong") / "run", *flags, "--lora_mlp", "true")


@pytest.mark.parametrize(
    ("fault", "outtype"),
    [("scale ignored", "q4_0"), ("A of another layer", "q8_0"), ("adapter left out", "q4_0"), ("rsLoRA", "f32")],
)
def test_a_faulty_gguf_file_is_found(fault, outtype, strong, tmp_path):
    """In 4 bits too: the rounding itself is in the receipt."""
    adapter = Path(shutil.copytree(strong, tmp_path / "final"))
    ADAPTER_FAULTS[fault](adapter)
    assert verify(export(adapter, tmp_path / "out", "--outtype", outtype)) == 1


def test_a_sound_file_in_4_bits_is_within_a_small_tolerance(strong, tmp_path, capsys):
    assert verify(export(strong, tmp_path / "out", "--outtype", "q4_0")) == 0
    tolerance = float(re.search(r"tolerance (\S+) for q4_0", capsys.readouterr().out)[1])
    receipt = Receipt.read(strong)
    rounding = max(largest_difference(p.expected("q4_0"), p.expected()) for p in receipt.prompts)
    assert tolerance < rounding / 3


def test_export_verifies_what_it_wrote(trained, tmp_path, capsys):
    adapter = Path(shutil.copytree(trained[0], tmp_path / "final"))
    command = ["export", str(adapter), "--out_dir", str(tmp_path / "sound"), "--outtype", "f16"]
    assert main(command) == 0
    assert re.search(
        r"changed weights \(.*%\) are rounded back(.|\n)*for f16 weights: the same", capsys.readouterr().err
    )
    edit_json(adapter / CONFIG, lora_alpha=8)
    assert main(["export", str(adapter), "--out_dir", str(tmp_path / "faulty")]) == 1


def test_faults_of_the_texts_of_a_gguf_file_are_found(tiny, trained, tmp_path, capsys):
    """A second BOS, other merges, another end token and another template in the Modelfile."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    edit_tokenizer(base, lambda t: (add_bos(t), t["model"]["merges"].pop(0)))
    edit_json(base / "tokenizer_config.json", eos_token="<s>")
    (base / "generation_config.json").unlink(missing_ok=True)
    folder = export(trained[0], tmp_path / "out", "--base_dir", base)
    modelfile = (folder / "Modelfile").read_text(encoding="utf-8")
    (folder / "Modelfile").write_text(modelfile.replace("### Response", "### Answer"), encoding="utf-8")
    assert verify(folder) == 1
    error = capsys.readouterr().err
    assert "the template in its Modelfile" in error
    assert "llama.cpp makes other tokens of a prompt" in error


def test_what_is_no_copy_is_refused_in_one_sentence(tiny, trained, tmp_path, capsys):
    alone = export(trained[0], tmp_path / "alone", "--format", "gguf-lora")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/model.gguf").write_bytes((alone / "adapter.gguf").read_bytes()[:100])
    other = Path(shutil.copytree(trained[0], tmp_path / "final"))
    edit_weights(other / WEIGHTS, one_layer_zero)
    capsys.readouterr()
    for folder, engine, sentence in (
        (alone, "llama.cpp", "is an adapter: name the GGUF file of its base with --base_dir"),
        (alone, "peft", "is a GGUF file: leave --engine out"),
        (tiny, "llama.cpp", "no GGUF file: write one with litlora export"),
        (tmp_path / "cut", "llama.cpp", "is truncated or corrupt"),
        (other, "litlora", "receipt.json is of another adapter"),
    ):
        assert verify(folder, "--engine", engine) == 1
        assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_another_base_is_found(tiny, trained, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    edit_weights(base / "model.safetensors", lambda t: {name: 1.001 * each for name, each in t.items()})
    assert verify(trained[0], "--base_dir", base) == 1


def test_merged_twice_is_found(tiny, trained, tmp_path):
    once, base = load_file(trained[1] / "model.safetensors"), load_file(tiny / "model.safetensors")
    folder = Path(shutil.copytree(trained[1], tmp_path / "merged"))
    save_file({name: 2 * once[name] - base[name] for name in once}, folder / "model.safetensors", {"format": "pt"})
    assert verify(folder) == 1


def test_a_merge_without_the_adapter_is_found(tiny, trained, tmp_path):
    folder = Path(shutil.copytree(trained[1], tmp_path / "merged"))
    shutil.copy(tiny / "model.safetensors", folder / "model.safetensors")
    assert verify(folder) == 1


def test_a_folder_without_a_receipt_is_refused(tiny, capsys):
    assert verify(tiny) == 1
    assert "has no receipt.json" in capsys.readouterr().err


def test_the_prompt_style_is_that_of_the_training(trained):
    written = yaml.safe_load((trained[0] / "prompt_style.yaml").read_text())
    assert Receipt.read(trained[0]).prompt_style == written["prompt_style"]


def test_receipt_keeps_the_day_that_the_template_wrote(tiny, data_dir, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %} {{ m.content }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    adapter = finetune(base, data_dir, tmp_path / "run", "--train.max_steps", 1, "--prompt_style", "chat")
    receipt, tokenizer = Receipt.read(adapter), Tokenizer(base)
    assert receipt.date
    assert all(tokenizer.decode(probe.ids).startswith(receipt.date) for probe in receipt.prompts)
    assert verify(adapter) == 0
    edit_json(adapter / "receipt.json", date="2026-01-31")
    assert verify(adapter) == 1


@pytest.mark.parametrize(
    "change", [{"sensitivity": None}, {"sensitivity": 1e999}, {"stop_ids": ["</s>"]}, {"variables": []}]
)
def test_a_receipt_with_other_types_is_refused(change, trained, tmp_path, capsys):
    folder = Path(shutil.copytree(trained[0], tmp_path / "final"))
    edit_json(folder / "receipt.json", **change)
    assert verify(folder) == 1
    assert "receipt.json is not as litlora writes it" in capsys.readouterr().err
