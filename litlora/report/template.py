"""The look of the pages: one style, light or dark as the reader has it, and the frame around a body."""

from functools import cache

from jinja2 import DictLoader, Environment, Template
from markupsafe import Markup

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --page: #ffffff; --card: #f6f8fa; --line: #d8dee4;
  --c0: #1f6feb; --c1: #c4470c; --c2: #1a7f37; --c3: #8250df; --c4: #b8387a; --c5: #0e7c86; --c6: #7d6300;
  --c7: #57606a; --note: #fff1dc; --noteline: #d9822b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --page: #0f1318; --card: #181d24;
  --line: #303842; --c0: #79b0ff; --c1: #ffa16b; --c2: #6bd68a; --c3: #c4a2ff; --c4: #ff9ac8; --c5: #5fd3dd;
  --c6: #e3c75a; --c7: #aeb6bf; --note: #33240f; --noteline: #d9822b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
p { margin: .35rem 0; } .soft { color: var(--soft); } small, .small { font-size: .875rem; }
.warning { background: var(--note); border-left: 4px solid var(--noteline); padding: .6rem .9rem;
  border-radius: .3rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .55rem .8rem; }
.tile:first-child { grid-column: span 2; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; line-height: 1.35; }
.tile span { color: var(--soft); font-size: .875rem; }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .875rem; color: var(--soft); margin: 0 0 .4rem; }
.key::before { content: ""; display: inline-block; width: 1.1rem; height: .2rem; border-radius: .1rem;
  margin-right: .4rem; vertical-align: .2rem; background: currentColor; }
.plot { position: relative; height: 17rem; margin: .6rem .6rem 2.1rem 3.6rem; }
.plot.low { height: 9rem; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot span { position: absolute; color: var(--soft); font-size: .8125rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.plot .y { right: 100%; transform: translateY(-50%); padding-right: .5rem; }
.plot .x { top: 100%; transform: translateX(-50%); padding-top: .35rem; }
svg * { vector-effect: non-scaling-stroke; }
svg .grid { stroke: var(--line); stroke-width: 1; fill: none; }
polyline { fill: none; stroke: currentColor; stroke-width: 2.25; stroke-linejoin: round; }
.dot { stroke: currentColor; stroke-width: 7; stroke-linecap: round; fill: none; }
.bar { fill: var(--c0); }
.dots { width: 100%; max-width: 38rem; height: auto; } .dots text { fill: var(--soft); font-size: 12px; }
.dots line { stroke: var(--line); } .dots circle { fill: var(--c0); opacity: .6; }
.dots .mean { stroke: var(--c0); stroke-width: 2; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.smooth { color: var(--c0); } .val { color: var(--c1); } .raw { color: var(--c0); }
g.raw { opacity: .35; } g.raw polyline { stroke-width: 1.25; } .key.raw { opacity: .6; }
.dashed polyline { stroke-dasharray: 6 4; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
.scroll .sides { min-width: 14rem; margin: 0; gap: 0 1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .875rem; }
.number, .pairs td:last-child { text-align: right; }
.number { width: 1%; white-space: nowrap; }
.counts .number { width: auto; }
.figures { width: auto; min-width: min(100%, 36rem); }
.best { font-weight: 700; color: var(--c2); }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem;
  margin: .75rem 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .75rem; margin-top: .5rem; }
.side { border-top: 3px solid var(--line); padding-top: .35rem; } .side.after { border-color: var(--c0); }
.label { color: var(--soft); font-size: .8125rem; display: block; }
.text { white-space: pre-wrap; margin: 0 0 .4rem; }
"""

BASE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""


def render(body: str, **values: object) -> str:
    """Return a page: the template of a body, which extends `base` by its block `body`, with values."""
    return _compiled(body).render(style=Markup(STYLE), **values)


@cache
def _compiled(body: str) -> Template:
    environment = Environment(loader=DictLoader({"base": BASE}), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(body)
