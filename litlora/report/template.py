"""The template of the page; colours follow the reader's light or dark scheme."""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #666b73; --page: #fff; --line: #dcdfe4; --a: #2563eb;
  --b: #d9480f; --note: #fff4e5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --soft: #9aa0a9; --page: #16181c; --line: #33373e;
  --a: #7aa2ff; --b: #ff9b62; --note: #3a2a17; } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 13px; }
svg .grid { stroke: var(--line); } polyline { fill: none; stroke-width: 2; }
.raw polyline { stroke: var(--a); opacity: .35; stroke-width: 1; } .raw circle { fill: var(--a); opacity: .35; }
.smooth polyline { stroke: var(--a); } .smooth circle { fill: var(--a); }
.val polyline { stroke: var(--b); } .val circle { fill: var(--b); }
.key { color: var(--soft); } .key b { color: var(--a); } .key b.other { color: var(--b); }
table { border-collapse: collapse; width: 100%; } td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.warning { background: var(--note); padding: .75rem 1rem; border-radius: .4rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ adapter }}</p>
{% if warning %}<p class="warning">{{ warning }}</p>{% endif %}
<h2>Loss</h2>
<p class="key"><b>training</b> (faint: each step, bold: smoothed), <b class="other">validation</b>; over steps</p>
{{ loss }}
<h2>Learning rate</h2>
{{ rate }}
<h2>Figures</h2>
<table>{% for name, value in figures %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Settings that differ from the defaults</h2>
<table>{% for name, value in settings.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Findings in the data</h2>
{% if findings %}<ul>{% for finding in findings %}<li>{{ finding.severity }}: {{ finding.count }}
{{ "row" if finding.count == 1 else "rows" }} {{ finding.description }}, the first at {{ finding.first }}:
{{ finding.consequence }}</li>{% endfor %}</ul>{% else %}<p>None.</p>{% endif %}
<p class="key">{% for name, version in versions.items() %}
{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}</p>
</body>
</html>
"""
