"""The HTML page of a sweep: its table, and the validation losses of each combination over the seeds."""

from collections.abc import Sequence

from jinja2 import Environment
from markupsafe import Markup, escape

PAGE = "sweep.html"
WIDTH, ROW, LEFT = 460, 24, 170
TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #666b73; --page: #fff; --line: #dcdfe4; --a: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --soft: #9aa0a9; --page: #16181c; --line: #33373e;
  --a: #7aa2ff; } }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
svg { width: 100%; max-width: 38rem; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
svg line { stroke: var(--line); } svg circle { fill: var(--a); opacity: .6; }
svg .mean { stroke: var(--a); stroke-width: 2; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap;
  font-variant-numeric: tabular-nums; font-weight: 400; }
td:not(:first-child), th:not(:first-child) { text-align: right; }
th { color: var(--soft); }
.key { color: var(--soft); }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<h2>Validation loss</h2>
<p class="key">a dot for each seed, a line at the mean; the best first</p>
{{ chart }}
<h2>Combinations</h2>
<p class="key">spread: standard deviation over the seeds; above best: the mean difference of equal seeds, with its 95 %
interval</p>
<div class="wide"><table><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for line in lines %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{% if failures %}<h2>Failed trials</h2><ul>{% for each in failures %}<li>{{ each }}</li>{% endfor %}</ul>{% endif %}
</body>
</html>
"""


def sweep_page(
    title: str, table: Sequence[Sequence[str]], losses: Sequence[tuple[str, Sequence[float]]], failures: Sequence[str]
) -> str:
    """Return the page of a sweep with this table, whose head comes first, and the losses of each named combination."""
    head, *lines = table
    chart = Markup(dot_chart([(name, values) for name, values in losses if values]))
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(title=title, head=head, lines=lines, chart=chart, failures=failures)


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
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
