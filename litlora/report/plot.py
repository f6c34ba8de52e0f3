"""The plot of a run's loss as a picture, for places that show no HTML: final/loss.png."""

from collections.abc import Sequence
from io import BytesIO

from matplotlib.figure import Figure

from litlora.report.chart import Curve

COLORS = {"raw": "#9dc1f9", "smooth": "#1f6feb", "val": "#c4470c"}
"""Those of the page in its light scheme."""
WIDTHS = {"raw": 0.8, "smooth": 1.8, "val": 1.8}


def loss_plot(title: str, curves: Sequence[Curve]) -> bytes:
    """Return the curves of the loss as a PNG of 900 x 480 pixels."""
    figure = Figure(figsize=(7.5, 4), dpi=120)
    axes = figure.add_subplot(title=title.replace("$", r"\$"), xlabel="step", ylabel="loss")
    for curve in curves:
        xs, ys = zip(*curve.points, strict=True)
        marker = "o" if len(xs) <= 20 else None
        axes.plot(xs, ys, marker=marker, markersize=3, label=curve.name, color=COLORS[curve.style],
                  linewidth=WIDTHS[curve.style])  # fmt: skip
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.12, top=0.91)
    png = BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
