"""A receipt is what the trained network computes, and what is no copy of it is refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.copies import CONFIG, WEIGHTS, edit_json, edit_weights, export, one_layer_zero, verify
from helpers.families import WHOLE_BLOCKS
from helpers.reference import with_peft
from helpers.runs import finetune

from litlora.__main__ import main
from litlora.data.tokenizer import Tokenizer
from litlora.export.receipt import Receipt


@pytest.fixture(scope="module")
def trained(tiny, data_dir, tmp_path_factory) -> tuple[Path, Path]:
    """Return an adapter and the checkpoint that it is merged into."""
    folder = tmp_path_factory.mktemp("receipt")
    flags = ["--train.max_steps", 4, "--train.global_batch_size", 5, "--lora_key", "true", "--lora_mlp", "true"]
    adapter = finetune(tiny, data_dir, folder / "run", *flags)
    assert main(["merge_lora", str(adapter), "--out_dir", str(folder / "merged")]) == 0
    return adapter, folder / "merged"


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


@pytest.mark.parametrize("flags", ["--precision bf16-true", "--quantize bnb.nf4", "--lora_init pissa"])
def test_each_kind_of_adapter_is_verified(flags, tiny, data_dir, tmp_path):
    adapter = finetune(tiny, data_dir, tmp_path / "run", "--train.max_steps", 1, *flags.split())
    assert verify(adapter) == 0
    dequantized = ["--dequantized_base", "true"] if "nf4" in flags else []
    assert main(["merge_lora", str(adapter), "--out_dir", str(tmp_path / "merged"), *dequantized]) == 0
    assert (tmp_path / "merged" / "receipt.json").is_file()


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


def test_export_verifies_what_it_wrote(trained, tmp_path, capsys):
    adapter = Path(shutil.copytree(trained[0], tmp_path / "final"))
    command = ["export", str(adapter), "--out_dir", str(tmp_path / "sound"), "--outtype", "f16"]
    assert main(command) == 0
    assert re.search(
        r"changed weights \(.*%\) are rounded back(.|\n)*for f16 weights: the same", capsys.readouterr().err
    )
    edit_json(adapter / CONFIG, lora_alpha=8)
    assert main(["export", str(adapter), "--out_dir", str(tmp_path / "faulty")]) == 1


def test_what_is_no_copy_is_refused_in_one_sentence(tiny, trained, checkpoints, tmp_path, capfd):
    alone = export(trained[0], tmp_path / "alone", "--format", "gguf-lora")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/model.gguf").write_bytes((alone / "adapter.gguf").read_bytes()[:100])
    other = Path(shutil.copytree(trained[0], tmp_path / "final"))
    edit_weights(other / WEIGHTS, one_layer_zero)
    cut, base = ["--base_dir", tmp_path / "cut"], export(checkpoints("llama-mqa-wide-heads"), tmp_path / "base")
    capfd.readouterr()
    for folder, flags, sentence in (
        (alone, [], "is an adapter: name the GGUF file of its base with --base_dir"),
        (alone, ["--base_dir", alone], "is an adapter: name the GGUF file of its base with --base_dir"),
        (alone, ["--base_dir", base], "has incorrect shape (hint: maybe wrong base model?)): name the GGUF file"),
        (alone, cut, "is truncated or corrupt"),
        (alone, ["--engine", "peft"], "is a GGUF file: leave --engine out"),
        (tiny, ["--engine", "llama.cpp"], "no GGUF file: write one with litlora export"),
        (tmp_path / "cut", ["--engine", "llama.cpp"], "is truncated or corrupt"),
        (other, [], "receipt.json is of another adapter"),
    ):
        assert verify(folder, *flags) == 1
        [sentence_of_it] = capfd.readouterr().err.splitlines()
        assert sentence_of_it.startswith("litlora: ")
        assert sentence in sentence_of_it


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
    assert f"{folder}/receipt.json is not as litlora writes it" in capsys.readouterr().err
    for command in (["merge_lora"], ["export"], ["export", "--format", "gguf-lora"]):
        assert main([*command, str(folder), "--out_dir", str(tmp_path / "out")]) == 1
        assert f"{folder}/receipt.json is not as litlora writes it" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
