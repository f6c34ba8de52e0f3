"""The HTML page that compares runs: their curves over one another, figures side by side, settings that differ."""

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from litlora.report.chart import COLORS, Curve, line_chart, smoothed
from litlora.report.files import Row, RunFiles
from litlora.report.page import FIGURES, curve, figure
from litlora.report.template import render

COMPARED = {"start_val_loss": "validation loss before", "val_loss": "validation loss after", **FIGURES}
BEST: dict[str, Callable[[Sequence[float]], float]] = {
    "val_loss": min, "train_loss": min, "seconds": min, "tokens_per_second": max, "peak_memory_gb": min,
}  # fmt: skip
PLACES = ("out_dir", "quiet")  # which differ of necessity
ABSENT = "–"

BODY = """{% extends "base" %}
{% macro chart(title, drawn, curves) %}{% if drawn %}
<h2>{{ title }}</h2>
<div class="keys">{% for curve in curves %}<span class="key {{ curve.style }}">{{ curve.name }}</span>{% endfor %}</div>
{{ drawn }}{% endif %}{% endmacro %}
{% macro table(rows) %}<div class="scroll"><table class="figures">
<tr><th></th>{% for name in names %}<th class="number">{{ name }}</th>{% endfor %}</tr>
{% for name, cells in rows %}<tr><td>{{ name }}</td>
{% for value, is_best in cells %}<td class="number{{ " best" if is_best }}">{{ value }}</td>
{% endfor %}</tr>{% endfor %}
</table></div>{% endmacro %}
{% block body %}
<h1>{{ title }}</h1>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
{{ chart("Validation loss", validation, validation_curves) }}
{{ chart("Training loss, smoothed", training, training_curves) }}
<h2>Figures</h2>
{{ table(figures) }}
<h2>Settings that differ</h2>
{% if settings %}{{ table(settings) }}{% else %}<p>None.</p>{% endif %}
{% endblock %}
"""


def comparison(runs: Sequence[RunFiles]) -> str:
    """Return the page that compares runs."""
    names = distinct_names([run.name for run in runs])
    training = run_curves(names, [smoothed(curve(run.metrics, "loss")) for run in runs])
    validation = run_curves(names, [curve(run.metrics, "val_loss") for run in runs])
    warnings = [(name, run.report.get("warning")) for name, run in zip(names, runs, strict=True)]
    return render(
        BODY,
        title=f"Comparison of {len(runs)} runs",
        names=names,
        warnings=[f"{name}: {warning}" for name, warning in warnings if warning],
        training=Markup(line_chart(training)),
        training_curves=training,
        validation=Markup(line_chart(validation)),
        validation_curves=validation,
        figures=figures(runs),
        settings=differing(runs),
    )


def distinct_names(names: Sequence[str]) -> list[str]:
    """Return names that differ: a repeated one gets its number."""
    return [f"{name} ({names[: n + 1].count(name)})" if names.count(name) > 1 else name for n, name in enumerate(names)]


def run_curves(names: Sequence[str], curves: Sequence[Sequence[tuple[float, float]]]) -> list[Curve]:
    """Return a curve for each run; from the ninth run on, colours repeat as dashed lines."""
    styles = [f"c{n % COLORS}{' dashed' if n >= COLORS else ''}" for n in range(len(names))]
    return [Curve(*each) for each in zip(names, styles, curves, strict=True) if each[2]]


def figures(runs: Sequence[RunFiles]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return the figures of the runs, a row each, with the best of a row marked."""
    rows = []
    for key, name in COMPARED.items():
        values = [run.report.get(key, last(run.metrics, key)) for run in runs]
        if present := [value for value in values if value is not None]:
            best = BEST[key](present) if key in BEST and len(set(present)) > 1 else None
            rows.append((name, [_cell(key, value, best) for value in values]))
    return rows


def _cell(key: str, value: float | None, best: float | None) -> tuple[str, bool]:
    if value is None:
        return ABSENT, False
    return figure(key, int(value) if key in ("steps", "tokens") else value), value == best


def last(metrics: Sequence[Row], key: str) -> float | None:
    """Return the last value of a column of metrics.csv, for a run that has not finished."""
    column = {"steps": "step", "peak_memory_gb": "memory_gb", "train_loss": "loss"}.get(key, key)
    return next((row[column] for row in reversed(metrics) if column in row), None)


def differing(runs: Sequence[RunFiles]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return the settings in which the runs differ, a row each."""
    settings = [flat(run.settings) for run in runs]
    names = list(dict.fromkeys(name for each in settings for name in each if name not in PLACES))
    rows = [(name, [each.get(name) for each in settings]) for name in names]
    different = [(name, values) for name, values in rows if any(value != values[0] for value in values)]
    return [(name, [(str(value), False) for value in values]) for name, values in different]


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
