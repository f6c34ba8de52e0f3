"""The HTML page of a run: one file that needs no network, drawn from what the run has left."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from litlora.report.chart import Curve, histogram, line_chart, smoothed
from litlora.report.files import Row, RunFiles, Sample
from litlora.report.rows import texts_of
from litlora.report.template import render

FIGURES = {
    "train_loss": "training loss, last epoch",
    "steps": "steps",
    "tokens": "tokens",
    "seconds": "time of the steps",
    "tokens_per_second": "tokens/s",
    "peak_memory_gb": "peak memory",
    "trainable_parameters": "trainable parameters",
}
"""Figures of report.json that the pages show, by what they call them."""
TILES = {**FIGURES, "frozen_parameters": "frozen parameters"}

BODY = """{% extends "base" %}
{% macro table(rows) %}<table class="pairs">{% for name, value in rows %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>{% endmacro %}
{% macro text(label, value) %}{% if value %}
<span class="label">{{ label }}</span><p class="text">{{ value }}</p>{% endif %}{% endmacro %}
{% block body %}
<h1>{{ title }}</h1>
{% if report.adapter %}<p class="soft">{{ report.adapter }}</p>{% endif %}
{% if not report %}<p class="warning">This run has not finished.</p>{% endif %}
{% if report.warning %}<p class="warning">{{ report.warning }}</p>{% endif %}
<div class="tiles">{% for name, value in tiles %}
<div class="tile"><span>{{ name }}</span><b>{{ value }}</b></div>{% endfor %}</div>
{% if loss %}
<h2>Loss</h2>
<div class="keys">{% for curve in curves %}<span class="key {{ curve.style }}">{{ curve.name }}</span>{% endfor %}</div>
{{ loss }}
<h2>Learning rate</h2>
{{ rate }}
{% endif %}
{% if sources %}<h2>Validation loss by source</h2>{{ table(sources) }}{% endif %}
{% if samples %}
<h2>Samples</h2>
{% for sample in samples %}
<div class="sample">
{{ text("system", sample.system) }}{{ text("question", sample.question) }}{{ text("expected", sample.expected) }}
<div class="sides">
{% for name, step, completion in sample.sides %}
<div class="side {{ name }}"><span class="label">{{ name }} training (step {{ step }})</span>
<p class="text">{{ completion or "(nothing)" }}</p></div>
{% endfor %}
</div>
</div>
{% endfor %}
{% endif %}
{% if splits %}
<h2>Data</h2>
<div class="scroll"><table class="counts">
<tr><th></th>{% for name in counted %}<th class="number">{{ name }}</th>{% endfor %}</tr>
{% for split in splits %}<tr><td>{{ split.name }}</td>
{% for value in split.counts %}<td class="number">{{ value }}</td>{% endfor %}</tr>{% endfor %}
</table></div>
{% for split in splits %}{% if split.lengths %}
<h3>Tokens of the rows in {{ split.name }}</h3>
{{ split.lengths }}
{% endif %}{% endfor %}
<h3>Findings</h3>
{% if report.findings %}<ul>{% for finding in report.findings %}<li>{{ finding.severity }}: {{ finding.count }}
{{ "row" if finding.count == 1 else "rows" }} {{ finding.description }}, the first at {{ finding.first }}:
{{ finding.consequence }}</li>{% endfor %}</ul>{% else %}<p>None.</p>{% endif %}
{% endif %}
{% if highest %}
<h2>Training rows with the highest loss after training</h2>
<p class="soft small">Often wrong labels. {{ scored }}, a mean over the supervised tokens of each.</p>
<div class="scroll"><table>
<tr><th class="number">line</th><th class="number">loss</th><th class="number">tokens</th><th>row</th></tr>
{% for row in highest %}<tr><td class="number">{{ row.line }}</td><td class="number">{{ row.loss }}</td>
<td class="number">{{ row.tokens }}</td>
<td>{% if row.texts %}<div class="sides"><div>{{ text("question", row.texts[0]) }}</div>
<div>{{ text("expected", row.texts[1]) }}</div></div>
{% else %}<span class="soft">no longer in the data</span>{% endif %}</td></tr>{% endfor %}
</table></div>
{% endif %}
<h2>Settings that differ from the defaults</h2>
{{ table(settings) }}
{% if report.versions %}<p class="soft small">{% for name, version in report.versions.items() %}
{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}</p>{% endif %}
{% endblock %}
"""


def page(run: RunFiles) -> str:
    """Return the page of a run."""
    report, losses = run.report, loss_curves(run.metrics)
    return render(
        BODY,
        title=run.name,
        report=report,
        tiles=tiles(report),
        curves=losses,
        loss=Markup(line_chart(losses)),
        rate=Markup(low(line_chart([Curve("learning rate", "smooth", curve(run.metrics, "learning_rate"))]))),
        sources=sources(report.get("val_loss_by_source") or {}),
        samples=compared(run.samples),
        counted=list(COUNTED.values()),
        splits=[split(f"{name}.jsonl", counts) for name, counts in (report.get("data") or {}).items()],
        **highest_losses(report.get("highest_losses") or {}, run.settings),
        settings=run.changed_settings.items(),
    )


def low(chart: str) -> str:
    """Return a chart of less height."""
    return chart.replace('class="plot"', 'class="plot low"', 1)


def loss_curves(metrics: Sequence[Row]) -> list[Curve]:
    """Return the curves of the loss."""
    loss = curve(metrics, "loss")
    curves = [
        Curve("training, each step", "raw", loss),
        Curve("training, smoothed", "smooth", smoothed(loss)),
        Curve("validation", "val", curve(metrics, "val_loss")),
    ]
    return [each for each in curves if each.points]


def curve(metrics: Sequence[Row], column: str) -> list[tuple[float, float]]:
    """Return a column over the steps."""
    return [(row["step"], row[column]) for row in metrics if "step" in row and column in row]


def tiles(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of a run, the most important ones first."""
    before, after = report.get("start_val_loss"), report.get("val_loss")
    found = []
    if after is not None:
        found.append(("validation loss", after_before(before, after)))
    if report.get("val_perplexity") is not None:
        found.append(("validation perplexity", shown(report["val_perplexity"])))
    return found + [(name, figure(key, report[key])) for key, name in TILES.items() if report.get(key) is not None]


def after_before(before: float | None, after: float) -> str:
    """Return the validation loss after training, behind that before it."""
    return shown(after) if before is None else f"{shown(before)} → {shown(after)}"


def figure(key: str, value: float) -> str:
    """Return a figure with its unit."""
    if key == "peak_memory_gb":
        return f"{value:.2f} GB"
    return duration(value) if key == "seconds" else shown(value)


def shown(value: float) -> str:
    """Return a number in few digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return a time in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def sources(losses: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the validation losses of the sources, the highest first."""
    numbers = {name: each["loss"] if isinstance(each, Mapping) else each for name, each in losses.items()}
    return [(name, shown(loss)) for name, loss in sorted(numbers.items(), key=lambda pair: -pair[1])]


def compared(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return each sampled row with its first and its last completion."""
    by_row: dict[int, list[Sample]] = {}
    for sample in samples:
        by_row.setdefault(sample["row"], []).append(sample)
    return [{**_ordered(each)[-1], "sides": _sides(_ordered(each))} for _, each in sorted(by_row.items())]


def _ordered(samples: Sequence[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: sample["step"])


def _sides(samples: Sequence[Sample]) -> list[tuple[str, int, str]]:
    first, last = samples[0], samples[-1]
    before = [("before", 0, first["completion"].strip())] if first["step"] == 0 else []
    return before + ([("after", last["step"], last["completion"].strip())] if last["step"] else [])


COUNTED = {
    "rows": "rows",
    "sequences": "sequences",
    "tokens": "tokens",
    "truncated": "truncated",
    "cut_before_response": "dropped, response cut off",
    "unsupervised": "dropped, no response",
}


def split(name: str, counts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts of a split, and the histogram of its lengths."""
    lengths = counts.get("lengths") or {"edges": [], "counts": []}
    chart = low(histogram(lengths["edges"], lengths["counts"], "tokens"))
    return {"name": name, "counts": [f"{counts[key]:,}" for key in COUNTED], "lengths": Markup(chart)}


def highest_losses(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows with the highest losses, with their texts while these are in the data."""
    if not found:
        return {"highest": [], "scored": ""}
    texts = texts_of(Path(str(settings.get("data_dir"))) / "train.jsonl", found["highest"])
    rows = [
        {"line": f"{row['line']:,}", "loss": shown(row["loss"]), "tokens": f"{row['tokens']:,}", "texts": text}
        for row, text in zip(found["highest"], texts, strict=True)
    ]
    of = f"Measured on {found['scored']:,} of {found['rows']:,} rows"
    return {"highest": rows, "scored": of if found["scored"] == found["rows"] else f"{of}, chosen at random"}
