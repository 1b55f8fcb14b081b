"""The decision threshold: a two-class support vector machine on one score (paper A, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.svm import SVC


@dataclass(frozen=True)
class Threshold:
    """Scores from `value` on are unhealthy. `origin` says where the value comes from."""

    value: float
    origin: Literal["svm", "prior"] = "svm"

    def decide(self, scores: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """0 or 1 for each score."""
        return (np.asarray(scores, np.float64) >= self.value).astype(np.int64)


def fit_threshold(scores: npt.ArrayLike, labels: npt.ArrayLike, C: float = 1.0) -> Threshold:
    """The boundary of a linear, class-balanced support vector machine on the log-odds of probabilities.

    `scores` are probabilities (n,), `labels` 0 or 1; ValueError unless both classes are there. Log-odds are
    standardised first: a machine of fixed C puts the boundary outside scores that lie close together. Where scores do
    not rise with the labels, or the boundary still parts none of them, no threshold of that direction exists: then it
    is 0.5, and `origin` says "prior".
    """
    p, y = np.asarray(scores, np.float64), np.asarray(labels, np.int64)
    if set(y.tolist()) != {0, 1}:
        seen = sorted(set(y.tolist()))
        raise ValueError(f"the decision threshold needs validation photographs of both classes, got labels {seen}")
    odds = log_odds(p)
    mean, spread = float(odds.mean()), float(odds.std()) or 1.0
    machine = SVC(kernel="linear", C=C, class_weight="balanced").fit((odds[:, None] - mean) / spread, y)
    slope, offset = float(machine.coef_[0, 0]), float(machine.intercept_[0])
    at = mean - spread * offset / slope if slope > 0 else np.nan
    if not odds.min() < at <= odds.max():
        return Threshold(0.5, "prior")
    return Threshold(float(1 / (1 + np.exp(-at))))


def log_odds(probabilities: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """log(p / (1 - p)), kept finite for probabilities that float32 has rounded to 0 or 1."""
    p = np.clip(np.asarray(probabilities, np.float64), 1e-12, 1 - 1e-12)
    return np.log(p / (1 - p))
