"""Measures of a classifier, values in, values out: AUC with DeLong's interval, two-class and five-grade measures.

Labels and decisions are integers, 1 being the positive class ("unhealthy", "pathological"); scores are finite floats,
higher meaning more positive. A measure whose denominator is zero is None (null in JSON), never 0. All intervals are
95 % ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_curve

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile


@dataclass(frozen=True, slots=True)
class AUC:
    """Area under the ROC curve with DeLong's variance and the 95 % interval [low, high] (see `auc`)."""

    value: float
    low: float | None
    high: float | None
    variance: float | None

    def __str__(self) -> str:
        """`0.893 (0.816-0.941)`, with an en dash; without its bracket where no interval exists."""
        return f"{self.value:.3f}" + ("" if self.low is None else f" ({self.low:.3f}–{self.high:.3f})")


def auc(labels: ArrayLike, scores: ArrayLike) -> AUC:
    """Area under the ROC curve of `labels` (n,) 0/1 and `scores` (n,) finite, ties counting one half.

    The variance is that of DeLong, DeLong and Clarke-Pearson (1988), computed from midranks in O(n log n) as in Sun and
    Xu (2014). The interval is symmetric on the logit scale, hence never outside [0, 1].

    Where the data say nothing about the spread there is no interval, and `low` and `high` are None: when the variance
    is zero (AUC exactly 0 or 1, or every score tied), for an interval of width zero would claim certainty, and when a
    class has a single sample, so that the variance itself is undefined and None.

    Raises ValueError when one of the classes is missing, or a score is not finite.
    """
    labels, scores = _labels_and_scores(labels, scores)
    positive, negative = scores[labels == 1], scores[labels == 0]
    m, n = len(positive), len(negative)
    ranks = _midranks(np.concatenate([positive, negative]))
    # How many negatives each positive beats, and how many positives each negative loses to: multiples of one half, so
    # that their sums are exact and a variance of zero comes out as zero.
    beaten = ranks[:m] - _midranks(positive)
    lost_to = m - (ranks[m:] - _midranks(negative))
    value = float(beaten.sum() / (m * n))
    if m == 1 or n == 1:
        return AUC(value, None, None, None)
    variance = float(beaten.var(ddof=1) / (m * n**2) + lost_to.var(ddof=1) / (n * m**2))
    if variance == 0:
        return AUC(value, None, None, 0.0)
    centre = math.log(value / (1 - value))
    reach = Z_95 * math.sqrt(variance) / (value * (1 - value))
    return AUC(value, _logistic(centre - reach), _logistic(centre + reach), variance)


def roc_points(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """The ROC curve's corners from (0, 0) to (1, 1): false positive rates, true positive rates, thresholds, each (k,).

    A sample is called positive when its score reaches the threshold; the first threshold is infinity (nothing is).
    Raises ValueError as `auc` does.
    """
    false_positive_rate, true_positive_rate, thresholds = roc_curve(*_labels_and_scores(labels, scores))
    return false_positive_rate, true_positive_rate, thresholds


def binary_measures(labels: ArrayLike, decisions: ArrayLike) -> dict[str, float | int | None]:
    """Sensitivity, specificity, ppv, npv, accuracy, Cohen's kappa and the four counts of 0/1 `labels` and `decisions`.

    Each proportion p comes with its Wilson interval as `p_low` and `p_high`. A measure without a denominator
    (sensitivity with no positive label, kappa where everything falls in one cell) is None, its interval too.
    """
    (tn, fp), (fn, tp) = confusion_matrix(labels, decisions, classes=(0, 1)).tolist()
    measures: dict[str, float | int | None] = {}
    for name, successes, trials in (
        ("sensitivity", tp, tp + fn),
        ("specificity", tn, tn + fp),
        ("ppv", tp, tp + fp),
        ("npv", tn, tn + fn),
        ("accuracy", tp + tn, tp + tn + fp + fn),
    ):
        measures[name] = successes / trials if trials else None
        measures[f"{name}_low"], measures[f"{name}_high"] = wilson(successes, trials) or (None, None)
    measures["kappa"] = quadratic_weighted_kappa(labels, decisions, classes=(0, 1))  # two classes: Cohen's kappa
    return measures | {"true_positives": tp, "false_negatives": fn, "true_negatives": tn, "false_positives": fp}


def wilson(successes: int, trials: int) -> tuple[float, float] | None:
    """Wilson's (1927) 95 % score interval of the proportion `successes / trials`; None when `trials` is 0."""
    if not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} must lie in [0, trials={trials}]")
    if not trials:
        return None
    share, square = successes / trials, Z_95**2 / trials
    centre = share + square / 2
    reach = math.sqrt(square * (share * (1 - share) + square / 4))
    # At the ends of the scale the bound is exactly 0 or 1, which rounding would miss.
    low = 0.0 if successes == 0 else (centre - reach) / (1 + square)
    high = 1.0 if successes == trials else (centre + reach) / (1 + square)
    return low, high


def confusion_matrix(labels: ArrayLike, decisions: ArrayLike, classes: Sequence[int]) -> Integers:
    """Counts (k, k), rows labels, columns decisions, both in the order of `classes`.

    Raises ValueError for a label or decision that is not among `classes`, which are never dropped in silence.
    """
    rows, columns = _pair(labels, decisions)
    k = len(classes)
    cells = _positions("label", rows, classes) * k + _positions("decision", columns, classes)
    counts = np.bincount(cells, minlength=k * k)
    return counts.reshape(k, k).astype(np.int64)


def quadratic_weighted_kappa(labels: ArrayLike, decisions: ArrayLike, classes: Sequence[int]) -> float | None:
    """Cohen's (1968) kappa with weights (i - j)^2, i and j being positions in `classes`; for two classes Cohen's kappa.

    1 is full agreement, 0 what chance gives. None where chance alone leaves nothing to disagree about: all labels and
    all decisions are one class. Raises ValueError as `confusion_matrix` does.
    """
    observed = confusion_matrix(labels, decisions, classes)
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0)) / observed.sum()
    position = np.arange(len(classes))
    weights = (position[:, None] - position) ** 2
    chance = (weights * expected).sum()
    return float(1 - (weights * observed).sum() / chance) if chance else None


def within_one_grade(labels: ArrayLike, decisions: ArrayLike) -> float:
    """Share of decisions at most one grade from the label, in [0, 1]."""
    grades, decided = _pair(labels, decisions)
    return float(np.mean(np.abs(grades - decided) <= 1))


def by_grade(grades: ArrayLike, decisions: ArrayLike, grade_count: int = 5) -> Integers:
    """Counts (2, grade_count) as in paper A's Table 4: rows decision (0 healthy, 1 unhealthy), columns grade.

    Raises ValueError for a grade outside [0, grade_count) or a decision other than 0 and 1.
    """
    columns, rows = _pair(grades, decisions)
    columns, rows = _positions("grade", columns, range(grade_count)), _positions("decision", rows, (0, 1))
    counts = np.bincount(rows * grade_count + columns, minlength=2 * grade_count)
    return counts.reshape(2, grade_count).astype(np.int64)


def _midranks(values: Floats) -> Floats:
    """Ranks from 1 of `values` (n,), ties sharing the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (counts.cumsum() - (counts - 1) / 2)[group]
    return ranks


def _logistic(value: float) -> float:
    return 0.5 + 0.5 * math.tanh(value / 2)  # unlike 1 / (1 + exp(-value)) it cannot overflow


def _labels_and_scores(labels: ArrayLike, scores: ArrayLike) -> tuple[Integers, Floats]:
    """`labels` and `scores` as arrays (n,), both classes present, scores finite; otherwise ValueError."""
    given = np.asarray(scores, dtype=np.float64)
    checked = _integers("labels", labels)
    _same_shape("labels", checked, "scores", given)
    _positions("label", checked, (0, 1))
    if bad := int(np.count_nonzero(~np.isfinite(given))):
        first = int(np.flatnonzero(~np.isfinite(given))[0])
        raise ValueError(f"scores[{first}]={given[first]} is not finite ({bad} of {given.size}); leave them out")
    if checked.min() == checked.max():
        raise ValueError(f"all {checked.size} labels are {checked[0]}: a ROC curve needs both classes, 0 and 1")
    return checked, given


def _pair(labels: ArrayLike, decisions: ArrayLike) -> tuple[Integers, Integers]:
    first, second = _integers("labels", labels), _integers("decisions", decisions)
    _same_shape("labels", first, "decisions", second)
    return first, second


def _integers(name: str, values: ArrayLike) -> Integers:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; it must be (n,) with n >= 1")
    if array.dtype.kind not in "iub":
        raise ValueError(f"{name} has dtype {array.dtype}; it must hold integers, so convert it first")
    return array.astype(np.int64)


def _same_shape(name: str, first: Integers, other: str, second: NDArray[np.generic]) -> None:
    if first.shape != second.shape:
        raise ValueError(f"{name} has shape {first.shape}, {other} {second.shape}; they must be equal")


def _positions(name: str, values: Integers, classes: Sequence[int]) -> Integers:
    """Where each of `values` stands in `classes`; ValueError names the first that does not."""
    matches = values[:, None] == np.asarray(classes, dtype=np.int64)
    if not matches.any(axis=1).all():
        stray = values[~matches.any(axis=1)][0]
        raise ValueError(f"{name}={stray} is not among the classes {list(classes)}")
    positions: Integers = matches.argmax(axis=1)
    return positions
