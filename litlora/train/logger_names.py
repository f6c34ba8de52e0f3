"""Which packages the loggers of --logger_name need; neither they nor torch are imported here."""

from collections.abc import Sequence
from importlib.util import find_spec

from litlora.errors import LitLoraError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""The package of each logger but csv, which is litlora's own; the extra of litlora has the logger's name."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse a logger whose package is not installed."""
    for name in names:
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            raise LitLoraError(f"--logger_name {name} needs a package: pip install 'litlora[{name}]'")
