"""Config files of Lit-GPT run as they are, and each key in them is used or answered."""

import shlex
from pathlib import Path

import pytest
import yaml

from litlora.__main__ import main
from litlora.cli.litgpt_files import MODULES
from litlora.cli.parser import Call, parse
from litlora.errors import LitLoraError, UsageError

ALPACA_2K = "litlora prepare_json --source mhenrichsen/alpaca_2k_test --destination_path data/alpaca2k"


def litgpt(kind: str = "lora", **changes: object) -> dict:
    """Return settings in the form of Lit-GPT's config_hub/finetune/MODEL/KIND.yaml, null where its files are empty."""
    return {
        "checkpoint_dir": "checkpoints/google/gemma-2-2b",
        "out_dir": f"out/finetune/{kind}-gemma-2-2b",
        "precision": "bf16-true",
        "quantize": "bnb.nf4" if kind == "qlora" else None,
        "devices": 1,
        "num_nodes": 1,
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        **{f"lora_{name}": True for name in ("query", "key", "value", "projection", "mlp", "head")},
        "data": data_block(),
        "train": {
            "save_interval": 800, "log_interval": 1, "global_batch_size": 6, "micro_batch_size": 2,
            "lr_warmup_steps": 200, "epochs": 2, "max_tokens": None, "max_steps": None, "max_seq_length": 512,
            "tie_embeddings": None, "max_norm": None, "min_lr": 6.0e-05,
        },
        "eval": {
            "interval": 25, "max_new_tokens": 100, "max_iters": 100,
            "initial_validation": False, "final_validation": True,
        },
        "logger_name": "csv",
        "seed": 1337,
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": 0.0002, "weight_decay": 0.0, "betas": [0.9, 0.95]},
        },
        **changes,
    }  # fmt: skip


def data_block(module: str = "Alpaca2k", **init_args: object) -> dict:
    common = {"mask_prompt": False, "prompt_style": "alpaca", "ignore_index": -100, "seed": 42, "num_workers": 4}
    return {"class_path": f"litgpt.data.{module}", "init_args": common | init_args}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def parsed(content: dict, *flags: str) -> Call:
    Path("lora.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    call = parse(["finetune_lora", "--config", "lora.yaml", *flags])
    assert isinstance(call, Call)
    return call


@pytest.mark.parametrize(("kind", "quantize"), [("lora", None), ("qlora", "bnb.nf4")])
def test_every_key_of_a_file_is_used(kind, quantize):
    args = parsed(litgpt(kind), "--data_dir", "rows").args
    assert (args.quantize, args.lora_r, args.lora_dropout, args.mask_prompt) == (quantize, 16, 0.1, False)
    assert args.lora_switches == ("query", "key", "value", "projection", "mlp", "head")
    assert (args.train.learning_rate, args.train.min_lr, args.train.max_norm) == (2e-4, 6e-5, None)
    assert args.optimizer["init_args"] == {"weight_decay": 0.0, "betas": [0.9, 0.95]}
    assert (args.eval.interval, args.eval.initial_validation) == (25, False)


def test_data_block_without_rows_names_the_prepare_command():
    with pytest.raises(LitLoraError) as error:
        parsed(litgpt(data=data_block(val_split_fraction=0.03847)))
    assert str(error.value) == (
        "--config lora.yaml line 16: data (Alpaca2k) needs its rows prepared first: "
        f"{ALPACA_2K} --val_split_fraction 0.03847 --seed 42"
    )


def test_prepared_rows_are_found():
    Path("data/alpaca2k").mkdir(parents=True)
    Path("data/alpaca2k/train.jsonl").touch()
    call = parsed(litgpt())
    assert call.args.data_dir == Path("data/alpaca2k")
    assert call.notes == (
        f"--config lora.yaml line 16: data (Alpaca2k): rows are read from data/alpaca2k, prepared by: {ALPACA_2K} "
        "--seed 42; ignore_index and num_workers have no effect here",
    )


def test_data_dir_replaces_the_data_block():
    [note] = parsed(litgpt(), "--data_dir", "rows").notes
    assert f"rows are read from rows, instead of the rows of: {ALPACA_2K} --seed 42; " in note


def test_own_settings_win_over_those_of_the_data_block():
    assert parsed(litgpt(), "--data_dir", "rows", "--mask_prompt", "true").args.mask_prompt
    call = parsed(litgpt(prompt_style="none", data_dir="rows"))
    assert (call.args.prompt_style, call.args.data_dir) == ("none", Path("rows"))


def test_note_is_printed_and_print_config_shows_the_translation(capsys):
    Path("lora.yaml").write_text(yaml.safe_dump(litgpt(), sort_keys=False), encoding="utf-8")
    command = ["finetune_lora", "--config", "lora.yaml"]
    assert main([*command, "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# --config lora.yaml line 16: data (Alpaca2k): rows are read from data/alpaca2k")
    assert (settings := yaml.safe_load(shown))["data_dir"] == "data/alpaca2k"
    assert not {"data", "max_tokens", "tie_embeddings"} & {*settings, *settings["train"]}
    assert main([*command, "--data_dir", "rows"]) == 1
    assert "data (Alpaca2k): rows are read from rows" in capsys.readouterr().err


@pytest.mark.parametrize("module", [*MODULES, "FLAN"])
def test_prepare_commands_parse(module):
    given = {"JSON": {"json_path": "my rows.json"}, "LIMA": {"include_multiturn_conversations": True}}
    with pytest.raises(LitLoraError) as error:
        parsed(litgpt(data=data_block(module, val_split_fraction=0.1, download_dir="rows", **given.get(module, {}))))
    command = str(error.value).partition("first: ")[2]
    args = parse(shlex.split(command)[1:]).args
    assert (args.destination_path, args.val_split_fraction, args.seed) == (Path("rows"), 0.1, 42)
    assert module != "JSON" or args.source == "my rows.json"
    assert module != "LIMA" or args.include_multiturn_conversations


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": data_block(ignored=1)}, "line 16: data.init_args: unrecognized ignored"),
        ({"data": {"init_args": {}}}, "line 16: data must be a data module of Lit-GPT: class_path and init_args"),
        ({"train": {"max_tokens": 10}}, "line 25: max_tokens limits pre-training only: use max_steps or epochs"),
        ({"train": {"tie_embeddings": True}}, "line 25: tie_embeddings has no effect: the checkpoint's config.json"),
        ({"access_token": "hf_secret"}, "access_token is given to litlora download"),
        ({"log": {"project": "x"}}, "log has no effect here: metrics go to metrics.csv"),
    ],
)
def test_keys_without_a_counterpart_are_answered(changes, sentence):
    with pytest.raises(UsageError) as error:
        parsed(litgpt(**changes), "--data_dir", "rows")
    assert sentence in str(error.value) and "hf_secret" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"devices": "auto"}, "devices (auto) is not supported: give the number of devices, such as 1"),
        ({"eval": {"evaluate_example": "random"}}, "evaluate_example (random) is not supported: give a row of the"),
    ],
)
def test_values_without_a_counterpart_are_answered(changes, sentence):
    with pytest.raises(UsageError) as error:
        parsed(litgpt(**changes), "--data_dir", "rows")
    assert sentence in str(error.value)


def test_first_example_is_row_0():
    assert parsed(litgpt(eval={"evaluate_example": "first"}), "--data_dir", "rows").args.eval.evaluate_example == 0
    assert parsed(litgpt(eval={"evaluate_example": 2}), "--data_dir", "rows").args.eval.evaluate_example == 2


@pytest.mark.parametrize("data", [None, "Alpaca"])
def test_data_may_be_null_or_a_name(data):
    assert len(parsed(litgpt(data=data, log=None, access_token=None), "--data_dir", "rows").notes) == bool(data)


def test_other_commands_do_not_know_these_keys():
    Path("rows.yaml").write_text("data: null\n", encoding="utf-8")
    with pytest.raises(UsageError, match="unrecognized data"):
        parse(["prepare_json", "--config", "rows.yaml", "--source", "x", "--destination_path", "y"])
