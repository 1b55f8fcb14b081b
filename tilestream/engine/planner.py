"""Chooses where maps are kept, and tiles: the least time that the cost model expects within a budget of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pydantic import ByteSize, TypeAdapter

from tilestream.geometry import Extent, Plan, Region, SegmentPlan, Tile, TilePlan, tile_regions

from .cost import KERNEL_BYTES, KERNELS, Cost, Costs, rates_of, sizes, whole_flops
from .operations import Pointwise
from .passes import Sizes
from .segment import Segment, before, segments, winners
from .tile import keeps, needed
from .trace import Network


def parse_bytes(memory: int | str) -> int:
    """Bytes of "2 GiB", "800MB" or a number; ValueError for anything else or under 1."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(memory))
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"memory={memory!r} is not a size; write it like '2 GiB' or 800_000_000")
    return size


def cut(network: Network, parts: Sequence[SegmentPlan]) -> list[tuple[Segment, Sizes]]:
    """The segments of a plan, with the sizes of their tiles."""
    return [(Segment(network, s.start, s.stop, s.stop == 0), (s.forward_px, s.backward_px)) for s in parts]


def stored_tape_bytes(network: Network) -> int:
    """What gather stores for the way back: signs of ReLUs, winners of poolings, inputs of what is not linear."""
    itemsize, channels = network.map_dtype.itemsize, network.channels_of()
    total = 0
    for node in network.nodes:
        kind, area = keeps(node.operation, False), math.prod(network.extents[node.name])
        if kind == "sign":
            total += -(-node.channels // 8) * area
        elif kind == "winners":
            total += 2 * node.channels * area
        elif kind == "input":
            total += sum(channels[i] * math.prod(network.extents[i]) * itemsize for i in node.inputs)
    return total


@dataclass(frozen=True)
class Choice:
    """A segment's tiles, with what they cost."""

    plan: SegmentPlan
    seconds: float
    flops: int
    kernel_bytes: int


class Planner:
    """Plans one bound network. `result_bytes` is what the caller of the pass gets in memory.

    `one_sweep`: scatter goes there and back over the last segment at once.
    """

    def __init__(
        self, network: Network, *, mode: str, want_weights: bool = False, backward: bool = True, mean: bool = False,
        result_bytes: int = 0, one_sweep: bool = False,
    ) -> None:  # fmt: skip
        self.network, self.mode, self.want_weights, self.backward = network, mode, want_weights, backward
        self.mean, self.result_bytes = mean, result_bytes
        self.one_sweep = one_sweep and backward and mode == "scatter"
        self.image = network.extents[network.image]
        self._known: dict[tuple[int, int, bool], Costs] = {}

    def plan(self, memory: int | None, tile: int | None) -> Plan:
        """Within `memory` bytes; or one segment (or one a level) of tiles of `tile` px. ValueError if none will do."""
        if tile is not None:
            parts = segments(self.network, ())
            stride = math.lcm(*(side for part in parts for side in part.stride(part.owned)))
            return self._plan([self._fixed(part, tile, stride) for part in parts], None)
        assert memory is not None
        room, kernels, best = memory - self.result_bytes, 0, None
        for _ in range(4):  # what oneDNN keeps is known only with the tiles
            best = self._best(room - kernels)
            if best is None or max(c.plan.tile_bytes for c in best) + _kernels(best) <= room:
                break
            kernels = max(kernels + KERNEL_BYTES, _kernels(best))
        else:
            best = None
        if best is None:
            least = self.result_bytes + self._least()
            raise ValueError(
                f"memory={memory} bytes is too small for an image of {self.image[0]} x {self.image[1]} px: "
                f"the smallest budget that works is {least} bytes ({least / 2**20:.0f} MiB)"
            )
        return self._plan(best, memory)

    def _edges(self) -> list[int]:
        """Where the network can be cut with one map to store, and where it must be, for a level ends."""
        nodes, found = self.network.nodes, [0]
        for i in range(1, len(nodes)):
            later = {name for n in nodes[i:] for name in n.inputs}
            crossing = [n for n in [self.network.image, *(n.name for n in nodes[:i])] if n in later]
            inside = isinstance(nodes[i].operation, Pointwise)  # stays with what it follows
            if (len(crossing) == 1 and not inside) or nodes[i].level != nodes[i - 1].level:
                found.append(i)
        return [*found, len(nodes)]

    def _levels(self) -> set[int]:
        nodes = self.network.nodes
        return {i for i in range(1, len(nodes)) if nodes[i].level != nodes[i - 1].level}

    def _priced(self, segment: Segment, size: Extent, back: Extent) -> Choice:
        costs = self._costs(segment)
        parts = [costs.price(size, "forward")]
        if self.backward:
            parts.append(costs.price(back, self.mode))
        return self._put(segment, size, back, parts)

    def _costs(self, segment: Segment) -> Costs:
        key = segment.start, segment.stop, segment.takes_image
        if key not in self._known:
            taped = self.mode == "gather"
            self._known[key] = Costs(segment, want_weights=self.want_weights, taped=taped, mean=self.mean)
        return self._known[key]

    def _put(self, segment: Segment, size: Extent, back: Extent, parts: list[Cost]) -> Choice:
        swept = parts[-1:] if self.one_sweep and segment.stop == len(self.network.nodes) else parts
        seconds, flops = sum(p.seconds for p in swept), sum(p.flops for p in swept)
        plan = SegmentPlan(segment.start, segment.stop, size, back, max(p.tile_bytes for p in parts))
        return Choice(plan, seconds, flops, sum(p.kernel_bytes for p in parts))

    def _fixed(self, segment: Segment, tile: int, stride: int) -> Choice:
        if tile < 1 or tile % stride:
            use = math.ceil(max(tile, 1) / stride) * stride
            raise ValueError(f"tile={tile} px must be a multiple of the stride {stride}; use {use}")
        return self._priced(segment, (int(tile), int(tile)), (int(tile), int(tile)))

    def _choose(self, segment: Segment, room: int | None, step: int = 1) -> Choice | None:
        """The quickest tiles of a segment within `room` bytes, of each `step`th size; the smallest of all for None."""
        costs = self._costs(segment)
        found = []
        ways = ["forward"] + ([self.mode] if self.backward else [])
        for way in ways:
            names = [*segment.owned, *segment.inputs]  # on the coarsest grid all tiles inside are of one shape
            options = [(costs.price(size, way), size) for size in _some(sizes(self.image, segment.stride(names)), step)]
            fitting = [o for o in options if room is None or o[0].tile_bytes <= room]
            if not fitting:
                return None
            found.append(min(fitting, key=lambda o: o[0].tile_bytes if room is None else o[0].seconds))
        if self.mode == "scatter" and self.backward and winners(self.network) is None:  # one sweep may do both ways
            found = [(costs.price(found[1][1], "forward"), found[1][1]), found[1]]
        return self._put(segment, found[0][1], found[-1][1], [c for c, _ in found])

    def _best(self, room: int) -> list[Choice] | None:
        """The cheapest way from the image to the end, by dynamic programming over the places to cut."""
        edges, levels = self._edges(), self._levels()
        first = [self._choose(segment, room) for segment in before(self.network)]
        if None in first:
            return None
        best: dict[int, tuple[float, list[Choice]]] = {0: (0.0, [c for c in first if c is not None])}
        itemsize = self.network.map_dtype.itemsize
        channels = self.network.channels_of()
        for j, stop in enumerate(edges[1:], 1):
            for start in edges[:j]:
                if start not in best or any(start < level < stop for level in levels):
                    continue
                segment = Segment(self.network, start, stop)
                chosen = self._choose(segment, room, 5)
                if chosen is None:
                    continue
                stored = sum(channels[n] * math.prod(self.network.extents[n]) * itemsize for n in segment.stored)
                price = best[start][0] + chosen.seconds + stored / rates_of(self.network).stored_bytes_per_s
                if stop not in best or price < best[stop][0]:
                    best[stop] = price, [*best[start][1], chosen]
        if edges[-1] not in best:
            return None
        parts = [segment for segment, _ in cut(self.network, [c.plan for c in best[edges[-1]][1]])]
        return [found for part in parts if (found := self._choose(part, room)) is not None]

    def _least(self) -> int:
        """The smallest room for which there is a way: over all cuttings, of the largest segment's smallest tiles."""
        chosen = [self._choose(Segment(self.network, *ends), None) for ends in pairwise(self._edges())]
        chosen += [self._choose(segment, None) for segment in before(self.network)]
        smallest = [c for c in chosen if c is not None]
        return max(c.plan.tile_bytes for c in smallest) + _kernels(smallest)

    def _plan(self, chosen: list[Choice], memory: int | None) -> Plan:
        network, tile_bytes = self.network, max(c.plan.tile_bytes for c in chosen) + _kernels(chosen)
        itemsize, channels = network.map_dtype.itemsize, network.channels_of()
        parts = [segment for segment, _ in cut(network, [c.plan for c in chosen])]
        maps = {n: channels[n] * math.prod(network.extents[n]) * itemsize for p in parts for n in p.stored}
        stored = sum(maps.values()) * (2 if self.backward else 1)
        if self.backward and self.mode == "gather":
            stored = stored_tape_bytes(network) + 2 * max([0, *maps.values()])
        if self.backward and self.mode == "scatter":
            stored += (1 if self.mean else network.channels) * math.prod(self.image) * itemsize
        left = stored if memory is None else max(0, memory - self.result_bytes - tile_bytes)
        scratch = min(left, stored)
        halo = 0
        for segment, plan in zip(parts, [c.plan for c in chosen], strict=True):
            if not (owned := segment.tiles(segment.owned, plan.forward_px)):
                continue  # it was there for its shape alone
            middle = owned[len(owned) // 2]
            regions = segment.forward_regions(middle)
            strides = network.strides()
            name = next(iter(middle))
            for value in segment.inputs:
                if value in regions:
                    lead = math.ceil(middle[name].y0 * strides[name][0] - regions[value].y0 * strides[value][0])
                    halo = max(halo, lead)
        return Plan(
            self.image, self.mode, tuple(c.plan for c in chosen),
            tuple("" if p.start == 0 else p.nodes[0].path or p.nodes[0].name for p in parts), halo,
            self.result_bytes + tile_bytes + scratch, scratch, stored, sum(c.flops for c in chosen),
            whole_flops(network, self.want_weights) // (1 if self.backward else 2 if not self.want_weights else 3),
            sum(c.seconds for c in chosen),
        )  # fmt: skip


def _kernels(chosen: list[Choice]) -> int:
    """What oneDNN keeps of all sweeps."""
    return min(KERNELS * KERNEL_BYTES, sum(c.kernel_bytes for c in chosen))


def _some(options: list[Extent], step: int) -> list[Extent]:
    """Each `step`th, and the last, which is the smallest."""
    return list(dict.fromkeys([*options[::step], options[-1]]))


def plan(
    network: Network, image: Extent, *, memory: int | None = None, tile: int | None = None, channels_out: int = 1
) -> TilePlan:
    """Whole-network tiles for one image of extent (height, width): what `SaliencyPass` takes.

    `tile` fixes the tile's side in image pixels, a multiple of the network's stride; otherwise the cheapest cut within
    `memory` bytes is taken. `channels_out` says how many channels of gradient are kept. Raises ValueError when the
    budget cannot be met (it names both figures and the smallest budget that would do) or the image is too small.
    """
    bound = network.bind(image)
    segment = Segment(bound, 0, len(bound.nodes), takes_image=True)
    extents = {bound.extents[name] for name in segment.owned}
    if len(extents) > 1:
        names = ", ".join(f"{y} x {x}" for y, x in dict.fromkeys(bound.extents[name] for name in segment.owned))
        raise ValueError(f"the network pools maps of different extents, {names}; pool maps of one extent")
    strides = bound.strides()[segment.owned[0]]
    stride = (math.ceil(strides[0]), math.ceil(strides[1]))
    costs, last = Costs(segment, mean=channels_out == 1), extents.pop()
    if tile is None and memory is None:
        raise ValueError("memory=None and tile=None leave the tiles open; give one of them")
    if tile is not None:
        side = math.lcm(*stride)
        if tile < 1 or tile % side:
            raise ValueError(
                f"tile={tile} px must be a multiple of the stride {side}; use {math.ceil(max(tile, 1) / side) * side}"
            )
        options = [(int(tile), int(tile))]
    else:
        options = sizes(image, stride)
    itemsize = network.dtype.itemsize

    def priced(size: Extent) -> tuple[Cost, int]:
        cost = costs.price(size, "scatter")
        window = costs.lengths(0, size[0], False).longest[bound.image]
        waiting = min(image[0], window + 2 * size[0])
        return cost, cost.tile_bytes + cost.kernel_bytes + (image[0] + waiting) * image[1] * itemsize * channels_out

    prices = {size: priced(size) for size in options}
    fitting = [s for s, (_, peak) in prices.items() if memory is None or peak <= memory]
    if not fitting:
        least = min(peak for _, peak in prices.values())
        raise ValueError(
            f"memory={memory} bytes is too small for an image of {image[0]} x {image[1]} px: "
            f"the smallest budget that works is {least} bytes ({least / 2**20:.0f} MiB)"
        )
    size = min(fitting, key=lambda s: (prices[s][0].flops, prices[s][1]))
    cost, peak = prices[size]
    on_map = (min(size[0] // stride[0], last[0]), min(size[1] // stride[1], last[1]))
    tiles = []
    for index, output in enumerate(tile_regions(last, on_map)):
        window = needed(segment.nodes, dict.fromkeys(segment.owned, output), bound.extents)[bound.image]
        cell = Region(
            *_cell(output.y0, output.y1, stride[0], last[0], image[0]),
            *_cell(output.x0, output.x1, stride[1], last[1], image[1]),
        )
        tiles.append(Tile(index, output, window, cell))
    tile_px = (on_map[0] * stride[0], on_map[1] * stride[1])
    whole = whole_flops(bound, False)
    return TilePlan(image, last, stride, tile_px, tuple(tiles), cost.tile_bytes, peak, cost.flops, whole)


def _cell(start: int, stop: int, stride: int, length: int, n: int) -> tuple[int, int]:
    """The part of the image that the outputs [start, stop) own: stride by stride, the last takes what is left."""
    return min(start * stride, n), n if stop == length else min(stop * stride, n)


__all__ = ["Planner", "cut", "parse_bytes", "plan"]
