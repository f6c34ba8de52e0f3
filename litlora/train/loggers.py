"""The loggers of --logger_name beside metrics.csv: TensorBoard, Weights & Biases, MLflow, by Lightning's classes."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litlora.utils.console import redacted, warn

PROJECT = "litlora"
"""The W&B project and the MLflow experiment of the runs."""


@dataclass(frozen=True)
class Place:
    """Where a run logs: its folder, and the first step that is new in it."""

    out_dir: Path
    first_step: int


def open_tensorboard(place: Place) -> Any:
    """Log into OUT_DIR/tensorboard; what a killed run has logged beyond the step that it resumes from is dropped."""
    loggers = importlib.import_module("lightning_fabric.loggers")
    return loggers.TensorBoardLogger(place.out_dir, "tensorboard", "", purge_step=place.first_step)


def open_wandb(place: Place) -> Any:
    """Log into OUT_DIR/wandb, offline unless WANDB_MODE says otherwise, and without what W&B knows of the machine."""
    wandb = importlib.import_module("wandb")
    loggers = importlib.import_module("lightning.pytorch.loggers")
    settings = wandb.Settings(
        mode=os.environ.get("WANDB_MODE", "offline"), silent=True, console="off",
        disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True,
    )  # fmt: skip
    return loggers.WandbLogger(name=place.out_dir.name, save_dir=place.out_dir, project=PROJECT, settings=settings)


def open_mlflow(place: Place) -> Any:
    """Log to MLFLOW_TRACKING_URI, or without it into OUT_DIR/mlflow.db."""
    loggers = importlib.import_module("lightning.pytorch.loggers")
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{place.out_dir.absolute() / 'mlflow.db'}")
    return loggers.MLFlowLogger(PROJECT, run_name=place.out_dir.name, tracking_uri=uri)


OPENERS: dict[str, Callable[[Place], Any]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "mlflow": open_mlflow,
}


@dataclass
class Loggers:
    """The open loggers of a run by name; one that fails is closed, and ends no run."""

    opened: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, names: Sequence[str], place: Place, settings: Mapping[str, Any]) -> "Loggers":
        """Open loggers, and log the settings of the run."""
        loggers = cls()
        for name in names:
            if name in OPENERS:
                loggers._attempt(name, lambda name=name: loggers._open(name, place, settings))  # type: ignore[misc]
        return loggers

    def _open(self, name: str, place: Place, settings: Mapping[str, Any]) -> None:
        self.opened[name] = OPENERS[name](place)
        self.opened[name].log_hyperparams(loggable(settings))

    def log(self, values: Mapping[str, float | None]) -> None:
        """Log what was measured at a step."""
        numbers = {name: value for name, value in values.items() if name != "step" and value is not None}
        for name, logger in list(self.opened.items()):
            self._attempt(name, lambda logger=logger: logger.log_metrics(numbers, int(values["step"] or 0)))  # type: ignore[misc]

    def close(self) -> None:
        """Write what is pending."""
        for name, logger in list(self.opened.items()):
            self._attempt(name, lambda logger=logger: logger.finalize("success"))  # type: ignore[misc]

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.opened.pop(name, None)
            warn(f"--logger_name {name} stops logging: {' '.join(str(error).split())}")


def loggable(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted names, texts without secrets."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= loggable(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float) else redacted(str(value))
    return found
