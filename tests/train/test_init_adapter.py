"""--init_adapter: a run that continues from an adapter of an earlier run, or of PEFT."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.copies import edit_json
from helpers.reference import hugging_face
from helpers.runs import adapter as tensors
from helpers.runs import finetune, metrics, report, same_adapter
from peft import LoraConfig, get_peft_model

from litlora.__main__ import main
from litlora.lora.adapter_config import read_settings

STILL = ["--optimizer", "SGD", "--train.learning_rate", "1e-30", "--train.max_steps", 1]
"""Train without an effect."""
VALIDATED = ["--eval.initial_validation", "true"]


@pytest.fixture(scope="module")
def made_by_peft(tiny, tmp_path_factory) -> Path:
    """Return an adapter with different ranks and scalings, as PEFT writes it."""
    torch.manual_seed(0)
    patterns = {
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {r".*\.1\..*": 12},
        "use_rslora": True,
        "init_lora_weights": False,
    }
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], **patterns)
    folder = tmp_path_factory.mktemp("peft")
    get_peft_model(hugging_face(tiny), config).save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(tiny))
    return folder


@pytest.mark.parametrize("quantize", [[], ["--quantize", "bnb.nf4"]], ids=["dense", "nf4"])
def test_run_takes_ranks_scalings_layers_and_matrices_from_the_adapter(
    tiny, data_dir, made_by_peft, tmp_path, quantize
):
    final = finetune(tiny, data_dir, tmp_path, "--init_adapter", made_by_peft, *STILL, *quantize)
    assert same_adapter(final, made_by_peft)
    assert read_settings(final) == read_settings(made_by_peft)
    assert json.loads((final / "adapter_config.json").read_text())["lora_dropout"] == 0  # that of the run
    recorded = yaml.safe_load((tmp_path / "hyperparameters.yaml").read_text())
    assert recorded["init_adapter"] == str(made_by_peft)


@pytest.mark.parametrize("flags", [[], ["--lora_use_dora", "true"]], ids=["lora", "dora"])
def test_run_starts_with_the_loss_of_the_adapter(tiny, data_dir, tmp_path, flags):
    first = finetune(tiny, data_dir, tmp_path / "first", *flags)
    finetune(tiny, data_dir, tmp_path / "second", "--init_adapter", first, *VALIDATED)
    losses = [float(row["val_loss"]) for row in metrics(tmp_path / "second") if row["val_loss"]]
    assert losses[0] == pytest.approx(report(first)["val_loss"], rel=1e-6)
    assert losses[-1] < losses[0]


def test_adapter_that_compensates_for_quantization_is_not_initialized_again(tiny, data_dir, tmp_path, capsys):
    nf4 = ["--quantize", "bnb.nf4"]
    first = finetune(tiny, data_dir, tmp_path / "first", *nf4, "--lora_init", "fisher", "--train.max_steps", 1)
    second = finetune(tiny, data_dir, tmp_path / "second", *nf4, "--init_adapter", first, *STILL)
    assert same_adapter(first, second)
    assert read_settings(second).init == "fisher"
    refused(capsys, tiny, data_dir, tmp_path, "--init_adapter", first)
    assert "(--lora_init fisher): pass --quantize bnb.nf4" in capsys.readouterr().err


def test_resumed_run_ends_as_the_uninterrupted_one(tiny, data_dir, made_by_peft, tmp_path, capsys):
    flags = ["--train.global_batch_size", 4, "--train.save_interval", 2, "--lora_dropout", "0.1"]
    whole = finetune(tiny, data_dir, tmp_path / "whole", "--init_adapter", made_by_peft, *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed", ignore=shutil.ignore_patterns("final", "step-000004"))
    resume = [*flags, "--resume", "true"]
    refused(capsys, tiny, data_dir, tmp_path / "killed", *resume)
    assert "would not continue the same run: --init_adapter is left out" in capsys.readouterr().err
    other = finetune(tiny, data_dir, tmp_path / "other", "--init_adapter", made_by_peft, *STILL[2:])
    refused(capsys, tiny, data_dir, tmp_path / "killed", *resume, "--init_adapter", other)
    assert "the files of --init_adapter have changed" in capsys.readouterr().err
    moved = shutil.copytree(made_by_peft, tmp_path / "moved")
    resumed = finetune(tiny, data_dir, tmp_path / "killed", *resume, "--init_adapter", moved)
    assert same_adapter(resumed, whole)
    assert not torch.equal(*(next(iter(tensors(folder).values())) for folder in (resumed, made_by_peft)))


def test_base_is_the_one_that_the_adapter_names(data_dir, made_by_peft, tiny, tmp_path):
    flags = [
        "--data_dir",
        data_dir,
        "--out_dir",
        tmp_path / "out",
        "--precision",
        "32-true",
        "--eval.max_new_tokens",
        0,
    ]
    assert main([*map(str, ["finetune_lora", "--init_adapter", made_by_peft, *flags, *STILL])]) == 0
    assert yaml.safe_load((tmp_path / "out/hyperparameters.yaml").read_text())["checkpoint_dir"] == str(tiny)


def test_dry_run_counts_the_adapters_parameters(tiny, data_dir, made_by_peft, tmp_path, capsys):
    flags = ["--init_adapter", made_by_peft, "--dry_run", "true"]
    assert (
        main([*map(str, ["finetune_lora", tiny, "--data_dir", data_dir, "--out_dir", tmp_path / "out", *flags])]) == 0
    )
    parameters = sum(tensor.numel() for tensor in tensors(made_by_peft).values())
    printed = re.search(r"trainable parameters[ |]+([\d,]+)", capsys.readouterr().out)
    assert int(printed[1].replace(",", "")) == parameters


def test_plan_names_adapter_and_prompt_style(tiny, data_dir, adapter, tmp_path, capsys):
    finetune(tiny, data_dir, tmp_path / "out", "--init_adapter", adapter, *STILL, "--prompt_style", "none")
    printed = capsys.readouterr().err
    assert f"LoRA of rank 8 and alpha 16 on q_proj, v_proj, continued from {adapter}\n" in printed
    assert f"{adapter} was trained on the prompt style alpaca, and this run is on none\n" in printed


def refused(capsys, base: Path, data_dir: Path, out_dir: Path, *flags: object) -> None:
    """Run finetune_lora, which must fail."""
    capsys.readouterr()
    settings = ["--precision", "32-true", "--eval.max_new_tokens", 0, "--train.learning_rate", "1e-2"]
    folders = ["--checkpoint_dir", base, "--data_dir", data_dir, "--out_dir", out_dir]
    assert main([*map(str, ["finetune_lora", *folders, *settings, *flags])]) == 1
