"""The HTML page of a run: one file that needs no network, drawn from metrics.csv, the settings and report.json."""

import csv
import math
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from litlora.report.chart import Curve, line_chart, smoothed
from litlora.report.template import TEMPLATE

PAGE = "report.html"
Row = Mapping[str, float]
FIGURES = {
    "start_val_loss": "validation loss before",
    "val_loss": "validation loss after",
    "val_perplexity": "validation perplexity",
    "train_loss": "training loss of the last epoch",
    "steps": "steps",
    "tokens": "tokens",
    "supervised_tokens": "supervised tokens",
    "seconds": "seconds of training",
    "tokens_per_second": "tokens/s",
    "peak_memory_gb": "peak memory, GB",
    "trainable_parameters": "trainable parameters",
    "frozen_parameters": "frozen parameters",
}
"""Figures of report.json that the page shows, by what it calls them."""


def read_metrics(text: str) -> list[Row]:
    """Return the numbers in each row of a metrics.csv; what is empty or no finite number is left out."""
    return [
        {name: number for name, value in row.items() if math.isfinite(number := _number(value))}
        for row in csv.DictReader(StringIO(text))
    ]


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return math.nan


def page(title: str, settings: Mapping[str, Any], metrics: Sequence[Row], report: Mapping[str, Any]) -> str:
    """Return the page of a run with these settings that differ from the defaults, metrics and figures."""
    loss = curve(metrics, "loss")
    losses = [
        Curve("training", "raw", loss),
        Curve("training, smoothed", "smooth", smoothed(loss)),
        Curve("validation", "val", curve(metrics, "val_loss")),
    ]
    by_source = report.get("val_loss_by_source") or {}
    figures = [(name, shown(report[key])) for key, name in FIGURES.items() if report.get(key) is not None]
    figures += [(f"validation loss of {source}", shown(loss)) for source, loss in by_source.items()]
    return Environment(autoescape=True).from_string(TEMPLATE).render(
        title=title,
        adapter=report["adapter"],
        warning=report["warning"],
        loss=Markup(line_chart(losses)),
        rate=Markup(line_chart([Curve("learning rate", "smooth", curve(metrics, "learning_rate"))])),
        figures=figures,
        settings=settings,
        findings=report["findings"],
        versions=report["versions"],
    )  # fmt: skip


def curve(metrics: Sequence[Row], column: str) -> list[tuple[float, float]]:
    """Return a column over the steps."""
    return [(row["step"], row[column]) for row in metrics if "step" in row and column in row]


def shown(value: float) -> str:
    """Return a figure as the page shows it."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"


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
