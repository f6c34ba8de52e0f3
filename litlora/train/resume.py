"""Which checkpoint a run resumes from, and whether it belongs to the same run."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from litlora.args import FinetuneLoraArgs, plain
from litlora.errors import LitLoraError
from litlora.train.train_state import COUNTERS
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
    """What decides the result of a run: two that agree in it agree in every step."""

    settings: dict[str, Any]
    contents: dict[str, str]
    """Hashes of what the settings name, by a name for each; that of the base goes by BASE."""

    @classmethod
    def of(cls, args: FinetuneLoraArgs, contents: dict[str, str]) -> Self:
        """Take from the settings those that matter."""
        return cls({name: value for name, value in _flat(plain(args)) if name not in WITHOUT_EFFECT}, contents)

    def write(self, folder: Path) -> None:
        """Leave it in a checkpoint."""
        content = {"settings": self.settings, "contents": self.contents}
        (folder / RUN).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def check(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of another run, and list where they differ; a run may become longer."""
        try:
            was = Identity(**read_json(checkpoint / RUN))
            # A setting that the version which began the run did not have was at what is now its default.
            before = Identity.of(FinetuneLoraArgs(Path(), Path()), {}).settings | was.settings
            changes = [*_changed_settings(before, self.settings), *_changed(was.contents, self.contents)]
        except (AttributeError, TypeError) as error:
            raise LitLoraError(f"{checkpoint / RUN} is not as litlora writes it: {error}") from error
        if changes:
            hint = "go on with what it was started with, or start anew in another --out_dir"
            raise LitLoraError(f"--resume {checkpoint} would not continue the same run: {', '.join(changes)}; {hint}")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and name in ("train", "eval"):
            yield from _flat(value, f"{name}.")
        else:
            yield prefix + name, value


def _changed_settings(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in was | now:
        old, new = was.get(name), now.get(name)
        grown = name in MAY_GROW and (new is None or (old is not None and new >= old))
        if old != new and not grown:
            yield f"--{name} was {_text(old)} and is {_text(new)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _changed(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [f"{name} have changed" for name in now if was.get(name) != now[name]]


def no_checkpoint(folder: Path) -> LitLoraError:
    """Say that there is nothing to go on from."""
    return LitLoraError(f"--resume: there is no checkpoint in {folder}; start without --resume")


def whole(checkpoint: Path) -> Path:
    """Return the checkpoint that --resume names, if it is one and not damaged."""
    if not (checkpoint / COUNTERS).is_file():
        raise no_checkpoint(checkpoint)
    if fault := find_corruption(checkpoint):
        raise LitLoraError(f"--resume: {checkpoint} is damaged ({fault}); name another, or pass --resume true")
    return checkpoint


def newest_whole(checkpoints: Sequence[Path]) -> Path:
    """Return the last checkpoint that is not damaged, and say which ones are."""
    for checkpoint in reversed(checkpoints):
        fault = find_corruption(checkpoint)
        if fault is None:
            return checkpoint
        sys.stderr.write(f"{checkpoint} is damaged and left out: {fault}\n")
    folder = checkpoints[0].parent
    raise LitLoraError(f"--resume: no checkpoint in {folder} is whole; start anew with --overwrite true")
