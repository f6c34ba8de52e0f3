"""Flags and values of PEFT, TRL, transformers and Lit-GPT, typed as their users type them, lead to litlora's."""

import re
from pathlib import Path

import pytest

from litlora.__main__ import main
from litlora.args import COMMANDS
from litlora.cli.settings import settings_of
from litlora.cli.suggestions import ALIASES, ANSWERS, VALUES, hint_for, near_flag

FINETUNE = ["finetune_lora", "checkpoints/pico", "--data_dir", "data"]
FLAGS = {
    "--lr": "--train.learning_rate",
    "--learning_rate": "--train.learning_rate",
    "--learning-rate": "--train.learning_rate",
    "--train.lr": "--train.learning_rate",
    "--batch_size": "--train.global_batch_size",
    "--per_device_train_batch_size": "--train.micro_batch_size",
    "--micro_batch_size": "--train.micro_batch_size",
    "--gradient_accumulation_steps": "--train.global_batch_size",
    "--num_epochs": "--train.epochs",
    "--num_train_epochs": "--train.epochs",
    "--epochs": "--train.epochs",
    "--train.epoch": "--train.epochs",
    "--max_steps": "--train.max_steps",
    "--lora_rank": "--lora_r",
    "--r": "--lora_r",
    "-r": "--lora_r",
    "--rank": "--lora_r",
    "--alpha": "--lora_alpha",
    "--lora_aplha": "--lora_alpha",
    "--dropout": "--lora_dropout",
    "--target_modules": "--lora_targets",
    "--lora_target_modules": "--lora_targets",
    "--lora_q": "--lora_query",
    "--model": "--checkpoint_dir",
    "--model_name_or_path": "--checkpoint_dir",
    "--base_model": "--checkpoint_dir",
    "--bf16": "--precision bf16-true",
    "--fp16": "--precision bf16-true",
    "--torch_dtype": "--precision",
    "--load_in_4bit": "--quantize bnb.nf4",
    "--quantization": "--quantize",
    "--output_dir": "--out_dir",
    "--dataset": "--data_dir",
    "--dataset_name": "--data_dir",
    "--data": "--data_dir",
    "--max_length": "--train.max_seq_length",
    "--max_seq_length": "--train.max_seq_length",
    "--cutoff_len": "--train.max_seq_length",
    "--warmup_ratio": "--train.lr_warmup_fraction",
    "--warmup_steps": "--train.lr_warmup_steps",
    "--weight_decay": "--optimizer.init_args.weight_decay",
    "--optim": "--optimizer",
    "--max_grad_norm": "--train.max_norm",
    "--gradient_checkpointing": "--train.activation_checkpointing true",
    "--save_steps": "--train.save_interval",
    "--eval_steps": "--eval.interval",
    "--logging_steps": "--train.log_interval",
    "--save_total_limit": "--train.save_total_limit",
    "--load_best_model_at_end": "--eval.keep_best true",
    "--resume_from_checkpoint": "--resume",
    "--overwrite_output_dir": "--overwrite",
    "--report_to": "--logger_name",
    "--max_tokens": "--train.micro_batch_tokens",
    "--num_gpus": "--devices",
    "--train_on_inputs": "--mask_prompt false",
    "--dry-run": "--dry_run",
    "--out-dir": "--out_dir",
}
OTHERS = {
    ("generate", "--max_tokens"): "--max_new_tokens",
    ("generate", "--max_length"): "--max_new_tokens",
    ("generate", "--n"): "--num_samples",
    ("generate", "--temp"): "--temperature",
    ("generate", "--temprature"): "--temperature",
    ("generate", "--topk"): "--top_k",
    ("generate", "--do_sample"): "--temperature 0",
    ("generate", "--load_in_4bit"): "--quantize bnb.nf4",
    ("generate", "--base_model"): "--base_dir",
    ("download", "--model"): "--repo_id",
    ("download", "--hf_token"): "--access_token",
    ("download", "--acess_token"): "--access_token",
    ("download", "--cache_dir"): "--checkpoint_root",
    ("merge_lora", "--output_dir"): "--out_dir",
    ("merge_lora", "--pretrained_checkpoint_dir"): "--base_dir",
    ("prepare_json", "--json_path"): "--source",
    ("prepare_json", "--output_dir"): "--destination_path",
    ("prepare_alpaca", "--test_split_fraction"): "--val_split_fraction",
}


@pytest.mark.parametrize(("flag", "meant"), FLAGS.items())
@pytest.mark.parametrize("value", ["1", None], ids=["value", "alone"])
def test_flag_of_another_trainer_leads_to_ours(flag, meant, value, capsys):
    assert main([*FINETUNE, flag, *([value] if value else [])]) == 2
    assert capsys.readouterr() == ("", f"litlora: unrecognized {flag}: did you mean {meant}?\n")


@pytest.mark.parametrize(("command", "flag"), OTHERS)
def test_each_command_suggests_its_own_flags(command, flag, capsys):
    assert main([command, flag, "1"]) == 2
    assert capsys.readouterr() == ("", f"litlora: unrecognized {flag}: did you mean {OTHERS[command, flag]}?\n")


PREPARE = {"--val_split_fraction"}
PAGE = Path(__file__).parent.parent.parent / "docs/coming-from.md"
ROWS = re.findall(r"^\| `(?!optimizer\.)([\w.]+)` \| `(--[^`]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("setting", "meant"), dict.fromkeys(ROWS))
def test_settings_of_the_page_are_answered_as_it_says(setting, meant):
    """The page and the suggestions agree; a setting with the same name here is no suggestion."""
    names = settings_of(COMMANDS["prepare_json" if meant in PREPARE else "finetune_lora"])
    assert setting in names or near_flag(f"--{setting}", names) == meant


@pytest.mark.parametrize("setting", ANSWERS)
def test_settings_without_a_name_here_stand_on_the_page(setting):
    assert f"`{setting}`" in PAGE.read_text(encoding="utf-8")
    assert hint_for(f"--{setting}", settings_of(COMMANDS["finetune_lora"])) == ANSWERS[setting]


def test_the_page_has_most_of_its_rows_checked():
    assert len(ROWS) > 80


def test_all_unknown_flags_are_named_in_one_line(capsys):
    assert main([*FINETUNE, "--lr=1", "--xyz", "2", "--bf16"]) == 2
    assert capsys.readouterr().err == (
        "litlora: unrecognized --lr: did you mean --train.learning_rate?; unrecognized --xyz; "
        "unrecognized --bf16: did you mean --precision bf16-true?\n"
    )


@pytest.mark.parametrize(
    ("flag", "value", "meant"),
    [
        ("--precision", "bf16", "bf16-true"),
        ("--precision", "fp16", "bf16-true"),
        ("--precision", "16-mixed", "bf16-mixed"),
        ("--precision", "float32", "32-true"),
        ("--precision", "BF16-true", "bf16-true"),
        ("--quantize", "nf4", "bnb.nf4"),
        ("--quantize", "4bit", "bnb.nf4"),
        ("--quantize", "bnb.nf4_dq", "bnb.nf4-dq"),
        ("--quantize", "none", "null"),
        ("--strategy", "dpp", "ddp"),
        ("--lora_init", "fischer", "fisher"),
        ("--logger_name", "cvs", "csv"),
    ],
)
def test_wrong_value_lists_the_choices_and_the_near_one(flag, value, meant, capsys):
    assert main([*FINETUNE, flag, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"litlora: {flag} ({value}) must be ")
    assert error.endswith(f": did you mean {meant}?\n")


def test_aliases_are_not_flags_already_and_lead_to_flags():
    names = {name for kind in COMMANDS.values() for name in settings_of(kind)}
    for alias, candidates in ALIASES.items():
        flags = [candidate.split()[0].strip("-,") for candidate in candidates]
        assert all(flag in names or flag.startswith(("optimizer.", "lora_use_dora")) for flag in flags), alias


def test_near_values_are_values():
    settings = settings_of(COMMANDS["finetune_lora"])
    for name, values in VALUES.items():
        assert set(values.values()) <= {*settings[name].choices, "null"}, name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name a command: download, prepare_alpaca, prepare_lima, prepare_json, check_data, "
         "finetune_lora, generate, chat, evaluate, report, merge_lora, export, verify, upload or sweep; "
         "see litlora --help"),
        (["finetune"], "there is no such command: did you mean finetune_lora?"),
        (["--lr", "1", "finetune_lora"], "the command comes before its flags: there are download, prepare_alpaca, "
         "prepare_lima, prepare_json, check_data, finetune_lora, generate, chat, evaluate, report, merge_lora, export, "
         "verify, upload and sweep"),
    ],
    ids=["none", "misspelt", "late"],
)  # fmt: skip
def test_command_that_is_none_is_refused(arguments, sentence, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"litlora: {sentence}\n")
