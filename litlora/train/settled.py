"""What settings stand for once the checkpoint, and the run that is resumed, are known.

Nothing here imports torch: settings are compared with those of a run before it is in memory.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from litlora.args.common import plain
from litlora.args.finetune import FORMER_DEFAULTS, FinetuneLoraArgs
from litlora.errors import LitLoraError
from litlora.report.files import read_settings
from litlora.train.optimizer_names import class_path_of
from litlora.train.resume import RUN, flat
from litlora.utils.files import read_json

Report = Callable[[str], None]
RATE = "train.learning_rate"


def settle(args: FinetuneLoraArgs, hidden_size: int, began: Mapping[str, Any], report: Report) -> FinetuneLoraArgs:
    """Return the settings with which a run trains, and report those that are not as they were given.

    `began` has what `former_defaults` finds.
    """
    if began:
        shown = ", ".join(f"--{name} {json.dumps(value)}" for name, value in began.items())
        report(f"the run began with other defaults, and resumes with them: {shown}")
    flags = {name: value for name, value in began.items() if name != RATE}
    train = replace(args.train, learning_rate=began.get(RATE, args.train.learning_rate))
    return with_rate(replace(args, train=train, **flags), hidden_size, report)


def former_defaults(args: FinetuneLoraArgs) -> dict[str, Any]:
    """Return the settings of the run that is resumed which its version had as defaults, where the command has ours."""
    was, now, ours = recorded(args), dict(flat(plain(args))), dict(flat(plain(FinetuneLoraArgs(Path(), Path()))))
    return {name: old for name, old in FORMER_DEFAULTS.items() if was.get(name) == old and now[name] == ours[name]}


def recorded(args: FinetuneLoraArgs) -> Mapping[str, Any]:
    """Return the settings of the run that is resumed, its rate by its dotted name; none where they cannot be read."""
    with suppress(LitLoraError):  # what is corrupt is reported later
        if isinstance(args.resume, Path):
            content = read_json(args.resume / RUN)
            settings = content.get("settings") if isinstance(content, dict) else None
            return settings if isinstance(settings, dict) else {}
        if args.resume:
            settings = read_settings(args.out_dir)
            train = settings.get("train")
            return settings | {RATE: train.get("learning_rate") if isinstance(train, dict) else None}
    return {}


def automatic_rate(hidden_size: int) -> float:
    """Return the peak rate that Tinker's rule for LoRA on Llama gives: the wider the model, the lower."""
    return float(f"{5e-5 * 10 * (2000 / hidden_size) ** 0.781:.3g}")  # as many digits as a user would write


def with_rate(args: FinetuneLoraArgs, hidden_size: int, report: Report) -> FinetuneLoraArgs:
    """Replace a learning rate of auto by its number, which is what the run records and a resumed run compares."""
    if args.train.learning_rate != "auto":
        return args
    rate, name = automatic_rate(hidden_size), class_path_of(args.optimizer).rpartition(".")[2]
    note = "" if "Adam" in name else f", and the rule is for Adam: {name} may want another"
    report(f"--train.learning_rate auto is {rate:g}: the checkpoint's hidden_size is {hidden_size}{note}")
    return replace(args, train=replace(args.train, learning_rate=rate))
