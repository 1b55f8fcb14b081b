"""The decision threshold against scikit-learn's own decisions, a hand-solved boundary, and degenerate scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from tilestream.methods import Threshold, fit_threshold, log_odds


def scored(seed: int, shift: float = 3.0, healthy: int = 60, unhealthy: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping, unbalanced probabilities of two classes."""
    rng = np.random.default_rng(seed)
    odds = np.concatenate([rng.normal(-shift / 2, 1.5, healthy), rng.normal(shift / 2, 1.5, unhealthy)])
    return 1 / (1 + np.exp(-odds)), np.repeat([0, 1], [healthy, unhealthy])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("C", [0.1, 1.0, 10.0])
def test_decisions_are_those_of_the_machine(seed, C):
    probabilities, labels = scored(seed)
    threshold = fit_threshold(probabilities, labels, C)
    assert getattr(threshold, "origin", "svm") == "svm"
    odds = np.log(probabilities / (1 - probabilities))[:, None]
    machine = make_pipeline(StandardScaler(), SVC(kernel="linear", C=C, class_weight="balanced")).fit(odds, labels)
    grid = np.linspace(0.001, 0.999, 2001)
    expected = machine.predict(np.log(grid / (1 - grid))[:, None])
    assert expected.min() == 0
    assert expected.max() == 1
    far = np.abs(grid - threshold.value) > 1e-9
    np.testing.assert_array_equal(threshold.decide(grid)[far], expected[far])
    at = np.log(threshold.value / (1 - threshold.value))
    assert machine.decision_function([[at]])[0] == pytest.approx(0, abs=1e-9)


def test_two_points_are_parted_half_way_in_log_odds():
    # odds ln(1/9) and ln(4): the boundary has odds sqrt(4/9) = 2/3, so probability 2/5
    assert fit_threshold([0.1, 0.8], [0, 1]).value == pytest.approx(0.4)


def test_classes_weigh_alike_whatever_their_numbers():
    probabilities, labels = scored(0)
    more = np.concatenate([probabilities, *[probabilities[labels == 0]] * 9])
    once, tenfold = (
        fit_threshold(probabilities, labels, 10),
        fit_threshold(more, np.concatenate([labels, np.zeros(9 * 60, int)]), 10),
    )
    assert tenfold.value == pytest.approx(once.value, abs=0.05)
    plain = SVC(kernel="linear", C=10).fit(log_odds(more)[:, None], np.concatenate([labels, np.zeros(540, int)]))
    unbalanced = 1 / (1 + np.exp(plain.intercept_[0] / plain.coef_[0, 0]))
    assert unbalanced > once.value + 0.1  # the negative control: without weights the many win


def test_order_does_not_matter():
    probabilities, labels = scored(1)
    shuffled = np.random.default_rng(0).permutation(labels.size)
    expected = fit_threshold(probabilities, labels).value
    assert fit_threshold(probabilities[shuffled], labels[shuffled]).value == pytest.approx(expected, abs=1e-3)


def test_scores_from_the_threshold_on_are_unhealthy():
    decisions = Threshold(0.3).decide([0.0, np.nextafter(0.3, 0), 0.3, 1.0])
    np.testing.assert_array_equal(decisions, [0, 0, 1, 1])
    assert decisions.dtype == np.int64


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
def test_one_class_is_an_error(labels):
    with pytest.raises(ValueError, match="both classes"):
        fit_threshold([0.2, 0.5, 0.9][: len(labels)], labels)


def test_grades_are_no_labels():
    with pytest.raises(ValueError, match=r"got labels \[0, 1, 2\]"):
        fit_threshold([0.2, 0.5, 0.9], [0, 1, 2])


def test_probabilities_of_0_and_1():
    threshold = fit_threshold(np.float32([0, 0, 0, 1, 1]), [0, 0, 0, 1, 1])
    assert threshold.value == pytest.approx(0.5, abs=1e-4)
    np.testing.assert_array_equal(threshold.decide([0, 0.4, 0.6, 1]), [0, 0, 1, 1])
    # float32 rounds a sure network's probability to 1: a healthy photograph among them, and the fit still stands
    assert 0 < fit_threshold([0, 0.1, 0.2, 1, 1, 1], [0, 0, 0, 1, 1, 0]).value < 1


@pytest.mark.parametrize(
    ("scores", "labels"),
    [([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1]), ([0.5] * 4, [0, 1, 0, 1]), ([1.0, 0.0], [0, 1])],
    ids=["reversed", "constant", "reversed extremes"],
)
def test_scores_that_do_not_rise_fall_back_to_one_half_and_say_so(scores, labels):
    threshold = fit_threshold(scores, labels)
    assert threshold.value == 0.5
    assert getattr(threshold, "origin", "prior") == "prior"


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0])
def test_scores_that_lie_close_together_are_parted_as_well(scale):
    # a network of few epochs gives these; without standardising, the boundary leaves the scores and exp overflows
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [40, 15])
    odds = -0.2 + scale * (rng.normal(size=55) + 2 * labels)
    decisions = fit_threshold(1 / (1 + np.exp(-odds)), labels).decide(1 / (1 + np.exp(-odds)))
    assert decisions[labels == 1].mean() > 0.7
    assert decisions[labels == 0].mean() < 0.3


def test_a_boundary_beyond_all_scores_is_no_threshold():
    for seed in range(40):  # labels by chance: some boundaries fall outside
        rng = np.random.default_rng(seed)
        labels = np.concatenate([[0, 1], rng.integers(0, 2, 8)])
        scores = rng.uniform(0.3, 0.45, 10)
        threshold = fit_threshold(scores, labels)
        assert threshold.value == 0.5 or set(threshold.decide(scores)) == {0, 1}


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=2, max_size=12).filter(
        lambda drawn: {label for _, label in drawn} == {0, 1}
    )
)
def test_any_scores_give_a_threshold_between_0_and_1(drawn):
    scores, labels = map(np.array, zip(*drawn, strict=True))
    assert 0 <= fit_threshold(scores, labels).value <= 1


def test_log_odds_are_finite_and_undone_by_the_logistic_function():
    p = np.array([0, 1e-9, 0.1, 0.5, 0.9, 1])
    odds = log_odds(p)
    assert np.isfinite(odds).all()
    assert (np.diff(odds) > 0).all()
    np.testing.assert_allclose(1 / (1 + np.exp(-odds)), p, rtol=1e-9, atol=2e-12)
    assert odds[3] == 0
    assert odds[2] == pytest.approx(-odds[4])
