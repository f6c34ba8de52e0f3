"""The report of a finished run: report.json."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np

from litlora.data.batching import Samples
from litlora.data.checks.findings import Finding
from litlora.evaluation.row_losses import RowLosses
from litlora.lora.layer import count
from litlora.models.transformer import GPT
from litlora.report.chart import ticks
from litlora.report.files import REPORT
from litlora.report.output import PLOT
from litlora.report.rows import digests_of
from litlora.train.metrics import peak_memory_gb
from litlora.train.train_state import Progress
from litlora.utils.files import read_json

BINS = 20  # of the histogram of lengths, or a few more, so that their edges are round


@dataclass(frozen=True)
class Report:
    """The figures of a run; losses are means over supervised tokens, in nats."""

    train_loss: float
    """Of the last epoch, as it was trained."""
    val_loss: float | None
    """Of the final adapter; None if its step was not validated."""
    val_loss_by_source: dict[str, float] | None
    """The same for the rows of each source, by its name; None if they have one."""
    val_perplexity: float | None
    steps: int
    supervised_tokens: int
    tokens: int
    seconds: float
    """Of all optimizer steps, without validation and saving."""
    tokens_per_second: float
    peak_memory_gb: float
    trainable_parameters: int
    frozen_parameters: int
    adapter: str
    """What was trained: variant, rank, targets and all that differs from the defaults."""
    versions: dict[str, str]
    findings: list[dict[str, Any]]
    """What the checks of the data found."""
    template_date: str | None
    """The day that the chat template wrote as today's, if it writes one."""
    start_val_loss: float | None
    """Validation loss before the first step; None if it was not measured."""
    warning: str | None
    """What to change where the validation loss ends above its start."""
    data: dict[str, Any]
    """For each split the rows, sequences and tokens, how many were truncated or dropped and why, and a histogram of
    lengths."""
    highest_losses: dict[str, Any] | None
    """The training rows with the highest losses after training, by lines and hashes; None if none was scored."""
    estimated_memory_gb: dict[str, float] | None
    """The parts of the peak memory as they were estimated before the run; their sum is the estimate of the peak."""
    plan: dict[str, Any] | None
    """How memory split a step: the settings, and the GB that it needs by estimate and may have; None if it did not."""
    final: Path | None = field(default=None, compare=False)
    """The folder of the final adapter, with report.html and loss.png; report.json lacks it."""

    @classmethod
    def of(
        cls,
        gpt: GPT,
        progress: Progress,
        val_loss: float | None,
        by_source: dict[str, float],
        adapter: str,
        findings: Sequence[Finding],
        template_date: str | None,
        start_val_loss: float | None,
        rate: float,
        data: dict[str, Any],
        highest_losses: dict[str, Any] | None,
        estimated: Mapping[str, int],
        plan: Mapping[str, Any] | None,
    ) -> Self:
        """Summarize a run whose final adapter has this validation loss."""
        return cls(
            train_loss=progress.train_loss,
            val_loss=val_loss,
            val_loss_by_source=by_source or None,
            val_perplexity=perplexity(val_loss),
            steps=progress.step,
            supervised_tokens=progress.supervised_tokens,
            tokens=progress.tokens,
            seconds=progress.seconds,
            tokens_per_second=progress.tokens / progress.seconds,
            peak_memory_gb=peak_memory_gb(),
            trainable_parameters=count(gpt, trainable=True),
            frozen_parameters=count(gpt, trainable=False),
            adapter=adapter,
            versions={package: version(package) for package in ("litlora", "torch", "bitsandbytes")},
            findings=[asdict(finding) for finding in findings],
            template_date=template_date,
            start_val_loss=start_val_loss,
            warning=divergence(start_val_loss, val_loss, rate),
            data=data,
            highest_losses=highest_losses,
            estimated_memory_gb={part: size / 1e9 for part, size in estimated.items()},
            plan=None if plan is None else dict(plan),
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the report in the folder of a final adapter; figures that it lacks are None."""
        content = read_json(folder / REPORT)
        figures: dict[str, Any] = {field.name: content.get(field.name) for field in fields(cls)}
        return cls(**(figures | {"final": folder}))

    def figures(self) -> dict[str, Any]:
        """Return all figures by name, as report.json has them."""
        figures = asdict(self)
        del figures["final"]
        return figures

    def write(self, folder: Path) -> None:
        """Write the report into the folder of a final adapter."""
        (folder / REPORT).write_text(json.dumps(self.figures(), indent=2) + "\n", encoding="utf-8")

    def _repr_png_(self) -> bytes | None:
        """Return the plot of the loss, which a notebook shows where a cell ends with the report."""
        plot = self.final / PLOT if self.final else None
        return plot.read_bytes() if plot and plot.is_file() else None


def counts_of(samples: Samples) -> dict[str, Any]:
    """Return what a split holds, and what of it is trained on."""
    edges = ticks(0, max(int(samples.lengths.max()), BINS), BINS, outside=True)
    counts, _ = np.histogram(samples.lengths, edges)
    return {
        "rows": samples.rows,
        "sequences": len(samples) + samples.dropped,
        "tokens": int(samples.lengths.sum()),
        "truncated": samples.truncated,
        "cut_before_response": samples.dropped - samples.unsupervised,
        "unsupervised": samples.unsupervised,
        "lengths": {"edges": edges, "counts": counts.tolist()},
    }


def losses_with_digests(losses: RowLosses, path: Path) -> dict[str, Any]:
    """Return the highest losses with a hash of each line, by which the page tells whether the line has changed."""
    digests = digests_of(path, {row.line for row in losses.highest})
    highest = [asdict(row) | {"sha256": digests.get(row.line, "")} for row in losses.highest]
    return asdict(losses) | {"highest": highest}


def divergence(before: float | None, after: float | None, rate: float) -> str | None:
    """Return what to change if the validation loss has ended above its start, else None."""
    if before is None or after is None or after <= before:
        return None
    fault = f"the validation loss ends at {after:.4f}, above the {before:.4f} before the first step"
    return f"{fault}: lower --train.learning_rate ({rate:g})"


def perplexity(loss: float | None) -> float | None:
    """Return e to the power of a loss, or None where there is none or no float is as large."""
    return None if loss is None or loss > math.log(sys.float_info.max) else math.exp(loss)
