"""The scikit-learn face: its own checks, its SVC as the oracle, and machines that come back from JSON."""

import json

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from tilestream.methods.decision import fit_threshold
from tilestream.methods.estimators import CropDecision, HistogramSVM


def histograms(seed: int = 0, healthy: int = 50, unhealthy: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Shares of 200 windows in 20 bins: the unhealthy have a few more in the highest."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], [healthy, unhealthy])
    maps = [rng.beta(1, 4, 200) for _ in labels]
    for values, label in zip(maps, labels, strict=True):
        values[: rng.poisson(2 + 12 * label)] = rng.uniform(0.7, 1)
    return np.stack([np.histogram(values, 20, (0, 1))[0] / 200 for values in maps]), labels


@parametrize_with_checks([HistogramSVM(), HistogramSVM(kernel="linear"), CropDecision(), CropDecision("max")])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
@pytest.mark.parametrize("C", [0.3, 10.0])
def test_decisions_are_those_of_svc(kernel, C):
    X, y = histograms()
    ours = HistogramSVM(C, kernel).fit(X, y)
    theirs = SVC(C=C, kernel=kernel, class_weight="balanced").fit(X, y)
    new = histograms(1)[0]
    np.testing.assert_allclose(ours.decision_function(new), theirs.decision_function(new), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(ours.predict(new), theirs.predict(new))


def test_probabilities_rank_as_decisions_and_agree_with_them():
    X, y = histograms()
    machine = HistogramSVM().fit(X, y)
    new, truth = histograms(1)
    probability, decision = machine.predict_proba(new)[:, 1], machine.decision_function(new)
    np.testing.assert_array_equal(np.argsort(probability, kind="stable"), np.argsort(decision, kind="stable"))
    np.testing.assert_array_equal(probability >= 0.5, decision >= 0)
    assert (machine.predict(new) == truth).mean() > 0.8
    # the slope is fitted: where labels say little, probabilities stay near 1/2
    noise = np.random.default_rng(0).permutation(y)
    unsure = HistogramSVM().fit(X, noise).predict_proba(new)[:, 1]
    assert np.abs(unsure - 0.5).mean() < 0.5 * np.abs(probability - 0.5).mean()


def test_a_stored_machine_is_the_same_to_the_last_bit():
    X, y = histograms()
    machine = HistogramSVM(C=3.0).fit(X, np.array(["healthy", "unhealthy"])[y])
    again = HistogramSVM.from_json(json.loads(json.dumps(machine.to_json(), allow_nan=False)))
    new = histograms(1)[0]
    assert np.array_equal(again.predict_proba(new), machine.predict_proba(new))
    assert list(again.predict(new)) == list(machine.predict(new))
    assert again.get_params() == machine.get_params()
    with pytest.raises(ValueError, match="20 features"):
        again.predict(new[:, :5])
    for broken in ({}, {**machine.to_json(), "parameters": {"D": 1}}):
        with pytest.raises(ValueError, match="no stored HistogramSVM"):
            HistogramSVM.from_json(broken)


def test_they_work_in_scikit_learns_tools():
    X, y = histograms()
    assert cross_val_score(make_pipeline(StandardScaler(), HistogramSVM()), X, y, scoring="roc_auc", cv=3).mean() > 0.8
    search = GridSearchCV(HistogramSVM(), {"C": [0.1, 1.0], "kernel": ["rbf", "linear"]}, cv=3).fit(X, y)
    assert clone(search.best_estimator_).get_params() == search.best_params_ | {"gamma": "scale"}


@pytest.mark.parametrize(("aggregate", "of"), [("first", lambda p: p[:, 0]), ("mean", np.mean), ("max", np.max)])
def test_crops_decide_as_the_threshold_on_their_score(aggregate, of):
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [40, 20])
    X = rng.normal(1.5 * y[:, None] - 0.5, 1, (60, 3))
    decision = CropDecision(aggregate).fit(X, y)
    p = 1 / (1 + np.exp(-X))
    scores = of(p) if aggregate == "first" else of(p, axis=1)
    expected = fit_threshold(scores, y)
    assert expected.origin == "svm"
    assert decision.threshold_ == expected
    np.testing.assert_array_equal(decision.predict(X), expected.decide(scores))
    odds = np.log(scores / (1 - scores)) - np.log(expected.value / (1 - expected.value))
    np.testing.assert_allclose(decision.decision_function(X), odds, rtol=0, atol=1e-12)


def test_scores_that_fall_with_the_class_are_decided_at_one_half():
    decision = CropDecision().fit([[2.0], [1.0], [-1.0], [-2.0]], [0, 0, 1, 1])
    assert decision.threshold_.origin == "prior"
    np.testing.assert_array_equal(decision.predict([[0.1], [-0.1]]), [1, 0])


@pytest.mark.parametrize(
    ("estimator", "y", "words"),
    [
        (HistogramSVM(), [0, 0, 0, 0], "two classes, got 1 class"),
        (HistogramSVM(), [0, 1, 2, 0], "two classes, got 3 classes"),
        (HistogramSVM(), [0, 0, 0, 1], "two rows of each class at least, got 1"),
        (HistogramSVM(kernel="poly"), [0, 0, 1, 1], "kernel='poly' must be 'rbf' or 'linear'"),
        (CropDecision("median"), [0, 0, 1, 1], "aggregate='median' must be one of first, mean, max"),
        (CropDecision(), [1, 1, 1, 1], "two classes, got 1 class"),
    ],
)
def test_what_cannot_be_fitted_is_said(estimator, y, words):
    with pytest.raises(ValueError, match=words):
        estimator.fit([[0.0], [1.0], [2.0], [3.0]], y)
