"""Which checkpoint a run resumes from, and whether it belongs to the same run."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from litlora.args.common import GGUFPath, as_gguf, plain
from litlora.args.finetune import FinetuneLoraArgs
from litlora.errors import LitLoraError
from litlora.lora.adapter_folder import FINAL, is_adapter
from litlora.report.files import METRICS
from litlora.utils.console import notice
from litlora.utils.files import read_json, refuse_link
from litlora.utils.manifest import find_corruption

RUN = "run.json"
AUTO = "auto"  # of --resume
COUNTERS = "training_state.json"
"""A file that a folder has from which a run can resume."""
BASE, START = "the base's weights", "the files of --init_adapter"
TENSORS, ROWS, TOKENS = "tensors of the base", "rows of ", "tokens of "
"""Details of the base, and of each split by its name."""
TOKENIZATION = {"ids": "of the tokenizer's file"}
"""How this version tokenizes: an earlier one followed tokenizer_class where transformers does, and recorded nothing."""
# Settings that say where, how fast or how often, but not what comes out of a step; folders count by their content.
WITHOUT_EFFECT = {
    "checkpoint_dir", "data_dir", "out_dir", "init_adapter", "devices", "num_nodes", "strategy", "logger_name",
    "resume", "overwrite", "dry_run", "deploy", "receipt", "quiet", "memory",
    "train.micro_batch_size", "train.micro_batch_tokens", "train.parallel_micro_batches",
    "train.activation_checkpointing", "train.max_time",
    "train.save_interval", "train.save_total_limit", "train.log_interval",
    "eval.max_new_tokens", "eval.evaluate_example", "eval.samples", "eval.highest_losses", "eval.initial_validation",
}  # fmt: skip
MAY_GROW = {"train.epochs", "train.max_steps"}


@dataclass(frozen=True)
class Identity:
    """What decides the result of a run: two runs with one identity agree in every step."""

    settings: dict[str, Any]
    contents: dict[str, str]
    """Hashes of what the settings name, by a name for each; that of the base goes by BASE."""
    details: dict[str, str] = field(default_factory=dict)
    """Hashes that tell what differs where contents do."""

    @classmethod
    def of(cls, args: FinetuneLoraArgs, contents: dict[str, str], details: Mapping[str, str] | None = None) -> Self:
        """Take the settings that matter."""
        settings = {name: value for name, value in flat(plain(args)) if name not in WITHOUT_EFFECT}
        return cls(settings, contents, dict(details or {}))

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        content = {"settings": self.settings, "contents": self.contents, "details": self.details}
        (folder / RUN).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def check(self, checkpoint: Path, explain: Mapping[str, "Explain"] = MappingProxyType({})) -> None:
        """Refuse a checkpoint of another run, and list where they differ; a run may become longer.

        Contents that differ are explained if the settings agree.
        """
        try:
            was = Identity(**read_json(checkpoint / RUN))
            settings = list(_changed_settings(was.settings, self.settings))
            changes = [*settings, *_changed(was, checkpoint, self.contents, {} if settings else explain)]
        except (AttributeError, TypeError) as error:
            raise LitLoraError(f"{checkpoint / RUN} is not as litlora writes it: {error}") from error
        if changes:
            hint = "resume with the settings of that run, or start a new one in another --out_dir"
            raise LitLoraError(f"--resume {checkpoint} would not continue the same run: {', '.join(changes)}; {hint}")

    def with_details(self, details: Mapping[str, str]) -> Self:
        """Return the same identity with more details."""
        return replace(self, details={**self.details, **details})

    def changed_settings(self, settings: Mapping[str, Any]) -> list[str]:
        """Describe each setting that differs from those of a run, as its hyperparameters.yaml has them."""
        was = {name: value for name, value in flat(settings) if name not in WITHOUT_EFFECT}
        return list(_changed_settings(was, self.settings, may_grow=()))


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings by dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict) and name in ("train", "eval"):
            yield from flat(value, f"{name}.")
        elif name == "quantize" and isinstance(as_gguf(value), GGUFPath):
            yield name, GGUFPath.SUFFIX  # the file counts by its content
        else:
            yield prefix + name, value


def _changed_settings(was: dict[str, Any], now: dict[str, Any], may_grow: Collection[str] = MAY_GROW) -> Iterator[str]:
    # A setting that the version which began the run did not have was at what is now its default.
    was = Identity.of(FinetuneLoraArgs(Path(), Path()), {}).settings | was
    for name in was | now:
        old, new = was.get(name), now.get(name)
        grown = name in may_grow and (new is None or (old is not None and new >= old))
        if old != new and not grown:
            yield f"--{name} was {_text(old)} and is {_text(new)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


Explain = Callable[[Identity, Path], str | None]
"""Tells how a content of a run and its checkpoint differs from the present one; None if only the hash does."""


def _changed(was: Identity, checkpoint: Path, now: Mapping[str, str], explain: Mapping[str, Explain]) -> Iterator[str]:
    if now and START in was.contents.keys() - now.keys():
        yield "--init_adapter is left out"
    for name in now:
        if name not in TOKENIZATION and was.contents.get(name) != now[name]:
            change = explain[name](was, checkpoint) if name in explain else describe(name, was)
            if change is not None:
                yield change


def describe(name: str, was: Identity) -> str:
    """Describe a content that differs."""
    is_older = name not in (BASE, START) and TOKENIZATION.keys() - was.contents.keys()
    cause = "an earlier version of litlora tokenized them by tokenizer_class, this one follows the tokenizer's file"
    return f"{name} have changed ({cause})" if is_older else f"{name} have changed"


def split_content(name: str) -> str:
    """Return the name of the content of a split's tokens."""
    return f"the rows or the tokenizer of {name}"


Check = Callable[[Path], str | None]
"""What finds the fault of a checkpoint, if it has one."""


def starting_point(
    args: FinetuneLoraArgs, report: Callable[[str], None] = notice, check: Check = find_corruption
) -> Path | None:
    """Return the checkpoint to start from, or None for a run from the start.

    Refuses an output folder that holds another run, or no intact checkpoint of this one to resume from.
    """
    replaced = (args.out_dir / FINAL, *checkpoints_in(args.out_dir))
    for path in replaced:
        refuse_link(path)  # before one of them is removed or replaced
    if args.overwrite:
        _refuse_inputs_in(replaced, args)
    out_dir, start = args.out_dir, _requested_checkpoint(args, report, check)
    if (out_dir / FINAL).exists() and not args.overwrite:
        hint = "choose another, or replace it by --overwrite true"
        raise LitLoraError(f"--out_dir ({out_dir}) holds a finished run: {hint}")
    resumes = args.resume in (True, AUTO) or is_local(start, out_dir)
    if ((out_dir / METRICS).exists() or checkpoints_in(out_dir)) and not resumes and not args.overwrite:
        hint = "choose another, resume it by --resume true, or replace it by --overwrite true"
        raise LitLoraError(f"--out_dir ({out_dir}) holds a run already: {hint}")
    return start


def _refuse_inputs_in(replaced: Sequence[Path], args: FinetuneLoraArgs) -> None:
    """Refuse to remove with an earlier run what the new one reads."""
    folders = [os.path.realpath(folder) for folder in replaced]
    for name in ("checkpoint_dir", "data_dir", "init_adapter"):
        path = getattr(args, name)
        if path is not None and any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in folders):
            raise LitLoraError(f"--{name} ({path}) would be removed by --overwrite true: choose another --out_dir")


def _requested_checkpoint(args: FinetuneLoraArgs, report: Callable[[str], None], check: Check) -> Path | None:
    if isinstance(args.resume, Path):  # which "auto" is not
        return intact(args.resume, check)
    if not args.resume:
        return None
    if args.resume is True and not args.out_dir.exists():
        raise no_checkpoint(args.out_dir)
    if not (checkpoints := checkpoints_in(args.out_dir)):
        if (args.out_dir / METRICS).exists() or args.resume is True:
            report(f"there is no checkpoint in {args.out_dir} yet: starting at the first step")
        return None
    return newest_intact(checkpoints, report, check)


def is_local(start: Path | None, out_dir: Path) -> bool:
    """Tell whether a checkpoint is one of the run in this folder."""
    return start is not None and start.resolve().parent == out_dir.resolve()


def checkpoints_in(out_dir: Path) -> list[Path]:
    """Return the step folders of a run, the oldest first."""
    return sorted((path for path in out_dir.glob("step-*") if step_of(path)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's folder is named after; 0 for another folder."""
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def no_checkpoint(folder: Path) -> LitLoraError:
    """Return the error that there is nothing to resume from."""
    return LitLoraError(f"--resume: there is no checkpoint in {folder}; start without --resume")


def intact(checkpoint: Path, check: Check) -> Path:
    """Return the checkpoint that --resume names, if it is one and intact."""
    if not (checkpoint / COUNTERS).is_file():
        raise _not_a_checkpoint(checkpoint)
    if fault := check(checkpoint):
        raise LitLoraError(f"--resume: {checkpoint} is corrupt ({fault}); name another, or pass --resume true")
    return checkpoint


def _not_a_checkpoint(folder: Path) -> LitLoraError:
    """Return the error that there is nothing to resume from in a folder that --resume names, and what was meant."""
    adapter = folder if is_adapter(folder) else folder / FINAL
    if steps := checkpoints_in(folder):
        return LitLoraError(f"--resume: {folder} is the folder of a run; did you mean {steps[-1]}?")
    if is_adapter(adapter):
        hint = f"to continue from it on new data, pass --init_adapter {adapter}"
        return LitLoraError(f"--resume: {folder} is a finished adapter, not a checkpoint of a run; {hint}")
    return no_checkpoint(folder)


def newest_intact(checkpoints: Sequence[Path], report: Callable[[str], None], check: Check) -> Path:
    """Return the last intact checkpoint, and report those that are corrupt."""
    for checkpoint in reversed(checkpoints):
        fault = check(checkpoint)
        if fault is None:
            return checkpoint
        report(f"{checkpoint} is corrupt and skipped: {fault}")
    folder = checkpoints[0].parent
    raise LitLoraError(f"--resume: no checkpoint in {folder} is intact; start again with --overwrite true")
