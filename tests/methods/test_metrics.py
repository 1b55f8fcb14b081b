"""Measures against scikit-learn, published worked examples and direct O(n^2) computations."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import bootstrap, norm
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from tilestream.methods import metrics
from tilestream.methods.bootstrap import resampled

# Paper A, Table 4: rows decision, columns grade.
TABLE_4 = np.array([[542, 201, 319, 7, 0], [17, 31, 64, 91, 77]])
# Hanley and McNeil (1982), Table I: 58 normal and 51 abnormal CT images rated 1 to 5.
CT_NORMAL, CT_ABNORMAL = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]


def table_4() -> tuple[np.ndarray, np.ndarray]:
    """Grades and decisions that give Table 4."""
    rows, columns = np.indices(TABLE_4.shape)
    return np.repeat(columns.ravel(), TABLE_4.ravel()), np.repeat(rows.ravel(), TABLE_4.ravel())


def placement_variance(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """AUC and DeLong's variance from all pairs, as DeLong et al. (1988) write them."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    m, n = wins.shape
    return wins.mean(), wins.mean(axis=1).var(ddof=1) / m + wins.mean(axis=0).var(ddof=1) / n


@st.composite
def labelled_scores(draw: st.DrawFn, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels of both classes, at least `least` each, and scores from a handful of values, so that ties abound."""
    size = draw(st.integers(2 * least, 30))
    labels = np.array(draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)))
    assume(least <= labels.sum() <= size - least)
    pool = draw(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12, unique=True))
    return labels, np.array(draw(st.lists(st.sampled_from(pool), min_size=size, max_size=size)))


@given(labelled_scores())
def test_auc_and_variance_equal_all_pairs(drawn):
    labels, scores = drawn
    value, variance = placement_variance(labels, scores)
    ours = metrics.auc(labels, scores)
    assert ours.value == pytest.approx(value, abs=1e-12)
    assert ours.value == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert ours.variance == pytest.approx(variance, abs=1e-12)
    if ours.low is None:
        assert ours.variance == 0
    else:
        assert 0 < ours.low < ours.value < ours.high < 1


@given(labelled_scores())
def test_auc_mirrors_when_scores_change_sign(drawn):
    labels, scores = drawn
    there, back = metrics.auc(labels, scores), metrics.auc(labels, -scores)
    assert back.value == pytest.approx(1 - there.value, abs=1e-12)
    assert back.variance == pytest.approx(there.variance, abs=1e-12)
    if there.low is not None:
        assert back.low == pytest.approx(1 - there.high, abs=1e-9)


def test_auc_of_the_ct_example_is_as_published():
    labels = np.repeat([0] * 5 + [1] * 5, CT_NORMAL + CT_ABNORMAL)
    scores = np.repeat([1, 2, 3, 4, 5] * 2, CT_NORMAL + CT_ABNORMAL)
    result = metrics.auc(labels, scores)
    # Hanley and McNeil: area 0.893. DeLong's standard error 0.0307 and plain interval 0.83295-0.95339 are those of
    # Stata's manual, entry roctab, for the same table.
    assert result.value == pytest.approx(0.8932, abs=5e-5)
    assert math.sqrt(result.variance) == pytest.approx(0.0307, abs=5e-5)
    assert result.value - metrics.Z_95 * math.sqrt(result.variance) == pytest.approx(0.83295, abs=1e-5)
    centre = math.log(result.value / (1 - result.value))
    reach = math.sqrt(result.variance) / (result.value * (1 - result.value))
    assert math.log(result.low / (1 - result.low)) == pytest.approx(centre - 1.959964 * reach, abs=1e-5)
    assert math.log(result.high / (1 - result.high)) == pytest.approx(centre + 1.959964 * reach, abs=1e-5)
    assert str(result) == f"0.893 ({result.low:.3f}–{result.high:.3f})"


@pytest.mark.parametrize(
    ("scores", "value"), [([0.1, 0.2, 0.3, 0.4], 1.0), ([0.4, 0.3, 0.2, 0.1], 0.0), ([0.7] * 4, 0.5)]
)
def test_auc_without_spread_has_no_interval(scores, value):
    result = metrics.auc([0, 0, 1, 1], scores)
    assert asdict(result) == {"value": value, "low": None, "high": None, "variance": 0.0}
    assert str(result) == f"{value:.3f}"


def test_auc_of_a_single_positive_has_no_variance():
    assert metrics.auc([1, 0, 0], [1.0, 0.0, 2.0]) == metrics.AUC(0.5, None, None, None)


@given(labelled_scores(least=1))
def test_roc_points(drawn):
    labels, scores = drawn
    fpr, tpr, thresholds = metrics.roc_points(labels, scores)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tpr, fpr) == pytest.approx(metrics.auc(labels, scores).value, abs=1e-12)
    for rate_0, rate_1, threshold in zip(fpr, tpr, thresholds, strict=True):
        called = scores >= threshold
        assert rate_0 == pytest.approx(called[labels == 0].mean())
        assert rate_1 == pytest.approx(called[labels == 1].mean())


@pytest.mark.parametrize(
    "function", [metrics.auc, metrics.roc_points, metrics.auc_interval, metrics.average_precision, metrics.pr_points]
)
@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([1, 1, 1], [0.1, 0.2, 0.3], "all 3 labels are 1"),
        ([0, 0], [0.1, 0.2], "all 2 labels are 0"),
        ([0, 1], [0.1, math.nan], r"scores\[1\]=nan is not finite"),
        ([0, 1], [math.inf, 0.1], r"scores\[0\]=inf is not finite"),
        ([0, 2], [0.1, 0.2], "label=2 is not among"),
        ([0.0, 1.0], [0.1, 0.2], "labels has dtype float64"),
        ([0, 1], [0.1, 0.2, 0.3], r"labels has shape \(2,\), scores \(3,\)"),
        ([], [], r"labels has shape \(0,\)"),
    ],
)
def test_bad_scores_are_refused(function, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        function(labels, scores)


def test_table_4_of_paper_a():
    grades, decisions = table_4()
    np.testing.assert_array_equal(metrics.by_grade(grades, decisions), TABLE_4)
    measures = metrics.binary_measures((grades >= 2).astype(int), decisions)
    assert measures["sensitivity"] == 232 / 558 == pytest.approx(0.416, abs=5e-4)
    assert measures["specificity"] == 743 / 791 == pytest.approx(0.939, abs=5e-4)
    assert measures["ppv"] == 232 / 280 == pytest.approx(0.829, abs=5e-4)  # Table 2 prints these two as accuracies
    assert measures["npv"] == 743 / 1069 == pytest.approx(0.695, abs=5e-4)
    assert measures["accuracy"] == 975 / 1349
    counts = ("true_positives", "false_negatives", "true_negatives", "false_positives")
    assert [measures[name] for name in counts] == [232, 326, 743, 48]
    json.dumps(measures, allow_nan=False)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_binary_measures_equal_scikit_learn(pairs):
    labels, decisions = np.array(pairs).T
    ours = metrics.binary_measures(labels, decisions)
    for name, truth, called, positive in (
        ("sensitivity", labels, decisions, 1),
        ("specificity", labels, decisions, 0),
        ("ppv", decisions, labels, 1),
        ("npv", decisions, labels, 0),
    ):
        if (truth == positive).any():
            assert ours[name] == pytest.approx(sklearn_metrics.recall_score(truth, called, pos_label=positive))
            assert 0 <= ours[f"{name}_low"] <= ours[name] <= ours[f"{name}_high"] <= 1
        else:
            assert ours[name] is ours[f"{name}_low"] is ours[f"{name}_high"] is None
    assert ours["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, decisions))
    if len({*labels, *decisions}) == 1:
        assert ours["kappa"] is None
    else:
        assert ours["kappa"] == pytest.approx(sklearn_metrics.cohen_kappa_score(labels, decisions), abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),  # Newcombe (1998), Table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_as_published(successes, trials, low, high):
    assert metrics.wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = metrics.wilson(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_at_its_ends():
    assert metrics.wilson(0, 7)[0] == 0
    assert metrics.wilson(7, 7)[1] == 1
    assert metrics.wilson(0, 0) is None
    with pytest.raises(ValueError, match=r"k \(3\) must not be greater than n \(2\)"):
        metrics.wilson(3, 2)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_grade_measures_equal_scikit_learn(pairs):
    labels, decisions = np.array(pairs).T
    classes = list(range(5))
    expected = sklearn_metrics.confusion_matrix(labels, decisions, labels=classes)
    np.testing.assert_array_equal(metrics.confusion_matrix(labels, decisions, classes), expected)
    ours = metrics.quadratic_weighted_kappa(labels, decisions, classes)
    if len({*labels, *decisions}) == 1:
        assert ours is None
    else:
        theirs = sklearn_metrics.cohen_kappa_score(labels, decisions, labels=classes, weights="quadratic")
        assert ours == pytest.approx(theirs, abs=1e-12)
    within = metrics.grade_measures(labels, decisions)["within_one_grade"]
    assert within == sum(abs(a - b) <= 1 for a, b in pairs) / len(pairs)


@pytest.fixture(scope="module")
def drawn():
    """Labels, two scores that know something of them (in [0, 1], with ties), and patients of two photographs each."""
    rng = np.random.default_rng(3)
    labels = np.repeat(rng.random(60) < 0.4, 2).astype(int)
    scores = np.round(np.clip(0.5 + 0.2 * (labels - 0.5) + rng.normal(0, 0.25, 120), 0, 1), 2)
    others = np.round(np.clip(scores + rng.normal(0, 0.3, 120), 0, 1), 2)
    return labels, scores, others, np.repeat(np.arange(60), 2)


def test_weighted_statistics_are_those_of_repeated_samples(drawn):
    labels, scores, _, _ = drawn
    weights = np.random.default_rng(0).integers(0, 4, (5, len(labels))).astype(float)
    areas, precisions = (f(labels, scores)(weights) for f in (metrics._weighted_auc, metrics._weighted_precision))
    for row, area, precision in zip(weights.astype(int), areas, precisions, strict=True):
        truth, called = np.repeat(labels, row), np.repeat(scores, row)
        assert area == pytest.approx(sklearn_metrics.roc_auc_score(truth, called), abs=1e-12)
        assert precision == pytest.approx(sklearn_metrics.average_precision_score(truth, called), abs=1e-12)


def test_bootstrap_intervals_are_those_of_scipy(drawn):
    labels, scores, others, _ = drawn
    for ours, theirs in (
        (metrics.auc_interval(labels, scores, draws=4000), sklearn_metrics.roc_auc_score),
        (metrics.average_precision_interval(labels, scores, draws=4000), sklearn_metrics.average_precision_score),
    ):
        outside = bootstrap(
            (labels, scores), theirs, paired=True, vectorized=False, n_resamples=1000, method="percentile", rng=1
        ).confidence_interval
        assert ours == pytest.approx((outside.low, outside.high), abs=0.012)  # two seeds differ by 0.01
    low, high = metrics.auc_difference_interval(labels, scores, others, draws=4000)
    paired = metrics.auc_difference(labels, scores, others)
    assert (low, high) == pytest.approx((paired.low, paired.high), abs=0.012)


def test_patients_are_drawn_whole(drawn):
    labels, _, _, patients = drawn
    scores = np.random.default_rng(1).random(60)[patients]  # photographs of a patient are all alike
    apart, together = metrics.auc_interval(labels, scores), metrics.auc_interval(labels, scores, patients)
    assert (together[1] - together[0]) / (apart[1] - apart[0]) == pytest.approx(math.sqrt(2), rel=0.1)
    assert together == metrics.auc_interval(labels, scores, [f"p{999 - p}" for p in patients])
    assert together != metrics.auc_interval(labels, scores, patients, seed=1)
    blocks = list(resampled(patients, draws=3))
    assert np.concatenate(blocks).shape == (3, 120)
    assert (blocks[0][:, ::2] == blocks[0][:, 1::2]).all()
    assert (blocks[0].sum(axis=1) == 120).all()


def test_draws_do_not_depend_on_the_blocks_they_come_in(monkeypatch):
    whole = np.concatenate(list(resampled(range(9), draws=20)))
    monkeypatch.setattr("tilestream.methods.bootstrap._CELLS", 63)
    np.testing.assert_array_equal(np.concatenate(list(resampled(range(9), draws=20))), whole)


def test_no_spread_no_interval():
    assert metrics.auc_interval([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]) is None
    assert metrics.auc_interval([0, 1], [0.3, 0.4], ["a", "a"]) is None
    assert metrics.auc_difference([0, 0, 1, 1], [1, 2, 3, 4], [1, 2, 3, 4]) == metrics.Difference(0.0, None, None, None)
    with pytest.raises(ValueError, match=r"groups has shape \(1,\), labels \(2,\)"):
        metrics.auc_interval([0, 1], [0.3, 0.4], ["a"])


@given(labelled_scores(), st.randoms())
def test_paired_variance_equals_all_pairs(drawn, random):
    labels, scores = drawn
    others = np.array(random.sample(list(scores), len(scores)))
    wins = [
        (s[labels == 1][:, None] > s[labels == 0]) + 0.5 * (s[labels == 1][:, None] == s[labels == 0])
        for s in (scores, others)
    ]
    m, n = wins[0].shape
    rows, columns = (np.cov([w.mean(axis=a) for w in wins]) for a in (1, 0))
    covariance = rows / m + columns / n
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    ours = metrics.auc_difference(labels, scores, others)
    assert ours.value == pytest.approx(wins[0].mean() - wins[1].mean(), abs=1e-12)
    if ours.low is not None:
        assert ours.high - ours.low == pytest.approx(2 * metrics.Z_95 * math.sqrt(max(variance, 0)), abs=1e-6)
        assert ours.p_value == pytest.approx(2 * norm.sf(abs(ours.value) / math.sqrt(variance)), rel=1e-5, abs=1e-12)
    else:
        assert variance == pytest.approx(0, abs=1e-12)


@given(labelled_scores(least=1))
def test_precision_and_recall_equal_scikit_learn(drawn):
    labels, scores = drawn
    expected = sklearn_metrics.average_precision_score(labels, scores)
    assert metrics.average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)
    precision, recall, thresholds = metrics.pr_points(labels, scores)
    assert len(precision) == len(recall) == len(thresholds) + 1
    assert -np.sum(np.diff(recall) * precision[:-1]) == pytest.approx(expected, abs=1e-12)


def test_calibration_equals_scikit_learn(drawn):
    labels, probabilities, _, _ = drawn
    assert metrics.brier(labels, probabilities) == pytest.approx(
        sklearn_metrics.brier_score_loss(labels, probabilities), abs=1e-12
    )
    curve = metrics.reliability(labels, probabilities, bins=8)
    edges = np.isin(probabilities, np.linspace(0, 1, 9)[1:-1])  # scikit-learn puts these into the bin below
    assert edges.any()
    inside = metrics.reliability(labels[~edges], probabilities[~edges], bins=8)
    shares, means = calibration_curve(labels[~edges], probabilities[~edges], n_bins=8)
    assert [b.share for b in inside] == pytest.approx(shares)
    assert [b.probability for b in inside] == pytest.approx(means)
    assert sum(b.count for b in curve) == len(labels)
    assert all(b.start <= b.probability <= b.stop and b.low <= b.share <= b.high for b in curve)
    error = sum(b.count * abs(b.share - b.probability) for b in curve) / len(labels)
    assert metrics.calibration_error(labels, probabilities, bins=8) == pytest.approx(error)


def test_calibration_by_hand():
    labels, probabilities = [0, 1, 1, 1], [0.1, 0.1, 0.9, 1.0]
    curve = metrics.reliability(labels, probabilities, bins=5)
    assert [(b.start, b.stop, b.count, b.share) for b in curve] == [(0, 0.2, 2, 0.5), (0.8, 1, 2, 1)]
    assert metrics.calibration_error(labels, probabilities, bins=5) == pytest.approx((2 * 0.4 + 2 * 0.05) / 4)
    assert metrics.brier(labels, probabilities) == pytest.approx((0.01 + 0.81 + 0.01 + 0) / 4)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"probabilities\[1\]=.* must be in \[0, 1\]"):
            metrics.brier([0, 1], [0.5, bad])


def test_grade_measures():
    rng = np.random.default_rng(2)
    grades = rng.integers(0, 5, 300)
    decisions = np.clip(grades + rng.integers(-2, 3, 300), 0, 4)
    result = metrics.grade_measures(grades, decisions)
    assert result["confusion"] == sklearn_metrics.confusion_matrix(grades, decisions).tolist()
    assert result["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(grades, decisions))
    assert result["within_one_grade"] == np.mean(abs(grades - decisions) <= 1)
    assert result["class_accuracies"] == pytest.approx(sklearn_metrics.recall_score(grades, decisions, average=None))
    assert result["kappa"] == pytest.approx(sklearn_metrics.cohen_kappa_score(grades, decisions, weights="quadratic"))

    def kappa(a, b):
        return sklearn_metrics.cohen_kappa_score(a, b, weights="quadratic")

    outside = bootstrap(
        (grades, decisions), kappa, paired=True, vectorized=False, n_resamples=500, method="percentile", rng=1
    ).confidence_interval
    assert (result["kappa_low"], result["kappa_high"]) == pytest.approx((outside.low, outside.high), abs=0.012)
    json.dumps(result, allow_nan=False)
    assert metrics.class_accuracies([0, 0, 3], [0, 1, 3], range(5)) == [0.5, None, None, 1.0, None]
    with pytest.raises(ValueError, match="decision=5 is not among"):
        metrics.grade_measures([1, 2], [1, 5])


def test_classes_keep_their_order_and_strays_are_refused():
    np.testing.assert_array_equal(metrics.confusion_matrix([7, 3, 3], [3, 3, 7], classes=(7, 3)), [[0, 1], [1, 1]])
    with pytest.raises(ValueError, match=r"label=5 is not among the classes \[0, 1\]"):
        metrics.confusion_matrix([0, 5], [0, 1], classes=(0, 1))
    with pytest.raises(ValueError, match=r"decision=-1 is not among the classes \[0, 1\]"):
        metrics.binary_measures([0, 1], [-1, 1])
    with pytest.raises(ValueError, match="grade=5 is not among"):
        metrics.by_grade([0, 5], [0, 1])
