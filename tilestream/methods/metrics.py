"""Measures of a classifier, values in, values out: ranking, decisions, grades.

Labels and decisions are integers, 1 being the positive class ("unhealthy", "pathological"); scores are finite floats,
higher meaning more positive. A measure whose denominator is zero is None (null in JSON), never 0. All intervals are
95 % ones. Where `groups` (n,) are asked for, they say which samples belong together (to one patient): these are
resampled together (see `bootstrap.interval`); None is a group a sample.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from scipy.stats import binomtest, norm, rankdata
from sklearn.metrics import precision_recall_curve, roc_curve

from .bootstrap import DRAWS, Floats, Statistic, divided, interval

Integers = NDArray[np.int64]

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
    beaten, lost_to = _placements(*_labels_and_scores(labels, scores))
    m, n = len(beaten), len(lost_to)
    value = float(beaten.sum() / (m * n))
    if m == 1 or n == 1:
        return AUC(value, None, None, None)
    variance = float(beaten.var(ddof=1) / (m * n**2) + lost_to.var(ddof=1) / (n * m**2))
    if variance == 0:
        return AUC(value, None, None, 0.0)
    reach = Z_95 * math.sqrt(variance) / (value * (1 - value))
    low, high = (float(expit(logit(value) + sign * reach)) for sign in (-1, 1))
    return AUC(value, low, high, variance)


def auc_interval(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike | None = None, *, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float] | None:
    """The bootstrap interval of the AUC; None where there is none. Raises ValueError as `auc` does."""
    labels, scores = _labels_and_scores(labels, scores)
    return interval(_weighted_auc(labels, scores), _groups(groups, len(labels)), seed=seed, draws=draws)


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two AUCs with its interval and two-sided p-value; without spread these are None."""

    value: float
    low: float | None
    high: float | None
    p_value: float | None


def auc_difference(labels: ArrayLike, scores: ArrayLike, others: ArrayLike) -> Difference:
    """AUC of `scores` minus AUC of `others` on the same samples, by DeLong's paired test (1988).

    The interval is symmetric around the difference. Raises ValueError as `auc` does.
    """
    (beaten, lost_to), (beaten_2, lost_to_2) = (
        _placements(*_labels_and_scores(labels, each)) for each in (scores, others)
    )
    gained, lost = beaten - beaten_2, lost_to - lost_to_2
    m, n = len(gained), len(lost)
    value = float(gained.sum() / (m * n))
    if m == 1 or n == 1:
        return Difference(value, None, None, None)
    error = math.sqrt(gained.var(ddof=1) / (m * n**2) + lost.var(ddof=1) / (n * m**2))
    if error == 0:
        return Difference(value, None, None, None)
    return Difference(value, value - Z_95 * error, value + Z_95 * error, float(2 * norm.sf(abs(value) / error)))


def auc_difference_interval(
    labels: ArrayLike,
    scores: ArrayLike,
    others: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, float] | None:
    """The paired bootstrap interval of AUC(scores) - AUC(others): both on the same draws."""
    checked, scores = _labels_and_scores(labels, scores)
    first, second = (_weighted_auc(checked, values) for values in (scores, _labels_and_scores(labels, others)[1]))
    return interval(lambda w: first(w) - second(w), _groups(groups, len(checked)), seed=seed, draws=draws)


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the precision-recall curve as a sum of steps, (R_k - R_(k-1)) P_k, in [0, 1]; ties are one step.

    What chance gives is the share of positive labels. Raises ValueError as `auc` does.
    """
    labels, scores = _labels_and_scores(labels, scores)
    return float(_weighted_precision(labels, scores)(np.ones((1, len(labels))))[0])


def average_precision_interval(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike | None = None, *, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float] | None:
    """The bootstrap interval of the average precision; None where there is none."""
    labels, scores = _labels_and_scores(labels, scores)
    return interval(_weighted_precision(labels, scores), _groups(groups, len(labels)), seed=seed, draws=draws)


def pr_points(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """The precision-recall curve's corners: precisions and recalls (k + 1,), thresholds (k,) ascending.

    The last corner, precision 1 at recall 0, has no threshold. Raises ValueError as `auc` does.
    """
    precision, recall, thresholds = precision_recall_curve(*_labels_and_scores(labels, scores))
    return precision, recall, thresholds


def brier(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean squared distance of `probabilities` (n,) in [0, 1] from `labels` (Brier 1950): 0 is perfect."""
    labels, probabilities = _labels_and_probabilities(labels, probabilities)
    return float(np.mean((probabilities - labels) ** 2))


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions in [start, stop): their number, mean probability, share of positives and its Wilson interval."""

    start: float
    stop: float
    count: int
    probability: float
    share: float
    low: float
    high: float


def reliability(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> list[Bin]:
    """The reliability curve: predictions in `bins` equal parts of [0, 1], empty ones left out; 1 is in the last."""
    labels, probabilities = _labels_and_probabilities(labels, probabilities)
    edges = np.linspace(0, 1, bins + 1)
    which = np.minimum(np.searchsorted(edges, probabilities, side="right") - 1, bins - 1)
    curve = []
    for part in np.unique(which).tolist():
        inside = which == part
        count, positive = int(inside.sum()), int(labels[inside].sum())
        low, high = wilson(positive, count) or (0.0, 1.0)
        mean = float(probabilities[inside].mean())
        curve.append(Bin(float(edges[part]), float(edges[part + 1]), count, mean, positive / count, low, high))
    return curve


def calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015): the bins' mean |share - probability|, weighted by their size."""
    curve = reliability(labels, probabilities, bins)
    return sum(b.count * abs(b.share - b.probability) for b in curve) / sum(b.count for b in curve)


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
    if not trials:
        return None
    bounds = binomtest(successes, trials).proportion_ci(0.95, "wilson")
    return float(bounds.low), float(bounds.high)


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
    kappa = float(_kappa(confusion_matrix(labels, decisions, classes)[None].astype(np.float64))[0])
    return None if math.isnan(kappa) else kappa


def _kappa(counts: Floats) -> Floats:
    """Quadratic weighted kappa of confusion matrices (d, k, k); NaN where chance leaves nothing to disagree about."""
    position = np.arange(counts.shape[-1])
    weights = (position[:, None] - position) ** 2
    expected = counts.sum(axis=2)[:, :, None] * counts.sum(axis=1)[:, None, :] / counts.sum(axis=(1, 2))[:, None, None]
    return 1 - divided((weights * counts).sum(axis=(1, 2)), (weights * expected).sum(axis=(1, 2)))


def class_accuracies(labels: ArrayLike, decisions: ArrayLike, classes: Sequence[int]) -> list[float | None]:
    """Share of each class's samples that were decided right (its recall), in the order of `classes`; None without any.

    Raises ValueError as `confusion_matrix` does.
    """
    counts = confusion_matrix(labels, decisions, classes)
    return [
        int(right) / int(all_) if all_ else None
        for right, all_ in zip(counts.diagonal(), counts.sum(axis=1), strict=True)
    ]


def grade_measures(
    grades: ArrayLike, decisions: ArrayLike, groups: ArrayLike | None = None, *, grade_count: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Five-grade measures: photographs, confusion (rows grades, columns decisions), accuracy, within_one_grade, kappa.

    kappa is quadratic weighted, with its bootstrap interval `kappa_low`, `kappa_high`; the shares have Wilson's. And
    class_accuracies by grade. Raises ValueError for a grade or decision outside [0, grade_count).
    """
    classes = range(grade_count)
    counts = confusion_matrix(grades, decisions, classes)
    distance = np.abs(np.subtract.outer(np.arange(grade_count), np.arange(grade_count)))
    result: dict[str, Any] = {"photographs": int(counts.sum()), "confusion": counts.tolist()}
    for name, reach in (("accuracy", 0), ("within_one_grade", 1)):
        right = int(counts[distance <= reach].sum())
        result[name] = right / int(counts.sum())
        result[f"{name}_low"], result[f"{name}_high"] = wilson(right, int(counts.sum())) or (None, None)
    rows, columns = _pair(grades, decisions)
    cells = np.eye(grade_count**2)[rows * grade_count + columns]

    def statistic(weights: Floats) -> Floats:
        return _kappa((weights @ cells).reshape(-1, grade_count, grade_count))

    bounds = interval(statistic, _groups(groups, len(rows)), seed=seed) or (None, None)
    result["kappa"] = quadratic_weighted_kappa(grades, decisions, classes)
    result["kappa_low"], result["kappa_high"] = bounds
    return {**result, "class_accuracies": class_accuracies(grades, decisions, classes)}


def by_grade(grades: ArrayLike, decisions: ArrayLike, grade_count: int = 5) -> Integers:
    """Counts (2, grade_count) as in paper A's Table 4: rows decision (0 healthy, 1 unhealthy), columns grade.

    Raises ValueError for a grade outside [0, grade_count) or a decision other than 0 and 1.
    """
    columns, rows = _pair(grades, decisions)
    columns, rows = _positions("grade", columns, range(grade_count)), _positions("decision", rows, (0, 1))
    counts = np.bincount(rows * grade_count + columns, minlength=2 * grade_count)
    return counts.reshape(2, grade_count).astype(np.int64)


def _placements(labels: Integers, scores: Floats) -> tuple[Floats, Floats]:
    """How many negatives each positive beats, (m,), and how many positives each negative loses to, (n,).

    Multiples of one half, so that their sums are exact and a variance of zero comes out as zero.
    """
    positive, negative = scores[labels == 1], scores[labels == 0]
    m = len(positive)
    ranks = rankdata(np.concatenate([positive, negative]))
    return ranks[:m] - rankdata(positive), m - (ranks[m:] - rankdata(negative))


def _stepped(labels: Integers, scores: Floats) -> Callable[[Floats], tuple[Floats, Floats]]:
    """weights (d, n) -> weights of positives and of negatives, (d, k) each, by distinct scores, the highest first."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    positive = labels[order] == 1

    def split(weights: Floats) -> tuple[Floats, Floats]:
        drawn = weights[:, order]
        return np.add.reduceat(drawn * positive, starts, axis=1), np.add.reduceat(drawn * ~positive, starts, axis=1)

    return split


def _weighted_auc(labels: Integers, scores: Floats) -> Statistic:
    split = _stepped(labels, scores)

    def statistic(weights: Floats) -> Floats:
        positives, negatives = split(weights)
        won = (positives.cumsum(axis=1) - positives / 2) * negatives
        return divided(won.sum(axis=1), positives.sum(axis=1) * negatives.sum(axis=1))

    return statistic


def _weighted_precision(labels: Integers, scores: Floats) -> Statistic:
    split = _stepped(labels, scores)

    def statistic(weights: Floats) -> Floats:
        positives, negatives = split(weights)
        found = positives.cumsum(axis=1)
        called = found + negatives.cumsum(axis=1)
        steps = positives * np.divide(found, called, out=np.zeros_like(found), where=called > 0)
        return divided(steps.sum(axis=1), found[:, -1])

    return statistic


def _groups(groups: ArrayLike | None, count: int) -> NDArray[np.generic]:
    """Groups as an array (n,), a sample each by default."""
    names = np.arange(count) if groups is None else np.asarray(groups)
    if names.shape != (count,):
        raise ValueError(f"groups has shape {names.shape}, labels ({count},); they must be equal")
    return names


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


def _labels_and_probabilities(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Integers, Floats]:
    """`labels` 0/1 and `probabilities` in [0, 1] as arrays (n,); otherwise ValueError."""
    given, checked = np.asarray(probabilities, dtype=np.float64), _integers("labels", labels)
    _same_shape("labels", checked, "probabilities", given)
    _positions("label", checked, (0, 1))
    if (outside := np.flatnonzero(~((given >= 0) & (given <= 1)))).size:
        raise ValueError(
            f"probabilities[{outside[0]}]={given[outside[0]]} must be in [0, 1]; calibrate the scores first"
        )
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
