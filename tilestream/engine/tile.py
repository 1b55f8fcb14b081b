"""One tile: its window goes forward through the trunk, and its share of the input gradient comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tilestream.geometry import Extent, Region, Tile

from .allocator import trim
from .trace import Network

Array = npt.NDArray[Any]


class Source(Protocol):
    """An image that is read in windows: a numpy array, a zarr.Array, a memmap, a lazily normalised view, a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Array: ...


def propagate(network: Network, outputs: Mapping[str, Region], extents: Mapping[str, Extent]) -> dict[str, Region]:
    """Backward interval propagation: the region of every value that the regions `outputs` need, hulls over users."""
    regions = dict(outputs)
    for node in reversed(network.nodes):
        if (region := regions.get(node.name)) is None:
            continue
        for name in node.inputs:
            need = node.operation.need(region, extents[name])
            regions[name] = need.hull(regions[name]) if name in regions else need
    return regions


def extents(network: Network, image: Extent) -> dict[str, Extent]:
    """The extent of every map for an image of this extent; ValueError names the module that it is too small for."""
    known = {network.image: image}
    for node in network.nodes:
        try:
            known[node.name] = node.operation.extent(*(known[name] for name in node.inputs))
        except ValueError as error:
            raise ValueError(f"image of {image[0]} x {image[1]} px: {node.path or node.name}: {error}") from None
    return known


@dataclass(frozen=True)
class Partial:
    """What one tile contributes to one global pooling.

    Average: `value` holds sums over the tile, (C,) float64. Max: `value` holds maxima, (C,) in the network's dtype, and
    `y`, `x` the place of each winner on the pooled map, (C,) int64; ties go to the smallest (y, x).
    """

    value: Array
    y: Array | None = None
    x: Array | None = None


Upstream = tuple[Partial | None, Tensor]
"""For one pooling: the winners (max) or None (average), and the gradient of each pooled value, (C,)."""


class TileRunner:
    """Runs tiles of one image extent through a traced network. Holds no state but the geometry."""

    def __init__(self, network: Network, image: Extent) -> None:
        self.network = network
        self.extents = extents(network, image)
        self.users = network.users()
        self.dtype = torch.empty((), dtype=network.dtype).numpy().dtype

    def forward(self, source: Source, tile: Tile) -> tuple[Partial, ...]:
        """This tile's share of every pooling."""
        with torch.no_grad():
            maps = self._trunk(self._read(source, tile.window), tile)
            return tuple(self._pool(maps[value], kind, tile) for value, kind in self.network.pooled.values())

    def gradient(
        self, source: Source, tile: Tile, upstream: tuple[Upstream, ...], mean: bool
    ) -> tuple[tuple[Partial, ...], Array]:
        """Forward and backward in one go.

        Returns the tile's share of every pooling, and of d target / d input over `tile.window`: (C, h, w), or (1, h, w)
        averaged over the channels for `mean`, in the network's dtype.
        """
        window = self._read(source, tile.window).requires_grad_()
        with torch.enable_grad():
            maps = self._trunk(window, tile)
        partials = tuple(self._pool(maps[value].detach(), kind, tile) for value, kind in self.network.pooled.values())
        outputs, gradients = [], []
        for (value, kind), (winners, gradient) in zip(self.network.pooled.values(), upstream, strict=True):
            outputs.append(maps[value])
            gradients.append(self._unpool(outputs[-1], value, kind, winners, gradient, tile))
        del maps
        (result,) = torch.autograd.grad(outputs, window, gradients)
        if mean:
            result = result.mean(dim=1, keepdim=True)
        return partials, result[0].contiguous().cpu().numpy()

    def _read(self, source: Source, window: Region) -> Tensor:
        trim()  # what the tile before left behind
        block = source[:, window.y0 : window.y1, window.x0 : window.x1]
        x = block if isinstance(block, Tensor) else torch.from_numpy(np.array(block, self.dtype))
        x = x.detach().to(self.network.device, self.network.dtype)[None]
        return x.clone(memory_format=torch.channels_last) if x.data_ptr() else x

    def _trunk(self, window: Tensor, tile: Tile) -> dict[str, Tensor]:
        """Runs the trunk over `window`; returns the maps to be pooled, each covering `tile.output`."""
        network = self.network
        regions = propagate(network, {value: tile.output for value, _ in network.pooled.values()}, self.extents)
        values, users = {network.image: window}, dict(self.users)
        if regions[network.image] != tile.window:
            raise ValueError(f"tile {tile.index} reads {tile.window}, but its outputs need {regions[network.image]}")
        owned: set[str] = set()  # values that autograd does not keep, so that ReLU may overwrite them
        for node in network.nodes:
            region, operation = regions[node.name], node.operation
            inputs = []
            for name in node.inputs:
                need = operation.need(region, self.extents[name])
                inputs.append(
                    values[name] if need == regions[name] else values[name][(..., *need.within(regions[name]))]
                )
                users[name] -= 1
            alone = node.inputs[0] in owned and users[node.inputs[0]] == 0
            for name in node.inputs:
                if users[name] == 0:
                    values.pop(name, None)
            if operation.in_place is not None and alone:
                values[node.name] = operation.in_place(inputs[0])
            else:
                values[node.name] = operation.run(inputs, region, self.extents[node.inputs[0]])
            if operation.keeps_input:
                owned.difference_update(node.inputs)
            if not operation.keeps_output:
                owned.add(node.name)
        return {
            value: values[value][(..., *tile.output.within(regions[value]))] for value, _ in network.pooled.values()
        }

    def _pool(self, x: Tensor, kind: str, tile: Tile) -> Partial:
        flat = x[0].flatten(1)
        if torch.isnan(flat).any():
            raise ValueError(
                f"tile {tile.index} ({tile.window}) gives NaN; look for NaN or infinity in the image or the weights"
            )
        if kind == "average":
            return Partial(flat.sum(dim=1, dtype=torch.float64).cpu().numpy())
        # flatten is row-major over (y, x) whatever the memory format, and max on a tie is not promised to be the first
        value = flat.amax(dim=1)
        first = (flat == value[:, None]).to(torch.uint8).argmax(dim=1)
        y, x_ = first // tile.output.width + tile.output.y0, first % tile.output.width + tile.output.x0
        return Partial(value.cpu().numpy(), y.cpu().numpy(), x_.cpu().numpy())

    def _unpool(
        self, x: Tensor, value: str, kind: str, winners: Partial | None, gradient: Tensor, tile: Tile
    ) -> Tensor:
        """The gradient of the pooled values, spread over this tile's part of the map."""
        if kind == "average":
            height, width = self.extents[value]
            return (gradient / (height * width))[None, :, None, None].expand_as(x)
        assert winners is not None
        assert winners.y is not None
        assert winners.x is not None
        box = tile.output
        here = (winners.y >= box.y0) & (winners.y < box.y1) & (winners.x >= box.x0) & (winners.x < box.x1)
        spread = torch.zeros_like(x)
        channel = np.flatnonzero(here)
        spread[0, channel, winners.y[here] - box.y0, winners.x[here] - box.x0] = gradient[channel]
        return spread


def combine(network: Network, partials: list[tuple[Partial, ...]], extent: Extent) -> list[Partial]:
    """Adds the tiles' shares in the order given, which is that of the tiles, for each pooling over maps of `extent`.

    Averages come back as means, (C,) float64; maxima with their places.
    """
    pooled = []
    for index, (_, kind) in enumerate(network.pooled.values()):
        shares = [p[index] for p in partials]
        if kind == "average":
            total = np.zeros_like(shares[0].value)
            for share in shares:
                total = total + share.value
            pooled.append(Partial(total / (extent[0] * extent[1])))
            continue
        best = shares[0]
        for share in shares[1:]:
            best = _winners(best, share)
        pooled.append(best)
    return pooled


def _winners(a: Partial, b: Partial) -> Partial:
    assert a.y is not None
    assert b.y is not None
    assert a.x is not None
    assert b.x is not None
    earlier = (b.y < a.y) | ((b.y == a.y) & (b.x < a.x))
    take = (b.value > a.value) | ((b.value == a.value) & earlier)
    return Partial(np.where(take, b.value, a.value), np.where(take, b.y, a.y), np.where(take, b.x, a.x))


def tensors(network: Network, pooled: list[Partial]) -> list[Tensor]:
    """Pooled values as the head takes them, (1, C, 1, 1) each, in the network's dtype."""
    return [torch.tensor(p.value).to(network.device, network.dtype)[None, :, None, None] for p in pooled]
