"""Sums over whole maps, taken tile by tile: what a tile contributes, how shares combine, what flows back.

Shares are added in the order of the tiles, in float64, so that results do not depend on who computed them when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tilestream.geometry import Extent, Region

Array = npt.NDArray[Any]
Kind = Literal["mean", "max", "amax", "moments", "logsumexp"]


@dataclass(frozen=True)
class Partial:
    """A share of a reduction, or all of it.

    `value` is (C, rows, columns): sums (float64), maxima, logarithms of sums of exponentials (float64); for moments
    (2 C, 1, 1), means of x and sums of the squares of its distances from them. For maxima `y` and `x` hold the place
    of each winner on the map, int64; ties go to the smallest (y, x). `count` is how many positions it is of, for amax
    how many hold the maximum.
    """

    value: Array
    y: Array | None = None
    x: Array | None = None
    count: Any = 0


@dataclass
class Reduction:
    """A map, `source`, reduced over all positions, or over each of `bins` (rows, columns) of adaptive pooling.

    "mean"; "max", whose gradient goes to the first of equals; "amax", whose gradient equals share; "moments", mean and
    variance (of all positions, biased); "logsumexp". `shape` brings (1, C, rows, columns) into the form
    that the network's code expects.
    """

    kind: Kind
    source: str
    bins: tuple[int, int] = (1, 1)
    shape: Callable[[Tensor], Tensor] | None = None
    channels: int = 0
    level: int = 1

    def size(self) -> tuple[int, int, int, int]:
        return (1, self.channels * (2 if self.kind == "moments" else 1), *self.bins)

    def shaped(self, value: Tensor) -> Tensor:
        return self.shape(value) if self.shape else value

    def _bins(self, extent: Extent, region: Region) -> list[list[tuple[int, int, int, int, int]]]:
        """Along each axis for each bin: its number, start and stop on the map, and within the region."""
        axes = []
        for n, k, lo, hi in zip(extent, self.bins, (region.y0, region.x0), (region.y1, region.x1), strict=True):
            edges = [(i, i * n // k, -(-(i + 1) * n // k)) for i in range(k)]
            axes.append([(i, a, b, max(a, lo) - lo, min(b, hi) - lo) for i, a, b in edges if max(a, lo) < min(b, hi)])
        return axes

    def share(self, x: Tensor, region: Region, extent: Extent) -> Partial:
        """What `x`, (1, C, h, w) over `region`, contributes."""
        refuse_nan(self.source, x, region)
        if self.kind == "moments":
            flat = x[0].flatten(1).double()
            mean = flat.mean(1)
            both = torch.cat([mean, (flat - mean[:, None]).square().sum(1)])
            return Partial(both.cpu().numpy()[:, None, None], count=flat.shape[1])
        if self.kind == "amax":
            flat = x[0].flatten(1)
            best = flat.amax(1)
            return Partial(best.cpu().numpy()[:, None, None], count=(flat == best[:, None]).sum(1).cpu().numpy())
        if self.kind == "logsumexp":
            return Partial(torch.logsumexp(x[0].flatten(1).double(), 1).cpu().numpy()[:, None, None])
        shape, is_max = (x.shape[1], *self.bins), self.kind == "max"
        value: Array = (
            np.full(shape, -np.inf, torch.empty((), dtype=x.dtype).numpy().dtype) if is_max else np.zeros(shape)
        )
        ys, xs = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        rows, columns = self._bins(extent, region)
        for i, _, _, top, bottom in rows:
            for j, _, _, left, right in columns:
                flat = x[0, :, top:bottom, left:right].flatten(1)
                if not is_max:
                    value[:, i, j] = flat.sum(dim=1, dtype=torch.float64).cpu().numpy()
                    continue
                # flatten is row-major whatever the memory format, and max on a tie is not promised to be the first
                best = flat.amax(dim=1)
                first = (flat == best[:, None]).to(torch.uint8).argmax(dim=1).cpu().numpy()
                value[:, i, j] = best.cpu().numpy()
                ys[:, i, j] = first // (right - left) + top + region.y0
                xs[:, i, j] = first % (right - left) + left + region.x0
        return Partial(value, ys, xs) if is_max else Partial(value)

    def combine(self, shares: Sequence[Partial], extent: Extent) -> Partial:
        """The whole map's, from all tiles' shares in their order; means are divided by the number of positions."""
        total = shares[0]
        for share in shares[1:]:
            if self.kind == "max":
                total = _winners(total, share)
            elif self.kind == "logsumexp":
                total = Partial(np.logaddexp(total.value, share.value))
            elif self.kind == "amax":
                value = np.maximum(total.value, share.value)
                equal = ((t.value == value)[:, 0, 0] * t.count for t in (total, share))
                total = Partial(value, count=sum(equal))
            elif self.kind == "moments":
                total = _moments(total, share)
            else:
                total = Partial(total.value + share.value)
        if self.kind == "moments":
            means, squares = np.split(total.value, 2)
            return Partial(np.concatenate([means, squares / total.count]), count=total.count)
        return Partial(total.value / self._areas(extent)) if self.kind == "mean" else total

    def _areas(self, extent: Extent) -> Array:
        rows, columns = self._bins(extent, Region.whole(extent))
        return np.array([[(b - a) * (d - c) for _, c, d, _, _ in columns] for _, a, b, _, _ in rows])

    def tensor(self, total: Partial, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(1, C, rows, columns); moments stay float64, for a variance is a small difference of them."""
        value = torch.from_numpy(np.asarray(total.value)).to(device)
        return value[None] if self.kind == "moments" else value[None].to(dtype)

    @property
    def reads_map(self) -> bool:
        """Whether what flows back depends on the map's values."""
        return self.kind in ("moments", "logsumexp", "amax")

    def backward(self, grad: Tensor, total: Partial | None, x: Tensor | None, region: Region, extent: Extent) -> Tensor:
        """What `grad`, that of the reduced values, gives for the map over `region`; `x` holds its values if needed."""
        channels = self.channels
        if self.kind == "mean" and self.bins == (1, 1):
            return (grad / (extent[0] * extent[1])).expand(1, channels, *region.shape)
        if self.kind == "moments":
            assert x is not None
            assert total is not None
            grad = grad.to(x.dtype) / (extent[0] * extent[1])
            mean = torch.from_numpy(total.value[:channels])[None].to(x)
            return grad[:, :channels] + 2 * grad[:, channels:] * (x - mean)
        if self.kind == "amax":
            assert x is not None
            assert total is not None
            best, equals = (
                torch.from_numpy(np.asarray(t)).reshape(1, -1, 1, 1).to(x) for t in (total.value, total.count)
            )
            return (x == best) * (grad.to(x.dtype) / equals)
        if self.kind == "logsumexp":
            assert x is not None
            assert total is not None
            return grad.to(x.dtype) * torch.exp(x - torch.from_numpy(total.value)[None].to(x))
        out = torch.zeros((1, channels, *region.shape), dtype=grad.dtype, device=grad.device)
        rows, columns = self._bins(extent, region)
        for i, a, b, top, bottom in rows:
            for j, c, d, left, right in columns:
                if self.kind == "mean":
                    out[:, :, top:bottom, left:right] += grad[:, :, i : i + 1, j : j + 1] / ((b - a) * (d - c))
                    continue
                assert total is not None
                assert total.y is not None
                assert total.x is not None
                y, x_ = total.y[:, i, j] - region.y0, total.x[:, i, j] - region.x0
                here = np.flatnonzero((y >= 0) & (y < region.height) & (x_ >= 0) & (x_ < region.width))
                out[0, here, y[here], x_[here]] += grad[0, here, i, j]
        return out


def refuse_nan(name: str, x: Tensor, region: Region) -> None:
    """ValueError where a map has a NaN, which rectifiers would hide from the way back."""
    if torch.isnan(x).any():
        raise ValueError(f"the map {name} is NaN in {region}; look for NaN or infinity in image or weights")


def _moments(a: Partial, b: Partial) -> Partial:
    """Of both parts together (Chan et al. 1982): no difference of large numbers is taken."""
    (mean_a, squares_a), (mean_b, squares_b) = np.split(a.value, 2), np.split(b.value, 2)
    count, apart = a.count + b.count, mean_b - mean_a
    mean = mean_a + apart * (b.count / count)
    squares = squares_a + squares_b + apart**2 * (a.count * b.count / count)
    return Partial(np.concatenate([mean, squares]), count=count)


def _winners(a: Partial, b: Partial) -> Partial:
    assert a.y is not None
    assert b.y is not None
    assert a.x is not None
    assert b.x is not None
    earlier = (b.y < a.y) | ((b.y == a.y) & (b.x < a.x))
    take = (b.value > a.value) | ((b.value == a.value) & earlier)
    return Partial(np.where(take, b.value, a.value), np.where(take, b.y, a.y), np.where(take, b.x, a.x))
