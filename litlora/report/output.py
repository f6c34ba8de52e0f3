"""Writing a run's page and plot."""

import importlib
from collections.abc import Callable
from pathlib import Path

from litlora.report.files import RunFiles
from litlora.report.page import curve, loss_curves, page
from litlora.utils.console import warn

PAGE, PLOT = "report.html", "loss.png"
LEAST_STEPS = 6
"""A run of fewer logged steps has no curve to look at, and need not wait until matplotlib is imported."""


def write_report(run: RunFiles, folder: Path) -> None:
    """Write the page and the plot of a run into the folder of its final adapter; no adapter is lost because of them."""
    _attempt(folder / PAGE, lambda: page(run).encode(errors="backslashreplace"))
    if len(curve(run.metrics, "loss")) >= LEAST_STEPS:
        _attempt(folder / PLOT, lambda: draw(run))


def draw(run: RunFiles) -> bytes:
    """Return the plot of a run's loss."""
    plot = importlib.import_module("litlora.report.plot")  # which imports matplotlib
    png: bytes = plot.loss_plot(run.name, loss_curves(run.metrics))
    return png


def _attempt(path: Path, content: Callable[[], bytes]) -> None:
    try:
        made = content()
    except Exception as error:
        warn(f"{path.name} is not written: {' '.join(str(error).split())}")
        return
    path.write_bytes(made)
