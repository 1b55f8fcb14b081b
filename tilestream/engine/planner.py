"""Chooses tiles: the fewest FLOPs among all cuts whose predicted peak stays within the budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import ByteSize, TypeAdapter

from tilestream.geometry import Extent, Region, Tile, TilePlan, tile_regions

from .tile import extents, propagate
from .trace import Network

SLACK, CUT_SLACK, FIXED_BYTES = 1.05, 1.4, 32 * 2**20
"""What the tensors' sizes do not show: kernels' packed weights and scratch, in tiles the copies of crops. Measured."""

Sizes = dict[str, tuple[int, int]]


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
        maps = {value for value, _ in network.pooled.values()}
        if len({self.extents[m] for m in maps}) != 1:
            raise ValueError("the network pools maps of different extents, which cannot be streamed")
        self.maps = maps
        self.map = self.extents[next(iter(maps))]
        strides = {n.stride for n in network.nodes if n.name in maps}
        self.stride = strides.pop() if strides else (1, 1)
        self.itemsize = torch.empty((), dtype=network.dtype).element_size()
        self._lines: dict[tuple[int, int], list[Sizes]] = {}

    def plan(self, memory: int | None, tile: int | None) -> TilePlan:
        if tile is not None:
            return self._value(self._price(self._fixed(tile)))
        assert memory is not None
        fitting = [cut for cut in map(self._price, self._sizes()) if cut.peak_bytes <= memory]
        if not fitting:
            smallest = min((self._price(size) for size in self._sizes()), key=lambda cut: cut.peak_bytes)
            raise ValueError(
                f"memory={memory} bytes is too small for an image of {self.image[0]} x {self.image[1]} px: "
                f"the smallest budget that works is {smallest.peak_bytes} bytes ({smallest.peak_bytes / 2**20:.0f} MiB)"
            )
        return self._value(min(fitting, key=lambda cut: (cut.flops, cut.peak_bytes)))

    def _fixed(self, tile: int) -> tuple[int, int]:
        for stride in self.stride:
            if tile < 1 or tile % stride:
                use = -(-max(tile, 1) // stride) * stride
                raise ValueError(f"tile={tile} px must be a multiple of the stride {stride}; use {use}")
        return min(tile // self.stride[0], self.map[0]), min(tile // self.stride[1], self.map[1])

    def _sizes(self) -> Iterator[tuple[int, int]]:
        """Tile sizes to choose from: each axis cut into equal parts, as even as they come."""
        axes = [sorted({-(-n // parts) for parts in range(1, n + 1)}, reverse=True) for n in self.map]
        return ((y, x) for y in axes[0] for x in axes[1])

    def _intervals(self, axis: int, size: int) -> list[Sizes]:
        """For each tile along one axis: the interval of every value that it needs (the axes are independent)."""
        key = (axis, size)
        if key not in self._lines:
            self._lines[key] = []
            for start in range(0, self.map[axis], size):
                stop = min(start + size, self.map[axis])
                region = Region(start, stop, 0, self.map[1]) if axis == 0 else Region(0, self.map[0], start, stop)
                regions = propagate(self.network, dict.fromkeys(self.maps, region), self.extents)
                self._lines[key].append({k: (r.y0, r.y1) if axis == 0 else (r.x0, r.x1) for k, r in regions.items()})
        return self._lines[key]

    def _price(self, size: tuple[int, int]) -> _Cut:
        totals, widest = [], []
        for axis in (0, 1):
            lines = self._intervals(axis, size[axis])
            lengths = {name: [line[name][1] - line[name][0] for line in lines] for name in lines[0]}
            totals.append({name: sum(values) for name, values in lengths.items()})
            widest.append({name: max(values) for name, values in lengths.items()})
        flops = sum(
            2 * n.operation.flops(n.channels) * totals[0][n.name] * totals[1][n.name] for n in self.network.nodes
        )  # the input gradient costs what the forward pass costs
        areas = {name: widest[0][name] * widest[1][name] for name in widest[0]}
        tile_bytes = self._tile_bytes(areas, size != self.map)
        return _Cut(size, tile_bytes, tile_bytes + self._result_bytes(size, areas[self.network.image]), flops)

    def _result_bytes(self, size: tuple[int, int], window: int) -> int:
        """The gradient map, and the strips of it that wait for their neighbours (a row of tiles and one more)."""
        waiting = window if size == self.map else (-(-self.map[1] // size[1]) + 1) * window
        return (
            (self.image[0] * self.image[1] + min(waiting, 2 * self.image[0] * self.image[1]))
            * self.itemsize
            * self.channels_out
        )

    def _tile_bytes(self, areas: dict[str, int], cut: bool) -> int:
        """Peak of live tensors over one tile's forward and backward pass, by walking the graph as autograd does."""
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
            held += 0 if alone else live[node.name]
            padded = weight[node.inputs[0]] if operation.keeps_input else 0  # a padded or re-ordered copy of the input
            peak = max(peak, held + padded)
            for name in node.inputs:
                users[name] -= 1
                if users[name] == 0 and name not in kept:
                    held -= 0 if alone else live[name]
        # backward: all that is kept, plus at each step the gradients of the result and of the inputs
        pending = {name: weight[name] for name in self.maps}
        peak = max(peak, held + sum(pending.values()))
        readers = network.users()
        for node in reversed(network.nodes):
            inputs = sum(weight[name] for name in node.inputs)
            # a value with several readers gets a gradient from each, before they are added
            again = sum(weight[name] for name in node.inputs if readers[name] > 1)
            peak = max(peak, held + sum(pending.values()) + inputs + again)
            pending.pop(node.name, None)
            pending.update({name: weight[name] for name in node.inputs})
            if node.name in kept or node.operation.keeps_index:
                held -= live[node.name]
        return int(peak * (CUT_SLACK if cut else SLACK)) + FIXED_BYTES

    def _value(self, cut: _Cut) -> TilePlan:
        whole = self._price(self.map)
        rows, columns = self._intervals(0, cut.size[0]), self._intervals(1, cut.size[1])
        starts = [list(range(0, n, step)) for n, step in zip(self.map, cut.size, strict=True)]
        tiles = []
        for output in tile_regions(self.map, cut.size):
            y, x = output.y0 // cut.size[0], output.x0 // cut.size[1]
            window = Region(*rows[y][self.network.image], *columns[x][self.network.image])
            cell = Region(*self._cell(0, output.y0, output.y1), *self._cell(1, output.x0, output.x1))
            tiles.append(Tile(y * len(starts[1]) + x, output, window, cell))
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
