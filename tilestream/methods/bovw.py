"""The bag of visual words: a dictionary of local descriptors, coding by it, pooling (paper B, 3.1; Pires et al. 2014).

The machine that decides on the pooled words is `estimators.HistogramSVM`; `search_svm` finds its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.svm import SVC
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from .estimators import HistogramSVM

Floats = npt.NDArray[np.float64]
Coding = Literal["hard", "soft", "semi-soft"]
Pooling = Literal["auto", "max", "mean", "sum"]
_ROWS = 4096
"""Descriptors that are coded at a time: what bounds memory, however large a bag is."""


class BagOfVisualWords(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Bags of descriptors to histograms of visual words.

    X is a sequence of bags, each (n_i, d), read one at a time; a table (n, d) is n bags of one descriptor. The
    dictionary is k-means' on mini-batches of `batch_size` descriptors, at most `per_bag` of each bag, in `passes` over
    the bags in random order.

    coding: of a descriptor at the Euclidean distances d to the words: hard, 1 for the nearest word; soft, K / sum K
    with K = exp(-d^2 / 2 sigma^2); semi-soft, 1 / (d + eps). pooling: over a bag's descriptors; auto is what the
    coding is published with: the sum of hard, the maximum of the others. The pooled vector is divided by its sum. A bag
    without descriptors is a row of zeros. sigma: None for the root mean square distance to the nearest word.

    Fitted: words_ (words, d), sigma_, n_features_in_ (d).
    """

    def __init__(
        self,
        words: int = 1000,
        coding: Coding = "semi-soft",
        pooling: Pooling = "auto",
        sigma: float | None = None,
        eps: float = 1e-3,
        per_bag: int = 1000,
        passes: int = 3,
        batch_size: int = 10_000,
        random_state: int | None = 0,
    ) -> None:
        self.words, self.coding, self.pooling, self.sigma, self.eps = words, coding, pooling, sigma, eps
        self.per_bag, self.passes, self.batch_size, self.random_state = per_bag, passes, batch_size, random_state

    def fit(self, X: Any, y: Any = None, on_bag: Callable[[], None] = lambda: None) -> Self:
        """Learns the dictionary; `on_bag` is called after each bag, passes * n times in all.

        ValueError for unknown codings and poolings, and where there are fewer descriptors than words.
        """
        self._check()
        bags = self._bags(X, fitting=True)
        random = check_random_state(self.random_state)
        means = MiniBatchKMeans(
            self.words, batch_size=self.batch_size, n_init=3, random_state=random.randint(2**31 - 1)
        )
        distances = list[float]()
        for batch in self._batches(bags, random, on_bag):
            if not distances and len(batch) < self.words:
                raise ValueError(
                    f"words={self.words}, but n_samples={len(batch)} descriptors are there; use fewer words"
                )
            means.partial_fit(batch)
            distances.append(float(np.square(means.transform(batch).min(axis=1)).mean()))
        self.words_ = means.cluster_centers_
        last = distances[-max(1, len(distances) // self.passes) :]  # of the last pass
        self.sigma_ = float(self.sigma if self.sigma is not None else np.sqrt(np.mean(last))) or 1.0
        return self

    def transform(self, X: Any) -> Floats:
        """Histograms of words, (n, words) float64, rows of sum 1, or of zeros where a bag is empty."""
        check_is_fitted(self)
        bags = self._bags(X, fitting=False)
        rows: Floats = np.zeros((len(bags), len(self.words_)))
        for row, bag in zip(rows, bags, strict=True):
            row[:] = self.pool(np.asarray(bag))
        return rows

    def code(self, descriptors: npt.NDArray[Any]) -> Floats:
        """What descriptors (n, d) say of the words, before pooling: (n, words)."""
        distances = euclidean_distances(descriptors, self.words_)
        if self.coding == "hard":
            codes = np.zeros(distances.shape)
            codes[np.arange(len(codes)), distances.argmin(axis=1)] = 1
            return codes
        if self.coding == "soft":
            shares: Floats = softmax(-np.square(distances, dtype=np.float64) / (2 * self.sigma_**2), axis=1)
            return shares
        near: Floats = 1 / (distances.astype(np.float64) + self.eps)
        return near

    def pool(self, bag: npt.NDArray[Any]) -> Floats:
        """The histogram of one bag (n, d): (words,)."""
        pooled: Floats = np.zeros(len(self.words_))
        over = "sum" if self.coding == "hard" else "max"
        over = over if self.pooling == "auto" else self.pooling
        for start in range(0, len(bag), _ROWS):
            codes = self.code(bag[start : start + _ROWS])
            pooled = np.maximum(pooled, codes.max(axis=0)) if over == "max" else pooled + codes.sum(axis=0)
        total = pooled.sum()  # mean and sum are the same then: what parts them is gone
        return pooled / total if total else pooled

    def _check(self) -> None:
        for name, known in (("coding", Coding), ("pooling", Pooling)):
            if getattr(self, name) not in known.__args__:  # type: ignore[attr-defined]
                choices = ", ".join(known.__args__)  # type: ignore[attr-defined]
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {choices}")
        for name in ("words", "per_bag", "passes", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.eps <= 0 or (self.sigma is not None and self.sigma <= 0):
            raise ValueError(f"eps={self.eps} and sigma={self.sigma} must be above 0")

    def _bags(self, X: Any, fitting: bool) -> Sequence[npt.NDArray[Any]]:
        """Bags of one length of descriptors; a table's rows are bags of one."""
        first = X[0] if isinstance(X, Sequence) and len(X) else None
        if getattr(first, "ndim", 1) != 2:
            table = validate_data(self, X, dtype=[np.float64, np.float32], reset=fitting)
            return list(table[:, None])
        dim = check_array(first, dtype=None, ensure_min_samples=0).shape[1]
        if fitting:
            self.n_features_in_ = dim
        elif dim != self.n_features_in_:
            raise ValueError(f"bags have {dim} features, but BagOfVisualWords is expecting {self.n_features_in_}")
        bags: Sequence[npt.NDArray[Any]] = X
        return bags

    def _batches(
        self, bags: Sequence[npt.NDArray[Any]], random: np.random.RandomState, on_bag: Callable[[], None]
    ) -> Iterator[npt.NDArray[Any]]:
        """Descriptors of several bags together, in random order; the last few of all go with those before them."""
        least = max(self.batch_size, self.words)
        for _ in range(self.passes):
            waiting: list[npt.NDArray[Any]] = []
            for index in random.permutation(len(bags)):
                bag = np.asarray(bags[index])
                waiting.append(bag[random.permutation(len(bag))[: self.per_bag]])
                on_bag()
                if sum(map(len, waiting)) >= 2 * least:
                    batch = random.permutation(np.concatenate(waiting))
                    yield batch[:least]
                    waiting = [batch[least:]]
            batch = random.permutation(np.concatenate(waiting))
            yield from np.array_split(batch, max(1, len(batch) // least))

    @property
    def _n_features_out(self) -> int:
        return len(self.words_)

    def to_json(self) -> dict[str, Any]:
        """All of a fitted dictionary, in what JSON can hold; `from_json` gives the same, to the last bit."""
        check_is_fitted(self)
        kind = str(self.words_.dtype)
        return {"parameters": self.get_params(), "words_": self.words_.tolist(), "dtype": kind, "sigma_": self.sigma_}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """A fitted dictionary from `to_json`; ValueError when something is missing."""
        try:
            found = cls(**stored["parameters"])
            found.words_ = np.asarray(stored["words_"], stored["dtype"])
            found.sigma_, found.n_features_in_ = stored["sigma_"], found.words_.shape[1]
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no stored {cls.__name__}: {error} is missing or unknown; fit it again") from None
        return found


def svm_folds(y: npt.NDArray[np.int64], groups: npt.NDArray[Any]) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Of the grid search, (rows to learn from, rows to decide): five folds, fewer where a class has fewer patients.

    ValueError for too few patients of a class: fewer than two, or so few that a fold would learn from one class alone.
    """
    count = min(5, *(len(set(groups[y == label])) for label in (0, 1)))
    folds = list(StratifiedGroupKFold(count, shuffle=True, random_state=0).split(y, y, groups)) if count > 1 else []
    if not folds or any(len(set(y[learnt])) < 2 for learnt, _ in folds):
        raise ValueError("the grid search needs training photographs of more patients of each class, of two at least")
    return folds


def search_svm(
    X: Floats,
    y: npt.NDArray[np.int64],
    groups: npt.NDArray[Any],
    costs: Sequence[float],
    gammas: Sequence[float],
    on_fit: Callable[[], None] = lambda: None,
) -> tuple[HistogramSVM, list[dict[str, float]]]:
    """The class-balanced SVM (rbf) of the highest cross-validated AUC over all C and gamma, fitted; and every AUC.

    X (n, words), y 0 or 1, groups (n,): photographs of one patient are never parted; `gammas` are multiples of
    scikit-learn's "scale". The folds are those of `svm_folds`; decisions of all are ranked together. Of equal AUCs the
    first wins. The list has C, gamma (the multiple) and auc of each pair, in order.
    """
    cv = svm_folds(y, groups)
    scale, tried = 1 / (X.shape[1] * float(X.var()) or 1.0), []
    for C, gamma in product(costs, gammas):
        machine = SVC(C=C, gamma=gamma * scale, class_weight="balanced")
        decisions = cross_val_predict(machine, X, y, cv=cv, method="decision_function")
        tried.append({"C": C, "gamma": gamma, "auc": float(roc_auc_score(y, decisions))})
        on_fit()
    best = max(tried, key=lambda found: found["auc"])
    return HistogramSVM(best["C"], gamma=best["gamma"] * scale).fit(X, y), tried
