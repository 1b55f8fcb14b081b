"""Intervals by resampling whole groups (patients), vectorised: a statistic takes a matrix of weights, a row a draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Weights (d, n), how often each of n samples is in each of d draws -> the statistic of each draw, (d,)."""

DRAWS = 2000
_CELLS = 2_000_000  # weights that are held at a time


def interval(
    statistic: Statistic, groups: ArrayLike, *, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float] | None:
    """The 95 % percentile interval (Efron 1979) of a statistic when `groups` (n,) are drawn with replacement.

    Samples of one group come together or not at all. Draws in which the statistic is undefined (NaN: a class is
    missing) are left out. None where the draws say nothing about the spread: fewer than two groups, more than half of
    the draws undefined, or all the same. The result depends on the seed, and not on how the groups are named.
    """
    return percentiles(np.concatenate([statistic(weights) for weights in resampled(groups, seed, draws)]))


def percentiles(values: Floats) -> tuple[float, float] | None:
    """The interval from a statistic's `values` (draws,): see `interval`."""
    known = values[~np.isnan(values)]
    if len(known) < max(1, len(values) / 2) or known.min() == known.max():
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def resampled(groups: ArrayLike, seed: int = 0, draws: int = DRAWS, cells: int = 0) -> Iterator[Floats]:
    """Weights (d, n) float64, in blocks of draws that add up to `draws`: how often each sample is in each draw.

    `cells`: numbers that a draw takes where they are more than n; blocks are smaller then.
    """
    names = np.asarray(groups)
    if names.ndim != 1 or names.size == 0:
        raise ValueError(f"groups has shape {names.shape}; it must be (n,) with n >= 1")
    _, first, of_sample = np.unique(names, return_index=True, return_inverse=True)
    of_sample = np.argsort(np.argsort(first))[of_sample]  # numbered as they appear, whatever their names
    count, rng = len(first), np.random.default_rng(seed)
    block = max(1, _CELLS // max(len(names), cells))
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        drawn = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        yield times[:, of_sample].astype(np.float64)


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Statistic:
    """The statistic sum(numerator) / sum(denominator), both (n,); NaN where the denominator's sum is 0."""
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)

    def statistic(weights: Floats) -> Floats:
        return divided(weights @ top, weights @ bottom)

    return statistic


def divided(numerator: Floats, denominator: Floats) -> Floats:
    """numerator / denominator, NaN where the denominator is 0."""
    quotient: Floats = np.divide(
        numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0
    )
    return quotient
