"""The last steps of both listings as scikit-learn classifiers: histogram to SVM, and scores of crops to a decision.

Both take two classes, hold nothing but arrays, and are kept as JSON: reading one back runs no code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.svm import SVC
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from .decision import fit_threshold, log_odds

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]
AGGREGATES: dict[str, Callable[[Floats], Floats]] = {
    "first": lambda p: p[:, 0],
    "mean": lambda p: p.mean(axis=1),
    "max": lambda p: p.max(axis=1),
}


class _TwoClasses(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """What both share: labels of two classes in, and decisions where the decision function is positive."""

    def _check(self, X: Any, y: Any) -> tuple[Floats, Array]:
        """Features as float64 and labels as 0 or 1; ValueError unless there are two classes."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            name, seen = type(self).__name__, len(self.classes_)
            many = "" if seen < 2 else " Only binary classification is supported."
            raise ValueError(f"{name} needs labels of two classes, got {seen} class{'es' * (seen > 1)}.{many}")
        return X, codes

    def _features(self, X: Any) -> Floats:
        check_is_fitted(self)
        features: Floats = validate_data(self, X, dtype=np.float64, reset=False)
        return features

    def decision_function(self, X: Any) -> Floats:
        raise NotImplementedError

    def _odds(self, X: Any) -> Floats:
        """Log-odds of the second class, 0 where the decision function is."""
        return self.decision_function(X)

    def predict(self, X: Any) -> Array:
        """The class of each row, (n,): the second of `classes_` where the decision function is positive."""
        positive = self.decision_function(X) > 0
        chosen: Array = self.classes_[positive.astype(int)]
        return chosen

    def predict_proba(self, X: Any) -> Floats:
        """Probabilities of both classes, (n, 2), 1/2 on the boundary and rising with the decision function."""
        odds = self._odds(X)
        probabilities: Floats = expit(np.stack([-odds, odds], axis=1))
        return probabilities

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class HistogramSVM(_TwoClasses):
    """A class-balanced support vector machine on histograms of window probabilities (paper A, Listing 1, line 22).

    X is (n, bins), shares of windows (any features will do). Probabilities are those of one slope, Platt's without his
    offset, fitted on cross-validated decisions with both classes weighing alike: 1/2 lies on the machine's boundary.
    Where cross-validated decisions do not rise with the labels the slope is the least, and probabilities still rank.

    Fitted: classes_, n_features_in_, support_vectors_ (m, bins), dual_coef_ (m,), intercept_, gamma_, slope_.
    """

    def __init__(
        self, C: float = 1.0, kernel: Literal["rbf", "linear"] = "rbf", gamma: float | Literal["scale"] = "scale"
    ) -> None:
        self.C, self.kernel, self.gamma = C, kernel, gamma

    def fit(self, X: Any, y: Any) -> Self:
        """Fits the machine, then the slope. ValueError for other than two classes, each with two rows at least."""
        X, y = self._check(X, y)
        least = int(np.bincount(y).min())
        if least < 2:
            raise ValueError(f"HistogramSVM needs two rows of each class at least, got {least} of one class")
        if self.kernel not in ("rbf", "linear"):
            raise ValueError(f"kernel={self.kernel!r} must be 'rbf' or 'linear'")
        spread = float(X.var())
        self.gamma_ = 1 / (X.shape[1] * spread or 1.0) if self.gamma == "scale" else float(self.gamma)
        machine = SVC(C=self.C, kernel=self.kernel, gamma=self.gamma_, class_weight="balanced")
        folds = StratifiedKFold(min(5, least), shuffle=True, random_state=0)
        held_out = cross_val_predict(machine, X, y, cv=folds, method="decision_function")
        line = LogisticRegression(fit_intercept=False, class_weight="balanced").fit(held_out[:, None], y)
        self.slope_ = max(float(line.coef_[0, 0]), 0.01)
        machine.fit(X, y)
        self.support_vectors_, self.dual_coef_ = machine.support_vectors_, machine.dual_coef_[0]
        self.intercept_ = float(machine.intercept_[0])
        return self

    def decision_function(self, X: Any) -> Floats:
        """Signed distances to the boundary, (n,), in the machine's units, as scikit-learn's SVC gives them."""
        X = self._features(X)
        options = {"gamma": self.gamma_} if self.kernel == "rbf" else {}
        kernel = pairwise_kernels(X, self.support_vectors_, metric=self.kernel, **options)
        decisions: Floats = kernel @ self.dual_coef_ + self.intercept_
        return decisions

    def _odds(self, X: Any) -> Floats:
        return self.decision_function(X) * self.slope_

    def to_json(self) -> dict[str, Any]:
        """All of a fitted machine, in what JSON can hold; `from_json` gives the same machine, to the last bit."""
        check_is_fitted(self)
        arrays = {name: getattr(self, name).tolist() for name in ("classes_", "support_vectors_", "dual_coef_")}
        plain = {name: getattr(self, name) for name in ("gamma_", "slope_", "intercept_", "n_features_in_")}
        return {"parameters": self.get_params(), **arrays, **plain}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """A fitted machine from `to_json`; ValueError when something is missing."""
        values = dict(stored)
        try:
            machine = cls(**values.pop("parameters"))
            for name in ("classes_", "support_vectors_", "dual_coef_"):
                setattr(machine, name, np.asarray(values.pop(name)))
            for name in ("gamma_", "slope_", "intercept_", "n_features_in_"):
                setattr(machine, name, values.pop(name))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no stored {cls.__name__}: {error} is missing or unknown; fit it again") from None
        return machine


class CropDecision(_TwoClasses):
    """The final decision of Listing 2: a two-class SVM on the network's score of a photograph's crops (section 2.2).

    X is (n, K), log-odds (the difference of both logits) of a photograph's K crops, K = 1 as published; `aggregate` of
    their probabilities (the first, their mean, their maximum) is the score. It must rise with the class: where it does
    not, the threshold is a probability of 1/2, and `threshold_.origin` says "prior".

    Fitted: classes_, n_features_in_, threshold_ (a `Threshold`, in probability).
    """

    def __init__(self, aggregate: Literal["first", "mean", "max"] = "mean", C: float = 1.0) -> None:
        self.aggregate, self.C = aggregate, C

    def fit(self, X: Any, y: Any) -> Self:
        """Fits the threshold. ValueError for other than two classes."""
        X, y = self._check(X, y)
        self.threshold_ = fit_threshold(self._score(X), y, self.C)
        return self

    def decision_function(self, X: Any) -> Floats:
        """Log-odds beyond the threshold's, (n,)."""
        return log_odds(self._score(self._features(X))) - log_odds(self.threshold_.value)

    def _score(self, X: Floats) -> Floats:
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate={self.aggregate!r} must be one of {', '.join(AGGREGATES)}")
        return AGGREGATES[self.aggregate](expit(X))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # one score that must rise: not a classifier of points in a plane
        return tags
