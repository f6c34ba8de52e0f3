"""The results of `evaluate`: metrics with intervals, as JSON and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litlora.args.inference import EvaluateArgs
from litlora.evaluation.intervals import Estimate, Statistic, difference, estimate
from litlora.evaluation.metrics import confusion_matrix, matches, mean, perplexity, ratio, rouge, weighted_f1
from litlora.evaluation.rows import Comparison, Row, Subject
from litlora.evaluation.scoring import Scores

LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True)
class Results:
    """The metrics of a model, and what they are computed from."""

    metrics: dict[str, Estimate]
    baseline: dict[str, Estimate]
    """The metrics of the baseline; empty without one."""
    differences: dict[str, Estimate]
    """By how much the model's metrics exceed the baseline's."""
    confusion: NDArray[np.int64] | None
    details: dict[str, Any]
    """The rest of the JSON file."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as one JSON object."""
        content = {"metrics": _plain(self.metrics), **self.details}
        if self.baseline:
            content["baseline"] |= {"metrics": _plain(self.baseline), "differences": _plain(self.differences)}
        if self.confusion is not None:
            content["confusion_matrix"] = self.confusion.tolist()
        return content

    def failures(self, thresholds: Mapping[str, float]) -> list[str]:
        """Say which metrics are worse than they may be."""
        found = []
        for name, limit in thresholds.items():
            value, lower = self.metrics[name].value, name in LOWER_IS_BETTER
            if value > limit if lower else not value >= limit:
                found.append(f"{name} is {value:.4f}, {'above' if lower else 'below'} {limit:g}")
        return found


def results(args: EvaluateArgs, comparison: Comparison, scores: Scores, baseline: Scores | None) -> Results:
    """Compute the metrics of the model, of the baseline if there is one, and their differences, with intervals."""
    rows = comparison.rows
    own, other = statistics(args, rows, scores), statistics(args, rows, baseline) if baseline else {}
    named = {"own": own, "baseline": other, "difference": {name: difference(own[name], other[name]) for name in other}}
    flat = {(kind, name): each for kind, group in named.items() for name, each in group.items()}
    estimates = estimate(flat, len(rows), args.seed)
    measured, base, change = ({name: estimates[kind, name] for name in group} for kind, group in named.items())
    confusion = None
    if args.choices:
        confusion = confusion_matrix(expected_choices(args, rows), predicted_choices(scores), len(args.choices))
    return Results(measured, base, change, confusion, details(args, comparison, scores, baseline))


def statistics(args: EvaluateArgs, rows: Sequence[Row], scores: Scores) -> dict[str, Statistic]:
    """Return what is reported, by name, as functions of how often each row counts."""
    found: dict[str, Statistic] = {}
    answers = [row.answer for row in rows]
    if "loss" in args.metrics:
        found["loss"] = ratio(scores.losses, scores.tokens)
        found["perplexity"] = perplexity(scores.losses, scores.tokens)
    if "exact_match" in args.metrics:
        found["exact_match"] = mean(matches(answers, scores.completions))
    if "rouge" in args.metrics:
        found |= {name: mean(values) for name, values in rouge(answers, scores.completions).items()}
    if "accuracy" in args.metrics:
        expected, predicted = expected_choices(args, rows), predicted_choices(scores)
        found["accuracy"] = mean(np.equal(expected, predicted))
        found["weighted_f1"] = weighted_f1(expected, predicted, len(args.choices))
    return found


def expected_choices(args: EvaluateArgs, rows: Sequence[Row]) -> list[int]:
    """Return the choice that each row expects, by its position."""
    choices = [choice.strip() for choice in args.choices]
    return [choices.index(row.answer.strip()) for row in rows]


def predicted_choices(scores: Scores) -> list[int]:
    """Return the likeliest choice of each row, by its position."""
    return [int(choice) for choice in scores.log_likelihoods.argmax(axis=1)]


def details(args: EvaluateArgs, comparison: Comparison, scores: Scores, baseline: Scores | None) -> dict[str, Any]:
    """Return what was measured, and how, beside the metrics."""
    subject, other = comparison.task.subject, comparison.baseline
    content: dict[str, Any] = about(subject) | {"data": str(args.data_dir), "seed": args.seed}
    content |= {"choices": list(args.choices)} if args.choices else {}
    content["rows"] = [_row(args, *each, scores) for each in enumerate(comparison.rows)]
    if other is not None and baseline is not None:
        rows = [_row(args, *each, baseline) for each in enumerate(comparison.rows)]
        content["baseline"] = about(other.subject) | {"rows": rows}
    return content


def about(subject: Subject) -> dict[str, Any]:
    """Return which model was measured."""
    adapters = {str(adapter.folder): adapter.weight for adapter in subject.adapters}
    return {"base": str(subject.base.dir), "adapters": adapters, "prompt_style": subject.settings.name}


def _row(args: EvaluateArgs, n: int, row: Row, scores: Scores) -> dict[str, Any]:
    """Return what was measured for a row."""
    found: dict[str, Any] = {"location": row.location, "expected": row.answer}
    if len(scores.losses):
        found |= {"loss_sum": float(scores.losses[n]), "tokens": int(scores.tokens[n])}
    if scores.completions:
        found["completion"] = scores.completions[n]
    if len(scores.log_likelihoods):
        found["log_likelihoods"] = scores.log_likelihoods[n].tolist()
        found["predicted"] = args.choices[predicted_choices(scores)[n]]
    return found


def _plain(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(each) for name, each in metrics.items()}


def samples(args: EvaluateArgs, comparison: Comparison, scores: Scores) -> list[str]:
    """Return the lines that show the first rows: question, expected answer and the model's."""
    lines = []
    for n, row in enumerate(comparison.rows[: args.show]):
        measured = _row(args, n, row, scores)
        answers = [measured[key].strip() for key in ("completion", "predicted") if key in measured]
        lines += [f"  {row.question}", f"    expected: {row.answer}", *(f"    answered: {each}" for each in answers)]
    return lines


def table(results: Results) -> list[str]:
    """Return the metrics as lines of aligned columns."""
    heads = ["metric", "value", "95 % interval"]
    lines = [[name, *_cells(each)] for name, each in results.metrics.items()]
    if results.baseline:
        heads += ["baseline", "difference", "95 % interval"]
        for line, base, change in zip(lines, results.baseline.values(), results.differences.values(), strict=True):
            line += [_cells(base)[0], *_cells(change, "+")]
    return aligned([heads, *lines])


def task_table(metrics: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Return the metrics of tasks as lines of aligned columns."""
    lines = []
    for name, each in metrics.items():
        low, high = each["low"], each["high"]
        lines.append([name, f"{each['value']:.4f}", "" if low is None or high is None else f"{low:.4f} to {high:.4f}"])
    return aligned([["metric", "value", "95 % interval"], *lines])


def confusion_table(choices: Sequence[str], counts: NDArray[np.int64]) -> list[str]:
    """Return a confusion matrix as lines of aligned columns."""
    heads = ["expected \\ answered", *choices]
    return aligned([heads, *([choice, *map(str, row)] for choice, row in zip(choices, counts.tolist(), strict=True))])


def _cells(each: Estimate, sign: str = "") -> tuple[str, str]:
    return f"{each.value:{sign}.4f}", f"{each.low:{sign}.4f} to {each.high:{sign}.4f}"


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, the first column aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
