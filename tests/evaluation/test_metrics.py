"""Metrics equal those of rouge-score and scikit-learn, and intervals cover what they estimate."""

from collections import Counter

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from litlora.evaluation import metrics
from litlora.evaluation.intervals import CHUNK, difference, estimate, resamples

CASES, ROWS = 1000, 300
TEXTS = [
    ("The cat sat on the mat.", "A cat sat on a mat"),
    ("elppa", "elppa"),
    ("Police killed the gunman", "the gunman killed police"),
    ("", "nothing was expected"),
    ("one two three four", ""),
    ("Größe 12 ÷ 3", "größe 12 / 3"),
]


def test_rouge_equals_rouge_score():
    ours = metrics.rouge(*zip(*TEXTS, strict=True))
    for name in metrics.ROUGE:
        scorer = RougeScorer([name])
        expected = [scorer.score(*pair)[name].fmeasure for pair in TEXTS]
        assert ours[name] == pytest.approx(expected, abs=1e-6)
    assert ours["rouge1"][1] == 1


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_classification_equals_scikit_learn_for_every_weighting(classes):
    random = np.random.default_rng(classes)
    expected, predicted = random.integers(classes, size=(2, 40))
    predicted[predicted == 0] = 1  # a class that is never predicted has an F1 of 0 / 0
    weights = np.concatenate([np.ones((1, 40)), next(resamples(40, seed=0))])
    f1 = metrics.weighted_f1(expected, predicted, classes)(weights)
    accuracy = metrics.mean(expected == predicted)(weights)
    for weight, ours, share in zip(weights, f1, accuracy, strict=True):
        theirs = f1_score(expected, predicted, average="weighted", sample_weight=weight, zero_division=0)
        assert ours == pytest.approx(theirs, abs=1e-12)
        assert share == pytest.approx(accuracy_score(expected, predicted, sample_weight=weight), abs=1e-12)
    counts = metrics.confusion_matrix(expected, predicted, classes)
    assert (counts == confusion_matrix(expected, predicted, labels=range(classes))).all()


def test_exact_match_ignores_white_space_around():
    assert metrics.matches(["a b", "a", "A"], [" a b\n", "a.", "a"]) == [True, False, False]


def test_loss_is_weighted_by_tokens():
    losses, tokens = [2.0, 30.0], [1, 9]
    loss, perplexity = metrics.ratio(losses, tokens), metrics.perplexity(losses, tokens)
    weights = np.array([[1.0, 1.0], [2.0, 0.0]])
    assert loss(weights) == pytest.approx([3.2, 2.0])
    assert perplexity(weights) == pytest.approx(np.exp([3.2, 2.0]))


def test_resamples_draw_as_many_rows_as_there_are():
    weights = next(resamples(7, seed=3))
    assert weights.shape == (CHUNK, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert len({tuple(row) for row in weights.tolist()}) > 1


def test_rows_without_tokens_make_no_interval_infinite():
    found = estimate({"loss": metrics.ratio([4.0, 0.0, 0.0], [2, 0, 0])}, 3, seed=0)["loss"]
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def simulate(seed: int) -> dict[str, tuple[metrics.Statistic, float]]:
    """Return statistics of random rows, each with the value that it has over infinitely many rows."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 30, size=ROWS)
    losses = tokens * random.gamma(4.0, 0.5, size=ROWS)  # a mean of 2 per token, whatever the length
    expected = random.integers(2, size=ROWS)
    right = random.random(ROWS) < 0.8
    predicted = np.where(right, expected, 1 - expected)
    loss, other = (
        metrics.ratio(losses, tokens),
        metrics.ratio(losses - tokens * random.normal(0.1, 1, size=ROWS), tokens),
    )
    return {
        "loss": (loss, 2.0),
        "accuracy": (metrics.mean(right), 0.8),
        "weighted_f1": (metrics.weighted_f1(expected, predicted, 2), 0.8),
        "difference": (difference(loss, other), 0.1),
    }


def test_intervals_cover_the_true_value():
    """In at least 93 of 100 cases; each case has other rows of data, and all have the same resamples."""
    cases = {(name, seed): case for seed in range(CASES) for name, case in simulate(seed).items()}
    found = estimate({key: statistic for key, (statistic, _) in cases.items()}, ROWS, seed=0)
    covered = Counter(name for (name, seed), (_, true) in cases.items()
                      if found[name, seed].low <= true <= found[name, seed].high)  # fmt: skip
    assert len(covered) == 4
    assert min(covered.values()) >= 0.93 * CASES, covered
    assert max(covered.values()) <= 0.98 * CASES, covered
