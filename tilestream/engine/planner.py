"""Chooses tiles: the fewest FLOPs among all cuts whose predicted peak stays within the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ByteSize, TypeAdapter

from tilestream.geometry import Extent, Region, Tile, TilePlan, tile_regions

from .operations import Convolution
from .tile import extents
from .trace import Network

SLACK, CUT_SLACK, FIXED_BYTES = 1.05, 1.35, 32 * 2**20
"""What the tensors' sizes do not show: kernels' packed weights and scratch, in tiles the copies of crops. Measured."""
KERNEL_BYTES, KERNELS = 104 * 2**10, 1024
"""oneDNN keeps a compiled kernel for every shape that a convolution met, up to that many. Measured."""

Lines = dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]
"""Along one axis, for every value: where the interval starts and stops that each tile needs."""


def parse_bytes(memory: int | str) -> int:
    """Bytes of "2 GiB", "800MB" or a number; ValueError for anything else or under 1."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(memory))
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"memory={memory!r} is not a size; write it like '2 GiB' or 800_000_000")
    return size


def plan(
    network: Network, image: Extent, *, memory: int | None = None, tile: int | None = None, channels_out: int = 1
) -> TilePlan:
    """The plan for one image of extent (height, width).

    `tile` fixes the tile's side in image pixels, a multiple of the network's stride; otherwise the cheapest cut within
    `memory` bytes is taken. `channels_out` says how many channels of gradient are kept. Raises ValueError when the
    budget cannot be met (it names both figures and the smallest budget that would do) or the image is too small.
    """
    return _Planner(network, image, channels_out).plan(memory, tile)


@dataclass(frozen=True)
class _Lengths:
    """Along one axis, for every value: the length that all tiles need together and the longest of them."""

    total: dict[str, int]
    longest: dict[str, int]
    kinds: int
    """How many tiles differ from the one before."""


@dataclass(frozen=True)
class _Cut:
    """Tile size on the last map, with its price."""

    size: tuple[int, int]
    tile_bytes: int
    peak_bytes: int
    flops: int


class _Planner:
    def __init__(self, network: Network, image: Extent, channels_out: int) -> None:
        self.network, self.image, self.channels_out = network, image, channels_out
        self.extents = extents(network, image)
        self.maps = list(dict.fromkeys(value for value, _ in network.pooled.values()))
        self.map = self.extents[self.maps[0]]
        if any(self.extents[value] != self.map for value in self.maps):
            sizes = ", ".join(f"{y} x {x}" for y, x in dict.fromkeys(self.extents[value] for value in self.maps))
            raise ValueError(f"the network pools maps of different extents, {sizes}; pool maps of one extent")
        strides = {network.image: (1, 1), **{n.name: n.stride for n in network.nodes}}
        self.stride = strides[self.maps[0]]
        self.itemsize = torch.empty((), dtype=network.dtype).element_size()
        self._flops = [(n.name, n.operation.flops(n.channels)) for n in network.nodes]
        self._convolutions = sum(isinstance(n.operation, Convolution) for n in network.nodes)
        self._known: dict[tuple[int, int], _Lengths] = {}

    def plan(self, memory: int | None, tile: int | None) -> TilePlan:
        if tile is not None:
            y, x = self._fixed(tile)
            return self._value(self._price(y, [x])[0])
        if memory is None:
            raise ValueError("memory=None and tile=None leave the tiles open; give one of them")
        rows, columns = self._sizes()
        cuts = [cut for y in rows for cut in self._price(y, columns)]
        fitting = [cut for cut in cuts if cut.peak_bytes <= memory]
        if not fitting:
            smallest = min(cuts, key=lambda cut: cut.peak_bytes)
            raise ValueError(
                f"memory={memory} bytes is too small for an image of {self.image[0]} x {self.image[1]} px: "
                f"the smallest budget that works is {smallest.peak_bytes} bytes ({smallest.peak_bytes / 2**20:.0f} MiB)"
            )
        return self._value(min(fitting, key=lambda cut: (cut.flops, cut.peak_bytes)))

    def _fixed(self, tile: int) -> tuple[int, int]:
        stride = math.lcm(*self.stride)
        if tile < 1 or tile % stride:
            use = math.ceil(max(tile, 1) / stride) * stride
            raise ValueError(f"tile={tile} px must be a multiple of the stride {stride}; use {use}")
        tile = int(tile)
        return min(tile // self.stride[0], self.map[0]), min(tile // self.stride[1], self.map[1])

    def _sizes(self) -> tuple[list[int], list[int]]:
        """Tile sizes to choose from: each axis cut into equal parts, as even as they come."""
        y, x = (sorted({-(-n // parts) for parts in range(1, n + 1)}, reverse=True) for n in self.map)
        return y, x

    def _intervals(self, axis: int, size: int) -> Lines:
        """What every tile along one axis needs of every value, as `propagate` finds it (the axes are independent)."""
        start = np.arange(0, self.map[axis], size)
        lines: Lines = dict.fromkeys(self.maps, (start, np.minimum(start + size, self.map[axis])))
        for node in reversed(self.network.nodes):
            for name in node.inputs:
                lo, hi = node.operation.reads(axis, *lines[node.name], self.extents[name][axis])
                if name in lines:
                    lo, hi = np.minimum(lo, lines[name][0]), np.maximum(hi, lines[name][1])
                lines[name] = lo, hi
        return lines

    def _lengths(self, axis: int, size: int) -> _Lengths:
        if (axis, size) not in self._known:
            lengths = {name: hi - lo for name, (lo, hi) in self._intervals(axis, size).items()}
            changes = np.any([np.diff(values) != 0 for values in lengths.values()], axis=0)
            self._known[axis, size] = _Lengths(
                {name: int(values.sum()) for name, values in lengths.items()},
                {name: int(values.max()) for name, values in lengths.items()},
                1 + int(changes.sum()),
            )
        return self._known[axis, size]

    def _price(self, height: int, widths: list[int]) -> list[_Cut]:
        """Prices of tiles of `height` with each of `widths`, on the last map; one walk for a whole row of them."""
        row, columns = self._lengths(0, height), [self._lengths(1, width) for width in widths]
        longest = {name: np.array([column.longest[name] for column in columns]) for name in row.longest}
        tensors = self._tile_bytes({name: longest[name] * length for name, length in row.longest.items()})
        result = self._result_bytes(height, row.longest[self.network.image])
        cuts = []
        for column, width, size in zip(columns, widths, tensors.tolist(), strict=True):
            # the input gradient costs what the forward pass costs
            flops = sum(2 * cost * row.total[name] * column.total[name] for name, cost in self._flops)
            kernels = min(2 * self._convolutions * row.kinds * column.kinds, KERNELS)
            slack = SLACK if (height, width) == self.map else CUT_SLACK
            tile_bytes = int(size * slack) + FIXED_BYTES + kernels * KERNEL_BYTES
            cuts.append(_Cut((height, width), tile_bytes, tile_bytes + result, flops))
        return cuts

    def _result_bytes(self, height: int, window: int) -> int:
        """The gradient map, and the cells that wait for tiles: those that windows of one row of tiles can touch."""
        waiting = min(self.image[0], window + 2 * height * self.stride[0])
        return (self.image[0] + waiting) * self.image[1] * self.itemsize * self.channels_out

    def _tile_bytes(self, areas: dict[str, Any]) -> Any:
        """Peak of live tensors over one tile's forward and backward pass, by walking the graph as autograd does.

        `areas` holds pixels of every value, as arrays: one entry a size of tile that is asked about.
        """
        network, size = self.network, self.itemsize
        channels = {network.image: network.channels, **{n.name: n.channels for n in network.nodes}}
        weight = {name: channels[name] * area * size for name, area in areas.items()}
        users, kept = network.users(), {network.image}
        live = {network.image: 2 * weight[network.image]}  # as read, and in the network's dtype and layout
        peak = held = live[network.image]
        for node in network.nodes:
            operation = node.operation
            kept.update(node.inputs if operation.keeps_input else ())
            kept.update({node.name} if operation.keeps_output else ())
            alone = operation.in_place is not None and users[node.inputs[0]] == 1 and node.inputs[0] not in kept
            index = areas[node.name] * node.channels * 8 if operation.keeps_index else 0
            live[node.name] = weight[node.name] + index
            held = held if alone else held + live[node.name]
            padded = weight[node.inputs[0]] if operation.keeps_input else 0  # a padded or re-ordered copy of the input
            peak = np.maximum(peak, held + padded)
            for name in node.inputs:
                users[name] -= 1
                if users[name] == 0 and name not in kept:
                    held = held if alone else held - live[name]
        # backward: all that is kept, plus at each step the gradients of the result and of the inputs
        pending = {name: weight[name] for name in self.maps}
        peak = np.maximum(peak, held + sum(pending.values()))
        readers = network.users()
        for node in reversed(network.nodes):
            inputs = sum(weight[name] for name in node.inputs)
            # a value with several readers gets a gradient from each, before they are added
            again = sum(weight[name] for name in node.inputs if readers[name] > 1)
            peak = np.maximum(peak, held + sum(pending.values()) + inputs + again)
            pending.pop(node.name, None)
            pending.update({name: weight[name] for name in node.inputs})
            if node.name in kept or node.operation.keeps_index:
                held = held - live[node.name]
        return peak

    def _value(self, cut: _Cut) -> TilePlan:
        (whole,) = self._price(self.map[0], [self.map[1]])
        rows, columns = (
            list(
                zip(
                    *(bound.tolist() for bound in self._intervals(axis, cut.size[axis])[self.network.image]),
                    strict=True,
                )
            )
            for axis in (0, 1)
        )
        tiles = []
        for index, output in enumerate(tile_regions(self.map, cut.size)):
            window = Region(*rows[index // len(columns)], *columns[index % len(columns)])
            cell = Region(*self._cell(0, output.y0, output.y1), *self._cell(1, output.x0, output.x1))
            tiles.append(Tile(index, output, window, cell))
        tile_px = (cut.size[0] * self.stride[0], cut.size[1] * self.stride[1])
        return TilePlan(
            self.image,
            self.map,
            self.stride,
            tile_px,
            tuple(tiles),
            cut.tile_bytes,
            cut.peak_bytes,
            cut.flops,
            whole.flops,
        )

    def _cell(self, axis: int, start: int, stop: int) -> tuple[int, int]:
        """The part of the image that the outputs [start, stop) own: stride by stride, the last takes what is left."""
        n, stride = self.image[axis], self.stride[axis]
        return min(start * stride, n), n if stop == self.map[axis] else min(stop * stride, n)
