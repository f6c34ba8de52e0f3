"""What settings stand for once the checkpoint is known."""

from pathlib import Path

import pytest

from litlora.args.finetune import FinetuneLoraArgs, TrainArgs
from litlora.train.settled import automatic_rate, with_rate


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
