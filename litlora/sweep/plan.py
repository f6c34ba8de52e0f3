"""The plan of a sweep: its search space checked by the parser, and the command of each trial."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from litlora.args.common import plain
from litlora.args.finetune import FinetuneLoraArgs
from litlora.args.inference import EvaluateArgs
from litlora.args.sweep import SweepArgs
from litlora.cli.parser import Call, parse
from litlora.errors import LitLoraError
from litlora.lora.adapter_folder import FINAL
from litlora.sweep.space import Point, Space, Value, words

EVALUATION = "evaluation.json"
"""What evaluate has measured of a trial's adapter, in the folder of the trial."""
OF_A_RUN = {"out_dir", "resume", "overwrite", "seed"}
"""Settings of finetune_lora that do not tell one sweep from another."""


@dataclass(frozen=True)
class Plan:
    """A sweep whose search space fits its flags."""

    args: SweepArgs
    space: Space
    first: FinetuneLoraArgs
    """The settings of the first combination."""
    metrics: tuple[str, ...]
    """What evaluate reports of each adapter, by name; empty without --evaluate."""

    @classmethod
    def read(cls, args: SweepArgs) -> "Plan":
        """Check every value of a search space and the flags of evaluate; LitLoraError names the one that is wrong."""
        require_optuna()
        space = Space.of(args.search)
        if args.method == "grid":
            space.grid()  # only a check
        first, *_ = [_parsed("--search", finetune_words(args, space, point)) for point in space.values()]
        assert isinstance(first, FinetuneLoraArgs)
        return cls(args, space, first, _metrics(args, first))

    def points(self) -> list[Point] | None:
        """Return the combinations in their order; None where each is drawn after the earlier ones."""
        match self.args.method:
            case "grid":
                return self.space.grid()
            case "random":
                return self.space.draws(self.args.trials)
            case _:
                return None

    def folder(self, number: int) -> Path:
        """Return the run folder of a trial, counted from 0."""
        return self.args.out_dir / f"trial-{number + 1:04d}"

    def training(self, number: int, point: Mapping[str, Value], seed: int) -> list[str]:
        """Return the words of the command that trains a trial, from where it was interrupted if it was."""
        own = {"seed": seed, "out_dir": self.folder(number), "resume": "auto", "overwrite": False, "dry_run": False}
        return [*finetune_words(self.args, self.space, point), *words(own)]

    def evaluation(self, number: int) -> list[str]:
        """Return the words of the command that measures a trial's adapter."""
        return evaluate_words(self.args, self.folder(number), self.first)

    def identity(self) -> dict[str, Any]:
        """Return what tells this study from another one, as JSON holds it."""
        args = self.args
        settings = {name: value for name, value in plain(self.first).items() if name not in OF_A_RUN}
        content = {"search": args.search, "method": args.method, "seeds": args.seeds, "evaluate": args.evaluate}
        found: dict[str, Any] = json.loads(json.dumps(content | {"base": settings}, default=str))
        return found


def require_optuna() -> None:
    """Refuse a sweep without the package that keeps its study."""
    if find_spec("optuna") is None:
        raise LitLoraError("sweep needs optuna: install it with: pip install 'litlora[sweep]'")


def finetune_words(args: SweepArgs, space: Space, point: Mapping[str, Value]) -> list[str]:
    """Return the command line of a combination."""
    folders = {"checkpoint_dir": args.checkpoint_dir, "data_dir": args.data_dir}
    given = {name: folder for name, folder in folders.items() if folder is not None}
    return ["finetune_lora", *words(args.base or {}), *words(given), *words(space.settings(point))]


def evaluate_words(args: SweepArgs, folder: Path, first: FinetuneLoraArgs) -> list[str]:
    """Return the command line that measures the adapter of a trial on its validation rows, unless told otherwise."""
    own = {"checkpoint_dir": folder / FINAL, "out_file": folder / EVALUATION}
    return ["evaluate", *words({"data_dir": first.data_dir}), *words(args.evaluate or {}), *words(own)]


def _metrics(args: SweepArgs, first: FinetuneLoraArgs) -> tuple[str, ...]:
    if args.evaluate is None:
        return ()
    parsed = _parsed("--evaluate", evaluate_words(args, args.out_dir, first))
    assert isinstance(parsed, EvaluateArgs)
    if parsed.tasks:
        raise LitLoraError("--evaluate: tasks take too long for each trial: give data_dir and metrics")
    return tuple(parsed.reported)


def _parsed(flag: str, arguments: Sequence[str]) -> object:
    try:
        call = parse(arguments)
    except LitLoraError as error:
        raise LitLoraError(f"{flag}: {error}", error.exit_code) from error
    assert isinstance(call, Call)
    return call.args
