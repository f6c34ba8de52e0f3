"""Variants of LoRA in whole runs: exact resume, refusal of other variants, and what report and dry run state."""

import json

import pytest
import torch
from helpers.runs import finetune, metrics, same_adapter
from safetensors.torch import load_file

from litlora.__main__ import main
from litlora.lora.checkpoint import read_lora_config

VARIANTS = {
    "rslora": ["--lora_use_rslora", "true", "--lora_rank_pattern", "{v_proj: 2}"],
    "dora": ["--lora_use_dora", "true", "--lora_layers", "1"],
    "lora+": ["--lora_plus_ratio", 16, "--optimizer", "SGD", "--optimizer.init_args.momentum", 0.9],
    "pissa": ["--lora_init", "pissa", "--lora_targets", "q_proj,down_proj", "--lora_plus_ratio", 4],
    "pissa dora": ["--lora_init", "pissa_niter_4", "--lora_use_dora", "true", "--eval.keep_best", "true"],
}
BASES = {"f32": [], "nf4": ["--quantize", "bnb.nf4"]}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_resumed_run_of_a_variant_equals_the_unbroken_one_bit_for_bit(tiny, data_dir, tmp_path, variant, base):
    flags = [*variant, *base, "--lora_dropout", 0.1, "--lora_r", 4, "--train.max_steps", 4, "--train.save_interval", 2]
    flags += ["--train.global_batch_size", 4, "--eval.interval", 1, "--train.epochs", 2]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finetune(tiny, data_dir, whole, *flags)
    finetune(tiny, data_dir, resumed, *flags, "--resume", whole / "step-000002")
    assert same_adapter(whole / "final", resumed / "final")
    assert not same_adapter(whole / "final", whole / "step-000002")
    name = "step-000004/training_state.safetensors"
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_resume_with_other_variants_names_them(tiny, data_dir, tmp_path, capsys):
    finetune(tiny, data_dir, tmp_path / "out", "--train.max_steps", 2, "--train.save_interval", 1)
    others = ["--lora_use_rslora", "true", "--lora_plus_ratio", "4", "--lora_init", "pissa", "--lora_layers", "0",
              "--lora_rank_pattern", "{v_proj: 2}", "--lora_targets", "q_proj,v_proj"]  # fmt: skip
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", tmp_path / "other"]
    again = ["--resume", tmp_path / "out/step-000001", "--precision", "32-true", "--train.max_steps", 2]
    assert main(["finetune_lora", *map(str, [*folders, *again]), *others]) == 1
    error = capsys.readouterr().err
    for change in ("--lora_use_rslora was false and is true", "--lora_plus_ratio was 1.0 and is 4.0",
                   "--lora_init was zero and is pissa", "--lora_layers was null and is [0]",
                   '--lora_rank_pattern was null and is {"v_proj": 2}',
                   '--lora_targets was null and is ["q_proj", "v_proj"]'):  # fmt: skip
        assert change in error


def test_report_and_card_state_the_variant(tiny, data_dir, tmp_path):
    flags = ["--lora_use_dora", "true", "--lora_use_rslora", "true", "--lora_plus_ratio", 16, "--lora_init", "pissa"]
    final = finetune(tiny, data_dir, tmp_path / "out", *flags, "--train.max_steps", 1)
    expected = "DoRA of rank 8 and alpha 16 on q_proj, v_proj, rsLoRA, LoRA+ (ratio 16), pissa initialization"
    assert json.loads((final / "report.json").read_text())["adapter"] == expected
    assert f"| adapter | {expected} |" in (final / "README.md").read_text()
    assert read_lora_config(final).r == 16  # the adapter of rank 8 and its start


def test_pissa_starts_as_the_base_and_its_first_adapter_is_nothing(tiny, data_dir, tmp_path):
    out = tmp_path / "out"
    finetune(tiny, data_dir, out, "--lora_init", "pissa", "--train.max_steps", 1, "--train.learning_rate", 1e-12)
    finetune(tiny, data_dir, tmp_path / "zero", "--train.max_steps", 1, "--train.learning_rate", 1e-12)
    losses = [json.loads((folder / "final/report.json").read_text())["val_loss"] for folder in (out, tmp_path / "zero")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    tensors = load_file(out / "final/adapter_model.safetensors")
    for name in (name for name in tensors if name.endswith("lora_B.weight")):
        a = tensors[name.replace("lora_B", "lora_A")]
        assert torch.allclose(tensors[name] @ a, torch.zeros(1), atol=1e-6)
        assert tensors[name][:, :8].norm() > 0.1


def test_run_continues_from_the_network_that_pissa_trained_over_nf4(tiny, data_dir, tmp_path):
    """What the second run starts from is what the first one ended with: the start is taken out of the base again."""
    flags = ["--quantize", "bnb.nf4", "--train.max_steps", 2, "--lora_init", "pissa"]
    final = finetune(tiny, data_dir, tmp_path / "one", *flags)
    again = ["--quantize", "bnb.nf4", "--train.max_steps", 1, "--init_adapter", final]
    other = finetune(tiny, data_dir, tmp_path / "two", *again)
    ended, began = float(metrics(tmp_path / "one")[-1]["val_loss"]), float(metrics(tmp_path / "two")[0]["val_loss"])
    assert began == pytest.approx(ended, rel=1e-6)
    assert read_lora_config(final) == read_lora_config(other)
    assert json.loads((other / "adapter_config.json").read_text())["r"] == 16


def test_dry_run_counts_the_start_and_its_decomposition(tiny, data_dir, tmp_path, capsys):
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", tmp_path / "out", "--dry_run", "true"]
    assert main(["finetune_lora", *map(str, folders), "--lora_init", "pissa"]) == 0
    rows = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1)
    names = [name.strip() for name in rows]
    assert "its start" in names
    assert "singular vectors, beyond a step" in names


@pytest.mark.parametrize("flags", [["--lora_plus_ratio", "0.5"], ["--lora_init", "pissa_niter_0"]], ids=" ".join)
def test_wrong_variant_is_refused(flags, tiny, data_dir, tmp_path, capsys):
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", tmp_path / "out"]
    assert main(["finetune_lora", *map(str, folders), *flags]) in (1, 2)
    assert f"litlora: {flags[0]} ({flags[1]}) must be" in capsys.readouterr().err
