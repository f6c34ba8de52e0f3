"""What a run leaves for its report: settings, metrics, samples and figures, read without torch."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Self

from litlora.args.common import plain
from litlora.args.finetune import FinetuneLoraArgs
from litlora.errors import LitLoraError
from litlora.utils.files import read_json, read_yaml

HYPERPARAMETERS, METRICS, SAMPLES = "hyperparameters.yaml", "metrics.csv", "samples.jsonl"
FINAL, REPORT = "final", "report.json"
Row = Mapping[str, float]
Sample = Mapping[str, Any]
TEXTS = ("system", "question", "expected", "completion")


@dataclass(frozen=True)
class RunFiles:
    """The content of a run's files."""

    name: str
    settings: Mapping[str, Any]
    metrics: Sequence[Row]
    samples: Sequence[Sample]
    report: Mapping[str, Any]
    """report.json; empty for a run that has not finished."""

    @classmethod
    def of(cls, out_dir: Path, settings: Mapping[str, Any], report: Mapping[str, Any]) -> Self:
        """Read what lies beside the final adapter."""
        return cls(out_dir.absolute().name, settings, read_metrics(out_dir), read_samples(out_dir), report)

    @classmethod
    def read(cls, out_dir: Path) -> Self:
        """Read all files of a run, finished or not."""
        if not (out_dir / METRICS).is_file():
            hint = "name the --out_dir of a run"
            raise LitLoraError(f"no run in {out_dir} (expected {METRICS}): {hint}")
        report = out_dir / FINAL / REPORT
        return cls.of(out_dir, read_settings(out_dir), read_json(report) if report.is_file() else {})

    @property
    def changed_settings(self) -> dict[str, Any]:
        """The settings that differ from the defaults, by dotted names."""
        return changed(self.settings, defaults())


@contextmanager
def reporting_faults(folders: Sequence[Path]) -> Iterator[None]:
    """Turn an error about an unexpected type or a missing key in the files of runs into a LitLoraError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        names = " or ".join(map(str, folders))
        fault = f"a file of {names} is not as litlora writes it ({error})"
        raise LitLoraError(f"{fault}: restore it") from error


def read_metrics(out_dir: Path) -> list[Row]:
    """Return the numbers in each row of a run's metrics.csv; what is empty or no finite number is left out."""
    path = out_dir / METRICS
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows = csv.DictReader(StringIO(text))
    return [{name: x for name, value in row.items() if math.isfinite(x := _number(value))} for row in rows]


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return math.nan


def read_samples(out_dir: Path) -> list[Sample]:
    """Return the sample completions of a run; a line that is not one, as a killed run may leave, is left out."""
    path = out_dir / SAMPLES
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [sample for line in lines if _is_sample(sample := _parsed(line))]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_sample(value: Any) -> bool:
    numbers = ("step", "row")
    return (
        isinstance(value, dict)
        and all(type(value.get(name)) is int for name in numbers)
        and all(isinstance(value.get(name), str) for name in TEXTS)
    )


def read_settings(out_dir: Path) -> dict[str, Any]:
    """Read the hyperparameters.yaml of a run."""
    content = read_yaml(out_dir / HYPERPARAMETERS)
    return content if isinstance(content, dict) else {}


def defaults() -> dict[str, Any]:
    """Return the default settings of a run; what has none is left out."""
    settings = {field.name: field for field in dataclasses.fields(FinetuneLoraArgs)}
    made = {n: plain(f.default_factory()) for n, f in settings.items() if f.default_factory is not dataclasses.MISSING}
    return made | {n: plain(f.default) for n, f in settings.items() if f.default is not dataclasses.MISSING}


def changed(settings: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings that differ from the defaults, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            found |= changed(value, default, f"{prefix}{name}.")
        elif value != default:
            found[prefix + name] = value
    return found
