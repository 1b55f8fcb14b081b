"""Where crops are centred: border rules, the highest point, the densest place, the K highest maxima (paper A, 2.2).

A map is looked at box by box, and what the boxes show is put together afterwards. Everything that a box keeps is
mergeable (the first N in a total order, the highest of a block), so the result depends on the map alone, not on how
it was cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.ndimage import maximum_filter
from sklearn.cluster import DBSCAN, MeanShift
from sklearn.neighbors import radius_neighbors_graph

from tilestream.engine import Peak, highest, highest_of
from tilestream.geometry import Extent, Region, interior

Floats = npt.NDArray[np.floating[Any]]
Places = npt.NDArray[np.int64]
_CORE = 1000
BLOCK_PX = 8
"""Side of the blocks of which candidates take the highest point."""


@dataclass(frozen=True)
class FieldOfView:
    """The circle in which a photograph shows the eye, and the rows where it is cut off; px of the photograph."""

    y_px: float
    x_px: float
    radius_px: float
    first_row_px: float
    last_row_px: float


@dataclass(frozen=True)
class Border:
    """Which points of a map may be centres; `extent` is the map's, `photograph` that of the photograph (default: it).

    Without a field of view the frame rule, Formula 1: kappa * h < y < h - kappa * h, likewise x. With one the circle
    rule: the distance to the circle's centre is under (1 - 2 kappa) of its radius, and rows lie inside the cuts by
    more than kappa of the height between them; a map of another size is compared through the photograph's pixels.
    ValueError where no point is left.
    """

    extent: Extent
    kappa: float
    field: FieldOfView | None = None
    photograph: Extent | None = None

    @cached_property
    def box(self) -> Region:
        """The smallest box that holds all points that are allowed."""
        if self.field is None:
            return interior(self.extent, self.kappa)
        ends = []
        for inside in self._sides(Region.whole(self.extent)):
            if not inside.any():
                raise ValueError(f"border={self.kappa} leaves no pixel of the field of view {self.field}")
            ends += [int(inside.argmax()), len(inside) - int(inside[::-1].argmax())]
        return Region(*ends)

    def mask(self, region: Region) -> npt.NDArray[np.bool_]:
        """(h, w): which points of a region are allowed."""
        if self.field is None:
            allowed = np.zeros(region.shape, bool)
            allowed[region.intersect(self.box).within(region)] = True
            return allowed
        ys, xs = self._offsets(region)
        rows, columns = self._sides(region)
        near: npt.NDArray[np.bool_] = ys[:, None] ** 2 + xs**2 < self._reach_px**2
        return near & rows[:, None] & columns

    @property
    def _reach_px(self) -> float:
        assert self.field is not None
        return (1 - 2 * self.kappa) * self.field.radius_px

    def _offsets(self, region: Region) -> tuple[Floats, Floats]:
        """Rows and columns of a region, in px of the photograph from the circle's centre."""
        assert self.field is not None
        ys, xs = (
            (np.arange(start, stop) + 0.5) * (whole / n) - 0.5
            for start, stop, whole, n in zip(
                (region.y0, region.x0), (region.y1, region.x1), self.photograph or self.extent, self.extent, strict=True
            )
        )
        return ys - self.field.y_px, xs - self.field.x_px

    def _sides(self, region: Region) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which rows and which columns of a region can hold points that are allowed."""
        assert self.field is not None
        (ys, xs), cut = self._offsets(region), self.field
        share_px = self.kappa * (cut.last_row_px - cut.first_row_px)
        first, last = cut.first_row_px + share_px - cut.y_px, cut.last_row_px - share_px - cut.y_px
        return (np.abs(ys) < self._reach_px) & (first < ys) & (ys < last), np.abs(xs) < self._reach_px


def eye_rules(
    extent: Extent, kappa: float, field: FieldOfView | None = None, rule: Literal["frame", "circle"] = "frame"
) -> list[Border]:
    """What a place on the eye obeys: the rule (the frame's without a field of view), and the field of view.

    On a frame of 3:2 a fifth of what the frame rule leaves is the black around the field of view. A centre drawn there
    would make chance look worse than it is, and as a healthy crop would give the class away.
    """
    if field is not None and rule == "circle":
        return [Border(extent, kappa, field)]
    return [Border(extent, kappa), *([] if field is None else [Border(extent, 0, field)])]


@dataclass(frozen=True)
class Search:
    """How centres are looked for. Distances are px of the photograph."""

    centre: Literal["argmax", "density"] = "argmax"
    candidates: int = 1
    distance_px: int = 256
    algorithm: Literal["mean_shift", "dbscan"] = "mean_shift"
    bandwidth_px: float = 128
    strongest: int = 1000


class Points(NamedTuple):
    """Points of a map with their values, strongest first; ties go to the smallest (y, x)."""

    y_px: Places
    x_px: Places
    value: Floats

    def first(self, count: int) -> Points:
        """The strongest `count` of them, in order."""
        order = np.lexsort((self.x_px, self.y_px, -self.value))[:count]
        return Points(self.y_px[order], self.x_px[order], self.value[order])

    def peak(self, index: int) -> Peak:
        return Peak(int(self.y_px[index]), int(self.x_px[index]), float(self.value[index]))


@dataclass(frozen=True)
class Seen:
    """What is kept of a box of a map: its highest point, its strongest points, the highest of each of its blocks."""

    peak: Peak | None
    strongest: Points | None = None
    blocks: Points | None = None


def look(values: Floats, region: Region, border: Border, search: Search) -> Seen:
    """What a box of a map, (h, w) covering `region`, has for `conclude`; ValueError for NaN inside the border."""
    allowed = region.intersect(border.box)
    if allowed.empty:
        return Seen(None)
    peak = highest(values, region, allowed)  # refuses NaN
    inside = values[allowed.within(region)]
    if border.field is not None:
        inside = np.where(border.mask(allowed), inside, -np.inf)
        if not np.isfinite(inside).any():
            return Seen(None)
        peak = highest(inside, allowed, allowed)
    return Seen(
        peak,
        strongest(inside, allowed, search.strongest) if search.centre == "density" else None,
        block_maxima(inside, allowed) if search.candidates > 1 else None,
    )


def conclude(seen: Iterable[Seen], border: Border, search: Search) -> list[Peak]:
    """The centre and after it up to `candidates` - 1 more of the map's maxima, in px of the photograph.

    The centre is the highest point, or the densest place (`densest`). The others are local maxima (no block around
    is higher), the highest first, each at least `distance_px` from all before it. Maps of one value may have fewer.
    """
    parts = list(seen)
    extent = border.photograph or border.extent
    if search.centre == "argmax":
        points = [highest_of([part.peak for part in parts])]
        centre = _on_photograph(Points(*(np.asarray([v]) for v in points[0])), border.extent, extent).peak(0)
    else:
        found = _together([part.strongest for part in parts]).first(search.strongest)
        centre = densest(_on_photograph(found, border.extent, extent), search)
    if search.candidates == 1:
        return [centre]
    maxima = _on_photograph(
        local_maxima(_together([part.blocks for part in parts]), border.extent), border.extent, extent
    )
    return spread([centre], maxima, search.candidates, search.distance_px)


def strongest(values: Floats, region: Region, count: int) -> Points:
    """The `count` strongest finite points of a box, or all if it has fewer."""
    flat = np.ascontiguousarray(values).ravel()
    if flat.size > count:
        least = np.partition(flat, -count)[-count]
        above = np.flatnonzero(flat > least)
        chosen = np.concatenate([above, np.flatnonzero(flat == least)[: count - len(above)]])
    else:
        chosen = np.arange(flat.size)
    chosen = chosen[np.isfinite(flat[chosen])]
    y, x = np.divmod(chosen, region.width)
    return Points(y + region.y0, x + region.x0, flat[chosen]).first(count)


def block_maxima(values: Floats, region: Region) -> Points:
    """The highest finite point of each of the map's blocks of 8 x 8 px that a box meets."""
    top, left = region.y0 % BLOCK_PX, region.x0 % BLOCK_PX
    missing = ((top, -(top + region.height) % BLOCK_PX), (left, -(left + region.width) % BLOCK_PX))
    padded = np.pad(values, missing, constant_values=-np.inf)
    rows, columns = padded.shape[0] // BLOCK_PX, padded.shape[1] // BLOCK_PX
    blocks = padded.reshape(rows, BLOCK_PX, columns, BLOCK_PX).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    at = blocks.argmax(axis=1)  # the first of equals has the smallest (y, x)
    value, number = blocks[np.arange(len(at)), at], np.arange(len(at))
    y = region.y0 - top + BLOCK_PX * (number // columns) + at // BLOCK_PX
    x = region.x0 - left + BLOCK_PX * (number % columns) + at % BLOCK_PX
    kept = np.isfinite(value)
    return Points(y[kept], x[kept], value[kept])


def local_maxima(blocks: Points, extent: Extent) -> Points:
    """Of blocks' highest points those that no neighbouring block's exceeds; blocks in parts are put together first."""
    ordered = blocks.first(len(blocks.value))
    rows, columns = (-(-n // BLOCK_PX) for n in extent)
    places = ordered.y_px // BLOCK_PX * columns + ordered.x_px // BLOCK_PX
    _, first = np.unique(places, return_index=True)  # of a block that two boxes share, the higher part
    whole = Points(ordered.y_px[first], ordered.x_px[first], ordered.value[first])
    grid = np.full((rows, columns), -np.inf, whole.value.dtype)
    grid.ravel()[places[first]] = whole.value
    around = maximum_filter(grid, 3, mode="constant", cval=-np.inf).ravel()[places[first]]
    kept = whole.value >= around
    return Points(whole.y_px[kept], whole.x_px[kept], whole.value[kept]).first(int(kept.sum()))


def spread(first: list[Peak], points: Points, count: int, distance_px: float) -> list[Peak]:
    """`first`, and the strongest of `points` that lie at least `distance_px` from all taken before, `count` in all.

    At a distance under 1 px a point would be taken twice.
    """
    taken = list(first)
    far = np.ones(len(points.value), bool)
    for each in taken:
        far &= np.hypot(points.y_px - each.y_px, points.x_px - each.x_px) >= distance_px
    while len(taken) < count and far.any():
        taken.append(points.peak(int(far.argmax())))
        far &= np.hypot(points.y_px - taken[-1].y_px, points.x_px - taken[-1].x_px) >= distance_px
    return taken


def densest(points: Points, search: Search) -> Peak:
    """Of the strongest points the one nearest to the centre of their densest cluster; among equals the strongest.

    Mean shift (Comaniciu and Meer 2002; flat kernel of `bandwidth_px`, seeds on a grid of it): the mode with most
    points within the bandwidth; it knows no weights. DBSCAN (Ester et al. 1996; eps = `bandwidth_px`): points weigh as
    much as their saliency, cores are those around which there is at least half of what there is around the densest,
    and the cluster of the greatest weight has its centre of gravity as its centre.
    """
    places = np.stack([points.y_px, points.x_px], axis=1).astype(np.float64)
    if search.algorithm == "mean_shift":
        seeds = np.unique(np.rint(places / search.bandwidth_px), axis=0) * search.bandwidth_px
        middle = MeanShift(bandwidth=search.bandwidth_px, seeds=seeds).fit(places).cluster_centers_[0]  # the densest
    else:
        positive = np.maximum(points.value.astype(np.float64), 0)
        weights = positive if positive.any() else np.ones(len(positive))
        around = radius_neighbors_graph(places, search.bandwidth_px, include_self=True) @ weights
        weights *= 2 * _CORE / around.max()  # scikit-learn takes a whole number for what makes a core
        found = DBSCAN(eps=search.bandwidth_px, min_samples=_CORE).fit(places, sample_weight=weights)
        sums = np.bincount(found.labels_[found.labels_ >= 0], weights[found.labels_ >= 0])
        members = found.labels_ == sums.argmax()
        middle = np.average(places[members], axis=0, weights=weights[members])
    return points.peak(int(((places - middle) ** 2).sum(axis=1).argmin()))


def _together(parts: Iterable[Points | None]) -> Points:
    found = [part for part in parts if part is not None]
    if not found:
        raise ValueError("no cell of the image is inside the border")
    return Points(*(np.concatenate(each) for each in zip(*found, strict=True)))


def _on_photograph(points: Points, extent: Extent, photograph: Extent) -> Points:
    """Points of a map in px of the photograph: the nearest to (i + 1/2) H / S - 1/2."""
    y, x = (
        np.clip(np.rint((at + 0.5) * whole / n - 0.5).astype(np.int64), 0, whole - 1)
        for at, n, whole in zip((points.y_px, points.x_px), extent, photograph, strict=True)
    )
    return Points(y, x, points.value)
