"""The metrics of `evaluate`, as statistics of what was measured for each row. Imports no torch."""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import ArrayLike, NDArray

from litlora.errors import LitLoraError
from litlora.evaluation.intervals import Floats, Statistic

ROUGE = ("rouge1", "rouge2", "rougeL")


def mean(values: ArrayLike) -> Statistic:
    """Return the mean of a number of each row."""
    return ratio(values, np.ones(np.shape(values)))


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Statistic:
    """Return the ratio of two sums over the rows: of losses and tokens, the mean over tokens."""
    parts, wholes = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)

    def statistic(weights: Floats) -> Floats:
        part, whole = weights @ parts, weights @ wholes
        quotient: Floats = np.divide(part, whole, out=np.full(len(weights), np.nan), where=whole > 0)
        return quotient

    return statistic


def perplexity(losses: ArrayLike, tokens: ArrayLike) -> Statistic:
    """Return exp of the mean loss over the tokens."""
    loss = ratio(losses, tokens)
    return lambda weights: np.exp(loss(weights))


def weighted_f1(expected: Sequence[int], predicted: Sequence[int], classes: int) -> Statistic:
    """Return the mean F1 of the classes, weighted by how often each is expected; an F1 of 0 / 0 counts as 0."""
    cells = np.eye(classes * classes)[np.asarray(expected) * classes + np.asarray(predicted)]  # (rows, classes^2)

    def statistic(weights: Floats) -> Floats:
        counts = (weights @ cells).reshape(-1, classes, classes)
        hits, support, chosen = np.einsum("ncc->nc", counts), counts.sum(2), counts.sum(1)
        f1 = np.divide(2 * hits, support + chosen, out=np.zeros_like(hits), where=hits > 0)
        return np.asarray((support * f1).sum(1) / support.sum(1))

    return statistic


def confusion_matrix(expected: Sequence[int], predicted: Sequence[int], classes: int) -> NDArray[np.int64]:
    """Count the rows of each expected class (rows) and predicted class (columns)."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (np.asarray(expected), np.asarray(predicted)), 1)
    return matrix


def matches(expected: Sequence[str], completions: Sequence[str]) -> list[bool]:
    """Tell which completions equal the expected text, apart from white space around them."""
    return [one.strip() == other.strip() for one, other in zip(expected, completions, strict=True)]


def require_rouge() -> None:
    """Refuse --metrics rouge without the package that computes it."""
    if find_spec("rouge_score") is None:
        raise LitLoraError("--metrics rouge needs rouge-score: install it with: pip install 'litlora[evaluate]'")


def rouge(expected: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
    """Return the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L of each completion, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer  # an extra, which takes seconds

    scorer = RougeScorer(ROUGE, use_stemmer=False)
    scores = [scorer.score(one, other) for one, other in zip(expected, completions, strict=True)]
    return {name: [score[name].fmeasure for score in scores] for name in ROUGE}
