"""The input gradient in steps that can run anywhere: tiles partition the outputs, their windows overlap-add.

A tile's gradient is cut into one piece a cell that its window touches; a cell's value is the sum of its pieces in
ascending order of tiles. The order is part of the contract: in one process or over a cluster the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from tilestream.geometry import Extent, Region, Tile, TilePlan, interior

from .allocator import reused_buffers
from .passes import Pass
from .reductions import Partial
from .scratch import Scratch
from .segment import Segment
from .tile import Array, Source, backward, forward, needed, read
from .trace import Network

Reduce = Literal["mean", "absmean", "absmax"]
REDUCES: tuple[Reduce | None, ...] = ("mean", "absmean", "absmax", None)
Method = Literal["gradient", "guided", "deconv"]
METHODS: tuple[Method, ...] = ("gradient", "guided", "deconv")
Shares = Mapping[str, Partial]
"""By the names of the network's reductions."""


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


def check(method: str, reduce: str | None) -> None:
    """ValueError for an unknown way of going backward or of reducing channels."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {METHODS}")
    if reduce not in REDUCES:
        raise ValueError(f"reduce={reduce!r} is not known; use one of {REDUCES}")


def reduced(values: Array, reduce: Reduce | None) -> Array:
    """(C, h, w) reduced over its channels to (h, w), or as it is for None; "mean" was taken before."""
    if reduce == "absmean":
        return np.asarray(np.abs(values).mean(axis=0))
    if reduce == "absmax":
        return np.asarray(np.abs(values).max(axis=0))
    return values if reduce is None else values[0]


class SaliencyPass:
    """The pass over one image by whole-network tiles, split so that each piece can run anywhere: tiles, then cells.

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
        check(method, reduce)
        if method != "gradient":
            raise ValueError(f"method={method!r} clamps gradients, so tiles cannot add their shares; use 'gradient'")
        if any(n.level for n in network.nodes) or network.dense:
            raise ValueError("maps that depend on the whole image (or are the result) take more than one sweep; "
                             "use tilestream.stream")  # fmt: skip
        self.network, self.plan, self.target, self.reduce = network.bind(plan.image), plan, target, reduce
        self.segment = Segment(self.network, 0, len(self.network.nodes), takes_image=True)
        self.dtype = torch.empty((), dtype=network.dtype).numpy().dtype

    @property
    def one_sweep(self) -> bool:
        """Whether one sweep over the tiles does forward and backward."""
        return self.network.linear

    def _work(self, pooled: Shares | None = None) -> Pass:
        """The vectors of the pass, from the whole image's reductions (zeros if None)."""
        work = Pass(self.network, [], np.empty((0, 0, 0)), Scratch(0))
        if pooled is None:
            pooled = {n: Partial(np.zeros(r.size()[1:])) for n, r in self.network.reductions.items()}
        work.totals.update(pooled)
        work.vectors_from_totals()
        return work

    @reused_buffers()
    def forward(self, source: Source, tile: Tile) -> Shares:
        """The first of two sweeps: what a tile contributes to the reductions."""
        regions, values, owned = self._tile(source, tile)
        with torch.no_grad():
            made = forward(self.network, self.segment.nodes, regions, values, self._work().steps, owned)
            return self._shares(owned, regions, made)

    def _tile(self, source: Source, tile: Tile) -> tuple[dict[str, Region], dict[str, Any], dict[str, Region]]:
        owned = dict.fromkeys(self.segment.owned, tile.output)
        regions = needed(self.segment.nodes, owned, self.network.extents)
        if regions[self.network.image] != tile.window:
            need = regions[self.network.image]
            raise ValueError(f"tile {tile.index} reads {tile.window}, but its outputs need {need}")
        return regions, {self.network.image: read(self.network, source, tile.window)}, owned

    def _shares(self, owned: Mapping[str, Region], regions: Mapping[str, Region], made: Mapping[str, Any]) -> Shares:
        parts = {name: made[name][(..., *owned[name].within(regions[name]))] for name in owned}
        return self._work().shares(self.segment, owned, parts)

    def pooled(self, partials: Sequence[Shares]) -> Shares:
        """The reductions of the whole image from all tiles' shares, in tile order."""
        extents = self.network.extents
        return {
            name: r.combine([p[name] for p in partials], extents[r.source])
            for name, r in self.network.reductions.items()
        }

    def logits(self, pooled: Shares) -> torch.Tensor:
        """(1, num_classes), detached."""
        logits: torch.Tensor = self._work(pooled).steps[self.network.output]
        return logits

    def upstream(self, pooled: Shares | None = None) -> tuple[Shares, dict[str, torch.Tensor]]:
        """The gradient of the target at every reduction; `pooled` is needed unless `one_sweep`."""
        if pooled is None and not self.one_sweep:
            raise ValueError("this network needs its pooled values before the gradient; run forward first")
        work = self._work(pooled)
        return work.totals, work.gradient_of_logit(self.target)

    @reused_buffers()
    def pieces(
        self, source: Source, tile: Tile, upstream: tuple[Shares, Mapping[str, torch.Tensor]]
    ) -> tuple[Shares, dict[int, tuple[Region, Array]]]:
        """A tile's forward shares, and its gradient cut by the cells that it touches: {cell: (region, (c, h, w))}."""
        regions, values, owned = self._tile(source, tile)
        work, tape, mean = self._work(upstream[0]), dict[str, Any](), self.reduce == "mean"
        with torch.no_grad():
            made = forward(
                self.network, self.segment.nodes, regions, values, work.steps, owned,
                lambda node, kind, saved: tape.update({node.name: saved > 0 if kind == "sign" else saved}),
            )  # fmt: skip
            shares = self._shares(owned, regions, made)
            down = work.upstream(self.segment, owned, regions, upstream[1], made)
            del made, values
            got = backward(
                self.network, self.segment.nodes, regions, down, lambda node: tape.pop(node.name), work.steps, mean=mean
            )
        value = got.values.get(self.network.image)
        if value is None:
            value = torch.zeros((1, 1 if mean else self.network.channels, *tile.window.shape), dtype=self.network.dtype)
        gradient = value[0].contiguous().to("cpu", self.network.dtype).numpy()
        parts = {}
        for index in self.plan.targets[tile.index]:
            region = tile.window.intersect(self.plan.tiles[index].cell)
            parts[index] = (region, gradient[(slice(None), *region.within(tile.window))])
        return shares, parts

    def cell(self, index: int, pieces: Sequence[tuple[Region, Array]]) -> Array:
        """A cell's saliency from its pieces in ascending order of tiles: (h, w), or (C, h, w) for reduce=None.

        `pieces` is empty for a cell that no output reads (`routes` says so); its gradient is zero.
        """
        return self.summed(self.plan.tiles[index].cell, pieces)

    def summed(self, box: Region, pieces: Sequence[tuple[Region, Array]]) -> Array:
        """The saliency of any box from all pieces that meet it, in ascending order of tiles."""
        total = np.zeros((1 if self.reduce == "mean" else self.network.channels, *box.shape), self.dtype)
        for region, values in pieces:
            part = region.intersect(box)
            if not part.empty:
                total[(slice(None), *part.within(box))] += values[(slice(None), *part.within(region))]
        return reduced(total, self.reduce)

    def run(self, source: Source, write: Callable[[Region, Array], None]) -> torch.Tensor:
        """All tiles in this process; `write(cell, values)` gets each cell once it is complete. Returns the logits."""
        tiles, routes = self.plan.tiles, self.plan.routes
        totals = None if self.one_sweep else self.pooled([self.forward(source, tile) for tile in tiles])
        upstream, waiting, partials = self.upstream(totals), dict[int, list[tuple[Region, Array]]](), []
        for index in (index for index, readers in routes.items() if not readers):
            write(tiles[index].cell, self.cell(index, []))  # no output reads it
        for tile in tiles:
            shares, parts = self.pieces(source, tile, upstream)
            partials.append(shares)
            for index, piece in parts.items():
                waiting.setdefault(index, []).append(piece)
                if routes[index][-1] == tile.index:
                    write(tiles[index].cell, self.cell(index, waiting.pop(index)))
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
