"""What settings stand for once the checkpoint, and the run that is resumed, are known."""

import json
from pathlib import Path

import pytest
import yaml

from litlora.args.common import plain
from litlora.args.finetune import FORMER_DEFAULTS, FinetuneLoraArgs, TrainArgs
from litlora.report.files import HYPERPARAMETERS
from litlora.train.resume import RUN, flat
from litlora.train.settled import RATE, automatic_rate, former_defaults, settle, with_rate


@pytest.mark.parametrize(("hidden_size", "rate"), [(576, 1.32e-3), (2000, 5e-4), (2048, 4.91e-4), (4096, 2.86e-4)])
def test_the_automatic_rate_falls_with_the_hidden_size(hidden_size, rate):
    assert automatic_rate(hidden_size) == rate


@pytest.mark.parametrize(
    ("optimizer", "note"),
    [
        ("AdamW", ""),
        ({"class_path": "torch.optim.NAdam"}, ""),
        ("PagedAdamW8bit", ""),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}},
         ", and the rule is for Adam: SGD may want another"),
    ],
)  # fmt: skip
def test_an_automatic_rate_is_reported_with_whom_it_is_for(optimizer, note):
    args = FinetuneLoraArgs(Path(), Path(), train=TrainArgs(learning_rate="auto"), optimizer=optimizer)
    reported = []
    assert with_rate(args, 2000, reported.append).train.learning_rate == 5e-4
    assert reported == [f"--train.learning_rate auto is 0.0005: the checkpoint's hidden_size is 2000{note}"]


def test_a_rate_that_is_given_stays():
    args = FinetuneLoraArgs(Path(), Path(), train=TrainArgs(learning_rate=3e-4))
    assert with_rate(args, 2000, pytest.fail) is args


FORMER = {name: value for name, value in FORMER_DEFAULTS.items() if name != RATE}


def settings(folder: Path, **changed: object) -> FinetuneLoraArgs:
    return FinetuneLoraArgs(Path("base"), Path("data"), folder, **changed)


def began(folder: Path) -> FinetuneLoraArgs:
    """Record a run with the defaults of an earlier version and a rank of its own."""
    args = settings(folder, **FORMER | {"lora_r": 4}, train=TrainArgs(learning_rate=FORMER_DEFAULTS[RATE]))
    (folder / HYPERPARAMETERS).write_text(yaml.safe_dump(plain(args)), encoding="utf-8")
    (folder / RUN).write_text(json.dumps({"settings": dict(flat(plain(args)))}), encoding="utf-8")
    return args


@pytest.mark.parametrize("by_path", [False, True])
def test_a_run_goes_on_with_the_defaults_it_began_with(tmp_path, by_path):
    was = began(tmp_path)
    reported: list[str] = []
    resumed = settings(tmp_path, resume=tmp_path if by_path else "auto", lora_r=4)
    now = settle(resumed, 2000, former_defaults(resumed), reported.append)
    assert [getattr(now, name) for name in FORMER] == [getattr(was, name) for name in FORMER]
    assert now.train == was.train
    *_, kept = reported[0].split(": ")
    assert kept.split(", ")[0] == "--lora_alpha 16"
    assert kept.split(", ")[-2:] == ["--lora_mlp false", "--train.learning_rate 0.0002"]
    assert not former_defaults(now)


def test_settings_of_ones_own_stay_and_other_runs_have_the_present_defaults(tmp_path):
    began(tmp_path)
    own = settings(tmp_path, resume=True, lora_r=5, lora_alpha=7, train=TrainArgs(learning_rate=1e-3))
    assert former_defaults(own).keys() == {"lora_key", "lora_projection", "lora_mlp"}
    for other in (settings(tmp_path), settings(tmp_path / "new", resume="auto")):
        assert not former_defaults(other)


def test_recorded_settings_of_an_earlier_version_continue_an_adapter(tmp_path):
    assert settings(tmp_path, init_adapter=Path("adapter"), **FORMER).lora_r == 8
