"""The HTML page of a sweep: its table, and the validation losses of each combination over the seeds."""

from collections.abc import Sequence

from markupsafe import Markup, escape

from litlora.report.template import render

PAGE = "sweep.html"
WIDTH, ROW, LEFT = 460, 24, 170
BODY = """{% extends "base" %}{% block body %}
<h1>{{ title }}</h1>
<h2>Validation loss</h2>
<p class="soft small">a dot for each seed, a line at the mean; the best first</p>
{{ chart }}
<h2>Combinations</h2>
<p class="soft small">spread: standard deviation over the seeds; above best: the mean difference of equal seeds, with
its 95 % interval</p>
<div class="scroll"><table class="figures">
<tr>{% for name in head %}<th{% if not loop.first %} class="number"{% endif %}>{{ name }}</th>{% endfor %}</tr>
{% for line in lines %}
<tr>{% for cell in line %}<td{% if not loop.first %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% if failures %}<h2>Failed trials</h2><ul>{% for each in failures %}<li>{{ each }}</li>{% endfor %}</ul>{% endif %}
{% endblock %}
"""


def sweep_page(
    title: str, table: Sequence[Sequence[str]], losses: Sequence[tuple[str, Sequence[float]]], failures: Sequence[str]
) -> str:
    """Return the page of a sweep with this table, whose head comes first, and the losses of each named combination."""
    head, *lines = table
    chart = Markup(dot_chart([(name, values) for name, values in losses if values]))
    return render(BODY, title=title, head=head, lines=lines, chart=chart, failures=failures)


def dot_chart(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Return named groups of numbers as an SVG element: a line of dots for each."""
    numbers = [number for _, values in rows for number in values]
    low, high = min(numbers), max(numbers)
    width = (high - low) or abs(high) or 1.0
    height = ROW * (len(rows) + 1)

    def x(value: float) -> float:
        return LEFT + 12 + (value - low) / width * (WIDTH - LEFT - 36)

    parts = [
        f'<text x="{x(value):.1f}" y="{height - 6}" text-anchor="middle">{value:.4g}</text>'
        for value in {low, (low + high) / 2, high}
    ]
    for line, (name, values) in enumerate(rows):
        y = ROW * line + ROW / 2
        mean = x(sum(values) / len(values))
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{escape(name[:28])}</text>')
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{y}" y2="{y}"/>')
        parts.append(f'<line class="mean" x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 8}" y2="{y + 8}"/>')
        parts += [f'<circle cx="{x(value):.1f}" cy="{y}" r="4"/>' for value in values]
    return f'<svg class="dots" viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
