"""The input gradient of a whole image by scatter: tiles partition the outputs, their windows overlap-add.

A tile's gradient is cut into one piece a cell that its window touches; a cell's value is the sum of its pieces in
ascending order of tiles. The order is part of the contract: in one process or over a cluster the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from tilestream.geometry import Extent, Region, Tile, TilePlan, interior

from .tile import Array, Partial, Source, TileRunner, Upstream, combine, tensors
from .trace import Network, head_gradient

Reduce = Literal["mean", "absmean", "absmax"]
REDUCES: tuple[Reduce | None, ...] = ("mean", "absmean", "absmax", None)
METHODS = ("gradient",)


class Sink(Protocol):
    """Anything that takes blocks by slices: a zarr.Array, a memmap, a numpy array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __setitem__(self, index: Any, value: Any) -> None: ...


@dataclass(frozen=True, order=True)
class Peak:
    """The highest point of a saliency map, or of a part of it. Positions are pixels of the image."""

    y_px: int
    x_px: int
    value: float

    def __iter__(self) -> Any:
        return iter((self.y_px, self.x_px, self.value))


def highest(values: Array, region: Region, allowed: Region) -> Peak | None:
    """The highest value, (h, w) covering `region`, within `allowed`; None where they do not meet.

    Ties go to the smallest (y, x); NaN is a ValueError.
    """
    box = region.intersect(allowed)
    if box.empty:
        return None
    inside = values[box.within(region)]
    if np.isnan(inside).any():
        raise ValueError(f"saliency is NaN in {box}; look for NaN or infinity in the image or the weights")
    y, x = np.unravel_index(int(np.argmax(inside)), inside.shape)
    return Peak(box.y0 + int(y), box.x0 + int(x), float(inside[y, x]))


def highest_of(peaks: Sequence[Peak | None]) -> Peak:
    """The highest of the cells' peaks; ties go to the smallest (y, x)."""
    found = [p for p in peaks if p is not None]
    if not found:
        raise ValueError("no cell of the image is inside the border")
    return min(found, key=lambda p: (-p.value, p.y_px, p.x_px))


class SaliencyPass:
    """The pass over one image, split so that each piece can run anywhere: tiles, then cells.

    `target` is the logit that is differentiated. Where the head is linear after average pooling, its gradient is known
    before anything runs (`upstream()`); otherwise the forward pass comes first and `upstream(pooled)` takes its result.
    """

    def __init__(
        self,
        network: Network,
        plan: TilePlan,
        *,
        target: int = 1,
        reduce: Reduce | None = "mean",
        method: str = "gradient",
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not known; use one of {METHODS}")
        if reduce not in REDUCES:
            raise ValueError(f"reduce={reduce!r} is not known; use one of {REDUCES}")
        self.network, self.plan, self.target, self.reduce = network, plan, target, reduce
        self.runner = TileRunner(network, plan.image)

    @property
    def one_sweep(self) -> bool:
        """Whether one sweep over the tiles does forward and backward."""
        return self.network.head_is_linear and all(kind == "average" for _, kind in self.network.pooled.values())

    def forward(self, source: Source, tile: Tile) -> tuple[Partial, ...]:
        """The first of two sweeps: what a tile contributes to the poolings."""
        return self.runner.forward(source, tile)

    def pooled(self, partials: Sequence[tuple[Partial, ...]]) -> list[Partial]:
        """The poolings of the whole image from all tiles' shares, in tile order."""
        return combine(self.network, list(partials), self.plan.map)

    def logits(self, pooled: list[Partial]) -> torch.Tensor:
        """(1, num_classes), detached."""
        with torch.no_grad():
            logits: torch.Tensor = self.network.head(*tensors(self.network, pooled))
        return logits

    def upstream(self, pooled: list[Partial] | None = None) -> tuple[Upstream, ...]:
        """The gradient of the target at every pooling; `pooled` is needed unless `one_sweep`."""
        if pooled is None:
            if not self.one_sweep:
                raise ValueError("this network needs its pooled values before the gradient; run forward first")
            channels = {self.network.image: self.network.channels, **{n.name: n.channels for n in self.network.nodes}}
            values = [Partial(np.zeros(channels[value])) for value, _ in self.network.pooled.values()]
        else:
            values = pooled
        gradients = head_gradient(self.network, tensors(self.network, values), self.target)
        kinds = [kind for _, kind in self.network.pooled.values()]
        return tuple(
            (winners if kind == "max" else None, gradient.reshape(-1))
            for winners, kind, gradient in zip(values, kinds, gradients, strict=True)
        )

    def pieces(
        self, source: Source, tile: Tile, upstream: tuple[Upstream, ...]
    ) -> tuple[tuple[Partial, ...], dict[int, tuple[Region, Array]]]:
        """A tile's forward shares, and its gradient cut by the cells that it touches: {cell: (region, (c, h, w))}."""
        partials, gradient = self.runner.gradient(source, tile, upstream, self.reduce == "mean")
        parts = {}
        for index in self.plan.targets[tile.index]:
            region = tile.window.intersect(self.plan.tiles[index].cell)
            parts[index] = (region, gradient[(slice(None), *region.within(tile.window))])
        return partials, parts

    def cell(self, index: int, pieces: Sequence[tuple[Region, Array]]) -> Array:
        """A cell's saliency from its pieces in ascending order of tiles: (h, w), or (C, h, w) for reduce=None.

        `pieces` is empty for a cell that no output reads (`routes` says so); its gradient is zero.
        """
        total = self._zeros(index)
        for piece in pieces:
            self._add(total, index, piece)
        return self._reduced(total)

    def _zeros(self, index: int) -> Array:
        channels = 1 if self.reduce == "mean" else self.network.channels
        shape = (channels, *self.plan.tiles[index].cell.shape)
        return np.zeros(shape, self.runner.dtype)

    def _add(self, total: Array, index: int, piece: tuple[Region, Array]) -> None:
        region, values = piece
        total[(slice(None), *region.within(self.plan.tiles[index].cell))] += values

    def _reduced(self, total: Array) -> Array:
        if self.reduce == "absmean":
            total = np.abs(total).mean(axis=0)
        elif self.reduce == "absmax":
            total = np.abs(total).max(axis=0)
        elif self.reduce == "mean":
            total = total[0]  # the mean was taken in each tile
        return total

    def run(
        self, source: Source, write: Callable[[Region, Array], None], progress: Callable[[int, int], None] | None = None
    ) -> torch.Tensor:
        """All tiles in this process; `write(cell, values)` gets each cell once it is complete. Returns the logits."""
        tiles, routes = self.plan.tiles, self.plan.routes
        if self.one_sweep:
            upstream = self.upstream()
        else:
            upstream = self.upstream(self.pooled([self.forward(source, tile) for tile in tiles]))
        for index in (index for index, readers in routes.items() if not readers):
            write(tiles[index].cell, self.cell(index, []))  # no output reads it
        sums: dict[int, Array] = {}
        partials = []
        for tile in tiles:
            shares, parts = self.pieces(source, tile, upstream)
            partials.append(shares)
            for index, piece in parts.items():
                if index not in sums:
                    sums[index] = self._zeros(index)
                self._add(sums[index], index, piece)
                if routes[index][-1] == tile.index:
                    write(tiles[index].cell, self._reduced(sums.pop(index)))
            if progress is not None:
                progress(tile.index + 1, len(tiles))
        return self.logits(self.pooled(partials))


class Saliency:
    """A saliency map of one image, with the logits of the same pass.

    `argmax` finds the centre of a crop, `write` copies the map into an array of the caller's, `numpy` returns it.
    """

    def __init__(self, values: npt.NDArray[Any], logits: torch.Tensor) -> None:
        self._values, self.logits = values, logits

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    def numpy(self) -> npt.NDArray[Any]:
        """The map: (H, W), or (C, H, W) where channels were not reduced, in the network's dtype."""
        return self._values

    def argmax(self, border: float = 0.1) -> Peak:
        """The highest point with border * h < y < h - border * h, likewise x (paper A, Formula 1): (y_px, x_px, value).

        Ties go to the smallest (y, x). A border of 0 excludes nothing. ValueError for a map with channels or NaN.
        """
        if self._values.ndim != 2:
            raise ValueError("argmax needs one channel; call saliency with reduce='mean', 'absmean' or 'absmax'")
        extent: Extent = (self._values.shape[0], self._values.shape[1])
        return highest_of([highest(self._values, Region.whole(extent), interior(extent, border))])

    def write(self, target: Sink) -> None:
        """Copies the map into `target`, an array of the same shape, a band of rows at a time."""
        if tuple(target.shape) != self.shape:
            raise ValueError(f"target.shape={tuple(target.shape)} must be {self.shape}, the shape of the saliency map")
        rows = max(
            1, (getattr(target, "chunks", None) or self.shape)[-2]
        )  # whole chunks, so that no chunk is written twice
        for start in range(0, self.shape[-2], rows):
            target[..., start : start + rows, :] = self._values[..., start : start + rows, :]
