"""Bags of visual words: scikit-learn's own checks, codings by their formulas, dictionaries that find what is there."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from tilestream.methods.bovw import BagOfVisualWords, search_svm
from tilestream.methods.estimators import HistogramSVM

CENTRES = np.eye(6, 8, dtype=np.float32) * 4


def bags(seed: int = 0, count: int = 20) -> list[np.ndarray]:
    """Ragged bags of descriptors around the first five centres; every other one has a single one of the sixth."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        which = rng.integers(0, 5, rng.integers(30, 60))
        which[0] = 5 if index % 2 else which[0]
        found.append((CENTRES[which] + rng.normal(0, 0.1, (len(which), 8))).astype(np.float32))
    return found


@parametrize_with_checks([BagOfVisualWords(words=2), BagOfVisualWords(2, "hard"), BagOfVisualWords(2, "soft", "mean")])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_the_dictionary_finds_the_clusters():
    words = BagOfVisualWords(10, batch_size=200).fit(bags()).words_
    distances = np.linalg.norm(words[:, None] - CENTRES, axis=2)
    assert distances.min(axis=0).max() < 0.3  # the rare one, too
    assert distances.min(axis=1).max() < 0.6


@pytest.mark.parametrize("pooling", ["auto", "max", "mean", "sum"])
@pytest.mark.parametrize("coding", ["hard", "soft", "semi-soft"])
def test_codings_and_poolings_are_their_formulas(coding, pooling):
    fitted = BagOfVisualWords(5, coding, pooling, sigma=0.7, eps=0.01).fit(bags())
    for bag, row in zip(bags(1), fitted.transform(bags(1)), strict=True):
        d = np.array([[np.linalg.norm(x.astype(float) - c) for c in fitted.words_] for x in bag])
        if coding == "hard":
            codes = (d == d.min(axis=1, keepdims=True)).astype(float)
        elif coding == "soft":
            kernel = np.exp(-(d**2) / (2 * 0.7**2))
            codes = kernel / kernel.sum(axis=1, keepdims=True)
        else:
            codes = 1 / (d + 0.01)
        over = {"auto": "sum" if coding == "hard" else "max"}.get(pooling, pooling)
        pooled = getattr(codes, over)(axis=0)
        np.testing.assert_allclose(row, pooled / pooled.sum(), rtol=1e-4, atol=1e-6)
        assert row.sum() == pytest.approx(1)


@pytest.mark.parametrize("coding", ["hard", "soft", "semi-soft"])
def test_a_large_bag_is_coded_in_parts_as_it_is_whole(coding, monkeypatch):
    fitted = BagOfVisualWords(5, coding).fit(bags())
    whole = fitted.transform(bags(1))
    monkeypatch.setattr("tilestream.methods.bovw._ROWS", 7)
    np.testing.assert_allclose(fitted.transform(bags(1)), whole, rtol=1e-5)


def test_sigma_is_the_distance_to_the_nearest_word():
    fitted = BagOfVisualWords(6, "soft", batch_size=200).fit(bags())
    every = np.concatenate(bags())
    nearest = np.linalg.norm(every[:, None] - fitted.words_, axis=2).min(axis=1)
    assert fitted.sigma_ == pytest.approx(np.sqrt((nearest**2).mean()), rel=0.1)
    assert BagOfVisualWords(6, "soft", sigma=3.0).fit(bags()).sigma_ == 3.0


def test_bags_are_read_one_at_a_time_and_as_often_as_was_said():
    class Counted(Sequence):
        def __init__(self, given):
            self.given, self.reads = given, []

        def __len__(self):
            return len(self.given)

        def __getitem__(self, index):
            self.reads.append(index)
            return self.given[index]

    counted, told = Counted(bags()), []
    lazy = BagOfVisualWords(6, batch_size=50, passes=2).fit(counted, on_bag=lambda: told.append(1))
    assert len(told) == 40
    assert len(counted.reads) == 41  # the first, once more, for the length of descriptors
    eager = BagOfVisualWords(6, batch_size=50, passes=2).fit(bags())
    assert np.array_equal(lazy.words_, eager.words_)
    other = BagOfVisualWords(6, batch_size=50, passes=2, random_state=1).fit(bags())
    assert not np.array_equal(lazy.words_, other.words_)


def test_per_bag_limits_what_large_bags_say():
    large = [np.zeros((5000, 2), np.float32), *[np.full((5, 2), 9, np.float32)] * 40]
    large = [bag + np.random.default_rng(0).normal(0, 0.1, bag.shape).astype(np.float32) for bag in large]
    seen = []
    limited = BagOfVisualWords(2, per_bag=5, batch_size=64, passes=1)
    for batch in limited._batches(large, np.random.RandomState(0), lambda: None):
        seen.append(batch)
    assert sum(map(len, seen)) == 5 * 41
    assert (np.concatenate(seen) > 5).all(axis=1).sum() == 5 * 40


def test_an_empty_bag_is_a_row_of_zeros():
    fitted = BagOfVisualWords(4).fit([*bags(), np.empty((0, 8), np.float32)])
    rows = fitted.transform([np.empty((0, 8), np.float32), bags()[0]])
    assert not rows[0].any()
    assert rows[1].any()


def test_one_rare_descriptor_decides_by_max_pooling():
    """The paper's point (3.1): a single lesion is enough, which a mean over descriptors drowns."""
    labels = np.arange(40) % 2
    apart = {}
    for pooling in ("max", "mean"):
        rows = BagOfVisualWords(10, "semi-soft", pooling, batch_size=200).fit(bags()).transform(bags(1, 40))
        ill, well = rows[labels == 1], rows[labels == 0]
        apart[pooling] = (np.abs(ill.mean(axis=0) - well.mean(axis=0)) / rows.std(axis=0)).max()
    assert apart["max"] > 1.5
    model = make_pipeline(BagOfVisualWords(10, batch_size=200), HistogramSVM())
    assert model.fit(bags(0, 40), labels).score(bags(1, 40), labels) > 0.95


def test_a_stored_dictionary_is_the_same_to_the_last_bit():
    fitted = BagOfVisualWords(4, "soft").fit(bags())
    again = BagOfVisualWords.from_json(json.loads(json.dumps(fitted.to_json(), allow_nan=False)))
    assert np.array_equal(again.transform(bags(1)), fitted.transform(bags(1)))
    assert again.words_.dtype == fitted.words_.dtype == np.float32
    assert again.get_params() == fitted.get_params()
    with pytest.raises(ValueError, match="bags have 5 features, but BagOfVisualWords is expecting 8"):
        again.transform([np.zeros((3, 5), np.float32)])
    for broken in ({}, {**fitted.to_json(), "parameters": {"D": 1}}):
        with pytest.raises(ValueError, match="no stored BagOfVisualWords"):
            BagOfVisualWords.from_json(broken)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coding": "semisoft"}, "coding='semisoft' must be one of hard, soft, semi-soft"),
        ({"pooling": "median"}, "pooling='median' must be one of auto, max, mean, sum"),
        ({"words": 0}, "words=0 must be at least 1"),
        ({"eps": 0}, "must be above 0"),
        ({"words": 2000}, "words=2000, but n_samples="),
    ],
)
def test_what_cannot_be_learnt_is_said(settings, words):
    with pytest.raises(ValueError, match=words):
        BagOfVisualWords(**settings).fit(bags())


def test_the_search_takes_the_best_pair_and_keeps_patients_together():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 0, 1], 15)
    patients = np.arange(60) // 2
    X = np.abs(rng.normal(0, 1, (60, 12))) + 0.8 * y[:, None] * (np.arange(12) < 3)
    X /= X.sum(axis=1, keepdims=True)
    told = []
    machine, tried = search_svm(X, y, patients, [0.1, 10.0], [0.1, 1.0], lambda: told.append(1))
    assert [(t["C"], t["gamma"]) for t in tried] == [(0.1, 0.1), (0.1, 1.0), (10.0, 0.1), (10.0, 1.0)]
    assert len(told) == 4
    scale = 1 / (12 * X.var())
    for pair in tried:
        decisions = np.empty(60)
        for learn, test in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(X, y, patients):
            assert not set(patients[learn]) & set(patients[test])
            svc = SVC(C=pair["C"], gamma=pair["gamma"] * scale, class_weight="balanced").fit(X[learn], y[learn])
            decisions[test] = svc.decision_function(X[test])
        assert pair["auc"] == pytest.approx(roc_auc_score(y, decisions))
    best = max(tried, key=lambda pair: pair["auc"])
    assert (machine.C, machine.gamma) == (best["C"], best["gamma"] * scale)
    with pytest.raises(ValueError, match="more patients of each class"):
        search_svm(X, y, np.where(y == 1, 0, patients + 1), [1.0], [1.0])
