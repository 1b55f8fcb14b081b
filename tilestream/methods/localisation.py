"""Where centres and crops lie against known lesions, each rate beside what chance gives; values in, values out.

Chance is a centre drawn evenly from `allowed`, (H, W) bool: the points that the border rule leaves inside the field of
view. For one centre it is exact; for sets of crops it is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from tilestream.geometry import Extent, Region

from .bootstrap import Floats, divided, interval, percentiles, ratio, resampled
from .centres import FieldOfView, eye_rules
from .crops import crop_region
from .metrics import wilson

Mask = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
LEVELS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""False positives a photograph at which FROC is read (as in the LUNA16 and CAMELYON16 challenges)."""


@dataclass(frozen=True)
class Lesions:
    """The lesions of one photograph: 8-connected pixels of one kind each, as runs along rows.

    `mask` (H, W): pixels of any; `kinds`: of each lesion; run i covers [x0_px[i], x1_px[i]) of row y_px[i], and the
    runs of lesion j start at first[j].
    """

    mask: Mask
    kinds: tuple[str, ...]
    first: Integers
    y_px: Integers
    x0_px: Integers
    x1_px: Integers

    def __len__(self) -> int:
        return len(self.kinds)

    def distances_px(self, points: npt.ArrayLike) -> Floats:
        """(p, lesions): from points (p, 2) y, x to the nearest pixel of each lesion; 0 on it."""
        y, x = np.asarray(points, np.float64).reshape(-1, 2).T[:, :, None]
        across = np.maximum(np.maximum(self.x0_px - x, x - (self.x1_px - 1)), 0)
        squares = (self.y_px - y) ** 2 + across**2
        return np.sqrt(np.minimum.reduceat(squares, self.first, axis=1)) if len(self) else squares

    def held(self, centres: npt.ArrayLike, size_px: int) -> Mask:
        """(c, lesions): which lesions have a pixel in the crop of `size_px` around each of the centres (c, 2) y, x."""
        places = np.asarray(centres, np.int64).reshape(-1, 2)
        held = np.zeros((len(places), len(self)), bool)
        block = max(1, 4_000_000 // max(1, len(self.y_px)))
        for start in range(0, len(places) if len(self) else 0, block):
            part = slice(start, start + block)
            crops = [crop_region(self.mask.shape, (int(y), int(x)), size_px) for y, x in places[part]]
            y0, y1, x0, x1 = np.array([(r.y0, r.y1, r.x0, r.x1) for r in crops]).T[:, :, None]
            inside = (self.y_px >= y0) & (self.y_px < y1) & (self.x0_px < x1) & (self.x1_px > x0)
            held[part] = np.logical_or.reduceat(inside, self.first, axis=1)
        return held

    def pixels(self) -> tuple[Integers, Integers, Integers]:
        """y, x and lesion of every pixel of every lesion; one that two kinds share comes twice."""
        width = self.x1_px - self.x0_px
        start = np.repeat(self.x0_px - (width.cumsum() - width), width)
        of_run = np.repeat(np.arange(len(self)), np.diff(np.append(self.first, len(self.y_px))))
        return np.repeat(self.y_px, width), start + np.arange(width.sum()), np.repeat(of_run, width)


def find_lesions(masks: Mapping[str, npt.NDArray[Any]], extent: Extent) -> Lesions:
    """The lesions of a photograph of `extent`, from a mask (H, W) a kind, anything but 0 being lesion.

    Raises ValueError when a mask has another size.
    """
    union = np.zeros(extent, bool)
    kinds: list[str] = []
    runs: list[Integers] = [np.zeros((0, 4), np.int64)]
    for kind, mask in masks.items():
        if mask.shape != extent:
            raise ValueError(f"the mask of {kind} has shape {mask.shape}, its photograph {extent}; they must be equal")
        lit = (mask != 0).astype(np.uint8)
        x, y, width, height = cv2.boundingRect(lit)
        if width == 0:
            continue
        count, labels = cv2.connectedComponents(lit[y : y + height, x : x + width], connectivity=8)
        union |= lit.astype(bool)
        runs.append(_runs(labels) + np.array([len(kinds) - 1, y, x, x]))
        kinds += [kind] * (count - 1)
    lesion, y_px, x0_px, x1_px = np.concatenate(runs).T
    return Lesions(union, tuple(kinds), np.searchsorted(lesion, np.arange(len(kinds))), y_px, x0_px, x1_px)


def _runs(labels: npt.NDArray[np.int32]) -> Integers:
    """(r, 4): label, y, x0, x1 of every run of one label along a row, in order of labels; 0 is background."""
    padded = np.pad(labels, ((0, 0), (1, 1)))
    y, x = np.nonzero(padded[:, 1:] != padded[:, :-1])
    starts, ends = padded[y, x + 1] != 0, padded[y, x] != 0
    runs = np.stack([padded[y, x + 1][starts], y[starts], x[starts], x[ends]], axis=1).astype(np.int64)
    return runs[np.argsort(runs[:, 0], kind="stable")]


def allowed_centres(
    extent: Extent, border: float, field: FieldOfView | None, rule: Literal["frame", "circle"] = "frame"
) -> Mask:
    """(H, W): which points a centre drawn at random may have.

    Those that the rule with kappa = `border` leaves (see `Border`; without a field of view it is the frame's), inside
    the field of view where it is known. ValueError where none is left.
    """
    masks = [each.mask(Region.whole(extent)) for each in eye_rules(extent, border, field, rule)]
    allowed: Mask = np.logical_and.reduce(masks)
    if not allowed.any():
        raise ValueError(f"border={border} leaves no pixel of the field of view {field}; use a smaller one")
    return allowed


def near(mask: Mask, tolerance_px: float) -> Mask:
    """Pixels at most `tolerance_px` from one of the mask's."""
    if tolerance_px == 0:
        return mask
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    close: Mask = away <= tolerance_px
    return close & mask.any()


def pointing_chance(lesions: Lesions, allowed: Mask, tolerance_px: float = 0) -> float:
    """Probability that a centre drawn from `allowed` lies within `tolerance_px` of a lesion."""
    return float(near(lesions.mask, tolerance_px)[allowed].mean())


def holding_chance(lesions: Lesions, allowed: Mask, size_px: int) -> float:
    """Probability that the crop around a centre drawn from `allowed` holds a lesion's pixel; crops as `crop_region`."""
    total = cv2.integral(lesions.mask.astype(np.uint8))
    rows, columns = (np.flatnonzero(allowed.any(axis=axis)) for axis in (1, 0))
    height, width = allowed.shape
    y0, x0 = (np.clip(c - size_px // 2, 0, max(0, n - size_px)) for c, n in ((rows, height), (columns, width)))
    strip = total[np.minimum(y0 + size_px, height)] - total[y0]
    holds = strip[:, np.minimum(x0 + size_px, width)] > strip[:, x0]
    return float(holds[allowed[np.ix_(rows, columns)]].mean())


def hit_shares(lesions: Lesions, allowed: Mask, tolerance_px: float = 0) -> Floats:
    """(lesions,): probability that a centre drawn from `allowed` lies within `tolerance_px` of each lesion."""
    y, x, lesion = lesions.pixels()
    if tolerance_px:
        ends = np.searchsorted(lesion, np.arange(len(lesions) + 1))
        grown = [_grown(y[a:b], x[a:b], tolerance_px) for a, b in pairwise(ends)]
        y, x = (np.concatenate([each[axis] for each in grown] or [y]) for axis in (0, 1))
        lesion = np.repeat(np.arange(len(lesions)), [len(each[0]) for each in grown])
    inside = (y >= 0) & (y < allowed.shape[0]) & (x >= 0) & (x < allowed.shape[1])
    y, x, lesion = y[inside], x[inside], lesion[inside]
    shares: Floats = np.bincount(lesion, allowed[y, x], len(lesions)) / allowed.sum()
    return shares


def _grown(y: Integers, x: Integers, tolerance_px: float) -> tuple[Integers, Integers]:
    """The pixels at most `tolerance_px` from given ones, those too, wherever they lie."""
    top, left, reach = int(y.min()), int(x.min()), int(tolerance_px)
    own = np.zeros((int(y.max()) - top + 1, int(x.max()) - left + 1), bool)
    own[y - top, x - left] = True
    ys, xs = np.nonzero(near(np.pad(own, reach), tolerance_px))
    return ys + top - reach, xs + left - reach


def random_centres(
    allowed: Mask, draws: int, count: int, rng: np.random.Generator, distance_px: float = 0
) -> tuple[Integers, Mask]:
    """Draws of `count` centres each, one after the other and at least `distance_px` apart: (draws, count, 2) y, x.

    And (draws, count): which exist. A centre does not where 64 places drawn for it are all too near to others.
    """
    places = np.flatnonzero(allowed)
    centres, exist = np.zeros((draws, count, 2), np.int64), np.zeros((draws, count), bool)
    for index in range(count):
        tried = np.stack(np.divmod(places[rng.integers(0, len(places), (draws, 64))], allowed.shape[1]), axis=-1)
        away = np.hypot(*np.moveaxis(tried[:, :, None] - centres[:, None, :index], -1, 0))
        free = ((away >= distance_px) | ~exist[:, None, :index]).all(axis=2)
        exist[:, index] = free.any(axis=1)
        centres[:, index] = tried[np.arange(draws), free.argmax(axis=1)]
    return centres, exist


def coverage(lesions: Lesions, centres: npt.ArrayLike, size_px: int) -> Mask:
    """(c, lesions): which lesions the first 1 .. c crops have a pixel of."""
    return np.logical_or.accumulate(lesions.held(centres, size_px), axis=0)


def coverage_chance(
    lesions: Lesions, allowed: Mask, size_px: int, count: int, rng: np.random.Generator, *, draws: int = 200,
    distance_px: float = 0,
) -> tuple[Floats, Floats]:  # fmt: skip
    """What `coverage` is by chance: (count, lesions), and (count,) the probability that the first k crops hold any.

    Shares of `draws` sets of `random_centres`.
    """
    centres, exist = random_centres(allowed, draws, count, rng, distance_px)
    held = lesions.held(centres.reshape(-1, 2), size_px).reshape(draws, count, len(lesions)) & exist[:, :, None]
    covered = np.logical_or.accumulate(held, axis=1)
    return covered.mean(axis=0), covered.any(axis=2).mean(axis=0)


@dataclass(frozen=True)
class Marks:
    """What FROC needs of one photograph.

    `false` (f,): scores of the points that hit no lesion; `found` (lesions,): the best score that hit each lesion,
    -infinity if none did; `shares` (lesions,) and `share`: chances to hit each lesion and any (`hit_shares`,
    `pointing_chance`).
    """

    false: Floats
    found: Floats
    shares: Floats
    share: float


def mark(
    lesions: Lesions, points: npt.ArrayLike, scores: npt.ArrayLike, allowed: Mask, tolerance_px: float = 0
) -> Marks:
    """Marks of points (p, 2) y, x with their scores (p,): a point hits every lesion within `tolerance_px`.

    Further hits of a lesion are neither right nor wrong, as in LUNA16 (Setio et al. 2017).
    """
    hits, values = lesions.distances_px(points) <= tolerance_px, np.asarray(scores, np.float64)
    found = np.where(hits, values[:, None], -np.inf).max(axis=0, initial=-np.inf)
    shares = hit_shares(lesions, allowed, tolerance_px)
    return Marks(values[~hits.any(axis=1)], found, shares, pointing_chance(lesions, allowed, tolerance_px))


def beside_chance(
    counts: npt.ArrayLike, of: npt.ArrayLike, chance: npt.ArrayLike, groups: npt.ArrayLike, *, seed: int = 0
) -> dict[str, Any]:
    """The share sum(counts) / sum(of) of photographs' `counts` (n,) beside sum(chance) / sum(of), the expected one.

    value, low, high, chance, ratio, ratio_low, ratio_high; intervals are 95 %: Wilson's where each photograph counts
    0 or 1 of 1, otherwise from draws of whole groups, as is the ratio's. What is undefined is None.
    """
    hits, total, expected = (np.asarray(values, np.float64) for values in (counts, of, chance))
    bounds: dict[str, tuple[float | None, float | None]] = {"": (None, None), "ratio_": (None, None)}
    if len(hits):
        one = (total == 1).all() and np.isin(hits, (0, 1)).all()
        own = wilson(int(hits.sum()), len(hits)) if one else interval(ratio(hits, total), groups, seed=seed)
        bounds = {
            "": own or (None, None),
            "ratio_": interval(ratio(hits, expected), groups, seed=seed) or (None, None),
        }
    result = {f"{name}{end}": b for name, both in bounds.items() for end, b in zip(("low", "high"), both, strict=True)}
    sums = {"value": (hits, total), "chance": (expected, total), "ratio": (hits, expected)}
    return {name: float(a.sum() / b.sum()) if b.sum() else None for name, (a, b) in sums.items()} | result


def froc(
    marks: Sequence[Marks], groups: npt.ArrayLike, levels: Sequence[float] = LEVELS, *, seed: int = 0
) -> dict[str, Any]:
    """The free-response ROC: share of all lesions found when points above a score give `levels` false positives each.

    Lists by level: levels, sensitivity (of the lowest score that gives no more false positives), low, high, chance;
    then mean, mean_low, mean_high, mean_chance, ratio, ratio_low, ratio_high; curve: [false positives a photograph,
    sensitivity] from the highest score on, at most 200 corners; and most: the false positives a photograph of all
    points, beyond which a level is read where they end. Intervals are from draws of whole groups. Chance is that of
    points scattered evenly and independently of each other (a Poisson process, as dense in every photograph) so that
    the false positives are as many. Raises ValueError without a lesion.
    """
    lesions = np.array([len(m.found) for m in marks], np.float64)
    if lesions.sum() == 0:
        raise ValueError("no photograph has a lesion, so FROC has no sensitivity; use photographs with lesions")
    read = _Froc(marks, lesions, np.asarray(levels, np.float64))
    once = np.ones((1, len(marks)))
    sensitivity, expected = read.sensitivity(once)[0], read.expected()
    result: dict[str, Any] = {"levels": list(levels), "sensitivity": sensitivity.tolist()}
    drawn = [(read.sensitivity(w), divided(w @ expected.mean(axis=1), w @ lesions))
             for w in resampled(groups, seed, cells=len(read.photograph))]  # fmt: skip
    sensitivities, chances = (np.concatenate(each) for each in zip(*drawn, strict=True))
    bounds = [percentiles(sensitivities[:, i]) or (None, None) for i in range(len(levels))]
    result["low"], result["high"] = (list(each) for each in zip(*bounds, strict=True))
    result["chance"] = (expected.sum(axis=0) / lesions.sum()).tolist()
    mean, chance = float(sensitivity.mean()), float(np.mean(result["chance"]))
    result |= {"mean": mean, "mean_chance": chance, "ratio": mean / chance if chance else None}
    means = sensitivities.mean(axis=1)
    result["mean_low"], result["mean_high"] = percentiles(means) or (None, None)
    result["ratio_low"], result["ratio_high"] = percentiles(divided(means, chances)) or (None, None)
    return {**result, "most": read.most, "curve": read.curve()}


class _Froc:
    """The events of all photographs, the highest score first: lesions found and false positives."""

    def __init__(self, marks: Sequence[Marks], lesions: Floats, levels: Floats) -> None:
        self.marks, self.lesions, self.levels = marks, lesions, levels
        self.most = sum(len(m.false) for m in marks) / len(marks)
        scores = np.concatenate([np.concatenate([m.found, m.false]) for m in marks])
        right = np.concatenate([np.repeat([True, False], [len(m.found), len(m.false)]) for m in marks])
        photograph = np.repeat(np.arange(len(marks)), [len(m.found) + len(m.false) for m in marks])
        order = np.flatnonzero(scores > -np.inf)
        order = order[np.argsort(-scores[order], kind="stable")]
        self.right, self.photograph, scores = right[order], photograph[order], scores[order]
        self.last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else order

    def counts(self, weights: Floats) -> tuple[Floats, Floats]:
        """Lesions found and false positives above each distinct score, (d, s) each."""
        drawn = weights[:, self.photograph]
        found, false = ((drawn * which).cumsum(axis=1)[:, self.last] for which in (self.right, ~self.right))
        return found, false

    def sensitivity(self, weights: Floats) -> Floats:
        """(d, levels); NaN for draws without a lesion."""
        found, false = self.counts(weights)
        found = np.concatenate([np.zeros((len(found), 1)), found], axis=1)
        most = self.levels * weights.sum(axis=1)[:, None]
        at = np.stack([(false <= most[:, i : i + 1]).sum(axis=1) for i in range(len(self.levels))], axis=1)
        total = np.repeat((weights @ self.lesions)[:, None], len(self.levels), axis=1)
        return divided(np.take_along_axis(found, at, axis=1), total)

    def expected(self) -> Floats:
        """(photographs, levels): lesions that points of a Poisson process find, its density set by the level."""
        density = np.minimum(self.levels, self.most) / np.mean([1 - m.share for m in self.marks])
        return np.array([-np.expm1(-np.outer(m.shares, density)).sum(axis=0) for m in self.marks])

    def curve(self) -> list[list[float]]:
        found, false = (each[0] for each in self.counts(np.ones((1, len(self.marks)))))
        corners = np.stack([false / len(self.marks), found / self.lesions.sum()], axis=1).tolist()
        return [
            [0.0, 0.0],
            *(corners[i] for i in np.unique(np.linspace(0, len(corners) - 1, min(200, len(corners)), dtype=int))),
        ]
