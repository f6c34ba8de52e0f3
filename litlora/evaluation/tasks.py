"""The tasks of lm-eval that `evaluate` runs, and their results. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from litlora.args.inference import EvaluateArgs
from litlora.data.prompts.styles import StyleSettings
from litlora.errors import LitLoraError
from litlora.evaluation.rows import Subject
from litlora.utils.files import check_writable

Z = 1.959964  # of a 95 % interval of the normal distribution
STDERR = "_stderr"


@dataclass(frozen=True)
class Benchmark:
    """A model, and the tasks that it is given."""

    subject: Subject
    manager: Any
    """lm-eval's TaskManager, which has read the names of all tasks."""

    @classmethod
    def read(cls, args: EvaluateArgs) -> Self:
        """Find model and tasks, or refuse what there is not; no weights are read."""
        if find_spec("lm_eval") is None:
            raise LitLoraError("--tasks needs lm-eval: install it with: pip install 'litlora[lm-eval]'")
        if args.out_file is not None:
            check_writable(args.out_file.parent, "--out_file")
        return cls(Subject.find(args, None, StyleSettings("none")), find_tasks(args.tasks, args.task_dir))


def find_tasks(names: Sequence[str], task_dir: Path | None) -> Any:
    """Return a TaskManager that knows the tasks; lm-eval's own are read, which takes seconds, only if one is needed."""
    from lm_eval.tasks import TaskManager  # an extra

    own = None if task_dir is None else TaskManager(include_path=str(task_dir), include_defaults=False)
    if own is not None and set(names) <= set(own.all_tasks):
        return own
    manager = TaskManager(include_path=None if task_dir is None else str(task_dir))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        hint = "look it up with: lm-eval ls tasks, or name the folder of its YAML file with --task_dir"
        raise LitLoraError(f"--tasks ({unknown[0]}) is not a task of lm-eval: {hint}")
    return manager


def task_metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return the metrics of lm-eval's results, with intervals of 1.96 standard errors where it gives these."""
    found: dict[str, dict[str, float | None]] = {}
    for task, measured in results.items():
        for key, value in measured.items():
            name, _, how = key.partition(",")
            if isinstance(value, float | int) and how and not name.endswith(STDERR):
                error = measured.get(f"{name}{STDERR},{how}")
                margin = Z * error if isinstance(error, float) else None
                low, high = (None, None) if margin is None else (value - margin, value + margin)
                label = f"{task}/{name}" if how == "none" else f"{task}/{name}/{how}"
                found[label] = {"value": value, "low": low, "high": high}
    return found
