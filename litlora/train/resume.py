"""Which checkpoint a run resumes from, and whether it belongs to the same run."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from litlora.args import FinetuneLoraArgs, plain
from litlora.errors import LitLoraError
from litlora.train.train_state import COUNTERS
from litlora.utils.console import log
from litlora.utils.files import read_json
from litlora.utils.manifest import find_corruption

RUN = "run.json"
BASE = "the base's weights"
# Settings that say where, how fast or how often, but not what comes out of a step; folders count by their content.
WITHOUT_EFFECT = {
    "checkpoint_dir", "data_dir", "out_dir", "devices", "num_nodes", "strategy", "logger_name", "resume", "overwrite",
    "dry_run",
    "train.micro_batch_size", "train.micro_batch_tokens", "train.parallel_micro_batches",
    "train.activation_checkpointing", "train.max_time",
    "train.save_interval", "train.save_total_limit", "train.log_interval",
    "eval.max_new_tokens", "eval.evaluate_example", "eval.initial_validation",
}  # fmt: skip
MAY_GROW = {"train.epochs", "train.max_steps"}


@dataclass(frozen=True)
class Identity:
    """What decides the result of a run: two runs with one identity agree in every step."""

    settings: dict[str, Any]
    contents: dict[str, str]
    """Hashes of what the settings name, by a name for each; that of the base goes by BASE."""

    @classmethod
    def of(cls, args: FinetuneLoraArgs, contents: dict[str, str]) -> Self:
        """Take the settings that matter."""
        return cls({name: value for name, value in _flat(plain(args)) if name not in WITHOUT_EFFECT}, contents)

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        content = {"settings": self.settings, "contents": self.contents}
        (folder / RUN).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def check(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of another run, and list where they differ; a run may become longer."""
        try:
            was = Identity(**read_json(checkpoint / RUN))
            changes = [*_changed_settings(was.settings, self.settings), *_changed(was.contents, self.contents)]
        except (AttributeError, TypeError) as error:
            raise LitLoraError(f"{checkpoint / RUN} is not as litlora writes it: {error}") from error
        if changes:
            hint = "resume with the settings of that run, or start a new one in another --out_dir"
            raise LitLoraError(f"--resume {checkpoint} would not continue the same run: {', '.join(changes)}; {hint}")

    def changed_settings(self, settings: Mapping[str, Any]) -> list[str]:
        """Describe each setting that differs from those of a run, as its hyperparameters.yaml has them."""
        was = {name: value for name, value in _flat(settings) if name not in WITHOUT_EFFECT}
        return list(_changed_settings(was, self.settings, may_grow=()))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and name in ("train", "eval"):
            yield from _flat(value, f"{name}.")
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


def _changed(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [f"{name} have changed" for name in now if was.get(name) != now[name]]


def no_checkpoint(folder: Path) -> LitLoraError:
    """Return the error that there is nothing to resume from."""
    return LitLoraError(f"--resume: there is no checkpoint in {folder}; start without --resume")


def intact(checkpoint: Path) -> Path:
    """Return the checkpoint that --resume names, if it is one and intact."""
    if not (checkpoint / COUNTERS).is_file():
        raise no_checkpoint(checkpoint)
    if fault := find_corruption(checkpoint):
        raise LitLoraError(f"--resume: {checkpoint} is corrupt ({fault}); name another, or pass --resume true")
    return checkpoint


def newest_intact(checkpoints: Sequence[Path]) -> Path:
    """Return the last intact checkpoint, and report those that are corrupt."""
    for checkpoint in reversed(checkpoints):
        fault = find_corruption(checkpoint)
        if fault is None:
            return checkpoint
        log(f"{checkpoint} is corrupt and skipped: {fault}")
    folder = checkpoints[0].parent
    raise LitLoraError(f"--resume: no checkpoint in {folder} is intact; start again with --overwrite true")
