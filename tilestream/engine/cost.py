"""What a segment costs with tiles of a given size: bytes at the peak, FLOPs, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from tilestream.geometry import Extent

from .allocator import HEAP_BYTES
from .operations import AveragePool, Convolution, MaxPool, ReLU, Windowed
from .segment import Segment, winners
from .tile import influenced_along, keeps, needed_along
from .trace import Network, Node


@dataclass(frozen=True)
class Rates:
    """What a machine does a second: convolution; all else that happens to a value, by its bytes, in buffers that are
    used again and in larger ones; a stored map and its gradient, written and read. And a step's bookkeeping, in s."""

    flops_per_s: float
    bytes_per_s: float
    mapped_bytes_per_s: float
    stored_bytes_per_s: float
    step_s: float


INPUTS, WEIGHTS = Rates(5e11, 4.5e9, 2.9e9, 3e8, 1.5e-4), Rates(2.9e11, 1e11, 4.3e9, 3e8, 1.5e-4)
"""Two cores of Zen 5, maps in files, fitted to 36 random plans of ResNet-18 each, with gradients of inputs or of
weights: none is off by more than a fifth."""
GPU = Rates(3e13, 1e12, 1e12, 2e11, 5e-5)
"""One H200, maps in its memory."""
SLACK, FIXED_BYTES = 1.4, 32 * 2**20
"""What the tensors' sizes do not show: kernels' packed weights and scratch, holes between buffers. Measured."""
WORKSPACE_BYTES = 5 * 2**29
"""What cuDNN takes on a GPU for deterministic float32, whatever the tile: 2.3 GiB were seen; for bfloat16 none."""
KERNEL_BYTES, KERNELS, KERNEL_S = 104 * 2**10, 1024, 1.5e-3
"""oneDNN compiles a kernel for every shape that a convolution met, and keeps so many. Measured."""
LOOK_S = 1e-4
"""Whether a tile has to be gone back over."""

Areas = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    tile_bytes: int
    kernel_bytes: int
    """What oneDNN keeps afterwards, for the shapes that it met."""
    flops: int
    seconds: float


@dataclass(frozen=True)
class Lengths:
    """Along one axis, for every value: the length that all tiles need together, and the longest."""

    total: dict[str, int]
    longest: dict[str, int]
    tiles: int
    kinds: int


class Costs:
    """Prices tiles of one segment. `way`: "forward", "scatter" (forward and backward at once) or "gather"."""

    def __init__(
        self, segment: Segment, *, want_weights: bool = False, taped: bool = False, mean: bool = False
    ) -> None:
        self.segment, self.network = segment, segment.network
        self.want_weights, self.taped, self.mean = want_weights, taped, mean
        self.itemsize, self.on_cpu = self.network.map_dtype.itemsize, self.network.device.type == "cpu"
        self.channels = self.network.channels_of()
        self.lengths, self.price = cache(self._lengths), cache(self._price)

    def _lengths(self, axis: int, size: int, gather: bool) -> Lengths:
        """Some tiles stand for all: those at both ends and one in between, which repeats."""
        segment, names = self.segment, self.segment.inputs if gather else self.segment.owned
        along = influenced_along if gather else needed_along
        bounds = [segment._bounds(name, axis, size) for name in names]
        tiles = [t for t in zip(*bounds, strict=True) if any(a < b for a, b in t)]
        count = len(tiles)
        chosen = (
            list(range(count)) if count <= 9 else [0, 1, 2, 3, count // 2, count - 4, count - 3, count - 2, count - 1]
        )
        total: dict[str, int] = {}
        longest: dict[str, int] = {}
        shapes = set()
        for i in chosen:
            parts = {n: ab for n, ab in zip(names, tiles[i], strict=True) if ab[0] < ab[1]}
            spans = along(axis, segment.nodes, parts, self.network.extents)
            sizes = {n: stop - start for n, (start, stop) in spans.items()}
            shapes.add(tuple(sizes.values()))
            weight = count - len(chosen) + 1 if i == count // 2 and count > 9 else 1
            for name, n in sizes.items():
                total[name] = total.get(name, 0) + n * weight
                longest[name] = max(longest.get(name, 0), n)
        return Lengths(total, longest, count, len(shapes))

    def _price(self, size: Extent, way: str) -> Cost:
        gather = way == "gather"
        y, x = self.lengths(0, size[0], gather), self.lengths(1, size[1], gather)
        areas = {n: v * x.longest[n] for n, v in y.longest.items() if n in x.longest}
        nodes = [n for n in self.segment.nodes if n.name in areas]
        peak = self._backward_bytes(nodes, areas) if gather else self._forward_bytes(nodes, areas, way == "scatter")
        rates = rates_of(self.network, way == "scatter" and self.want_weights)
        flops, seconds = 0, 0.0
        for node in nodes:
            pixels = y.total[node.name] * x.total[node.name]
            work = node.operation.flops(node.channels)
            times = 1 if way != "scatter" else 3 if self.want_weights else 2
            flops += work * pixels * times
            moved = node.channels * pixels * self.itemsize * times
            biggest = max(self._bytes(name, areas) for name in (node.name, *node.inputs) if name in areas)
            seconds += moved / (rates.bytes_per_s if biggest <= HEAP_BYTES else rates.mapped_bytes_per_s)
        tiles = y.tiles * x.tiles
        convolutions = sum(isinstance(n.operation, Convolution) for n in nodes)
        kernels = min((2 if way == "scatter" else 1) * convolutions * y.kinds * x.kinds, KERNELS) if self.on_cpu else 0
        seconds += flops / rates.flops_per_s + rates.step_s * tiles * len(nodes) + KERNEL_S * kernels
        if way == "scatter" and (places := winners(self.network)) is not None:  # tiles without a maximum are left out
            share = min(1.0, places / tiles)
            flops, seconds = math.ceil(flops * share), seconds * share + LOOK_S * tiles
        weights = max([w.numel() * self.itemsize for n in nodes for w in n.operation.weights], default=0)
        sums = 0  # gradients of weights: of this segment's from one tile, of all from the tiles before
        for group in (nodes, self.network.nodes) if self.want_weights else ():
            sums += sum(w.numel() for n in group for w in n.operation.weights) * self.itemsize
        workspace = 0 if self.on_cpu or self.itemsize == 2 else WORKSPACE_BYTES
        fixed = FIXED_BYTES + workspace + 2 * weights + sums
        return Cost(int(peak * SLACK) + fixed, kernels * KERNEL_BYTES, flops, seconds)

    def _bytes(self, name: str, areas: Areas) -> int:
        return self.channels[name] * areas[name] * self.itemsize

    def _tape_bytes(self, node: Node, areas: Areas) -> int:
        kind = keeps(node.operation, self.want_weights)
        values = node.channels * areas[node.name]
        return {"sign": values, "winners": 2 * values}.get(kind, 0)

    def _forward_bytes(self, nodes: list[Node], areas: Areas, scatter: bool) -> int:
        """Peak of live buffers over a tile, by walking its steps as `tile.forward` and `tile.backward` do them."""
        users: dict[str, int] = dict.fromkeys(self.segment.owned, 1)
        for node in nodes:
            for name in node.inputs:
                users[name] = users.get(name, 0) + 1
        live = {name: self._bytes(name, areas) for name in self.segment.inputs if name in areas}
        kept: dict[str, int] = {}
        entry = sum(live.values())
        peak = 2 * entry
        tape = 0
        for node in nodes:
            own, kind = self._bytes(node.name, areas), keeps(node.operation, self.want_weights)
            read = sum(self._bytes(name, areas) for name in node.inputs)
            alone = isinstance(node.operation, ReLU) and users[node.inputs[0]] == 1 and node.inputs[0] not in kept
            alone = alone and areas[node.inputs[0]] == areas[node.name]  # a part of a larger map is not overwritten
            extra = read if isinstance(node.operation, Windowed) else 0  # padded or re-ordered
            if isinstance(node.operation, MaxPool):  # PyTorch finds winners even if nobody wants them
                extra += (17 if scatter or self.taped else 8) * node.channels * areas[node.name]
            elif (scatter or self.taped) and kind == "sign":
                extra += 5 * node.channels * areas[node.name] // 4
            held = sum(live.values()) + tape + sum([v for n, v in kept.items() if n not in live] if kept else ())
            peak = max(peak, held + (0 if alone else own) + extra)
            live[node.name] = own
            if scatter:
                tape += self._tape_bytes(node, areas)
                if kind == "input":
                    kept.update({name: self._bytes(name, areas) for name in node.inputs})
            for name in node.inputs:
                users[name] -= 1
                if users[name] == 0:
                    live.pop(name, None)
        if not scatter:
            return max(peak, 2 * sum(self._bytes(n, areas) for n in self.segment.owned if n in areas))
        return max(peak, self._backward_bytes(nodes, areas, sum(kept.values()), tape))

    def _backward_bytes(self, nodes: list[Node], areas: Areas, kept: int = 0, tape: int = 0) -> int:
        """Peak on the way back, from what the tape holds and the gradients of what the segment gives."""
        pending = {name: self._bytes(name, areas) for name in self.segment.owned if name in areas}
        peak = kept + tape + 2 * sum(pending.values())
        fresh: set[str] = set()  # values whose gradient nobody else holds
        for node in reversed(nodes):
            own = pending.pop(node.name, 0)
            inputs = {n: self._bytes(n, areas) for n in node.inputs if n in areas}
            if self.mean and set(inputs) == {self.network.image}:
                inputs = {self.network.image: 3 * areas[self.network.image] * self.itemsize}
            again = sum(v for n, v in inputs.items() if n in pending and n not in fresh)  # added up elsewhere
            extra = self._tape_bytes(node, areas) * 5 // 4 if not tape else 0
            if isinstance(node.operation, MaxPool):
                extra += 14 * node.channels * areas[node.name]
            elif isinstance(node.operation, Convolution):
                extra += sum(inputs.values()) if kept else 0  # its input, padded
            elif isinstance(node.operation, AveragePool):
                extra += own + sum(inputs.values())  # as autograd computes it: forward again, and padded
            held = kept + tape + sum(pending.values())
            peak = max(peak, held + own + sum(inputs.values()) + again + extra)
            fresh.update(pending.keys() & inputs.keys())
            fresh.update(inputs if isinstance(node.operation, (Convolution, MaxPool, ReLU)) else ())
            pending.update(inputs)
            tape = max(0, tape - self._tape_bytes(node, areas)) if tape else 0
        return max(peak, 2 * sum(pending.values()))


def sizes(extent: Extent, stride: tuple[int, int]) -> list[Extent]:
    """Tile sizes to choose from, in image px: each axis in equal parts on the segment's grid, not too long and thin."""
    axes = []
    for n, s in zip(extent, stride, strict=True):
        cells = -(-n // s)
        parts = [p for p in (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 46, 64, 128, 256) if p <= cells]
        axes.append(sorted({-(-cells // p) * s for p in [*parts, cells]}, reverse=True))
    full = axes[1][0]
    squarish = [(y, x) for y in axes[0] for x in axes[1] if y <= 2 * x and (x <= 2 * y or x == full)]
    return list(dict.fromkeys([*squarish, (axes[0][-1], axes[1][-1])]))


def rates_of(network: Network, want_weights: bool = False) -> Rates:
    """Those of the device that the network is on."""
    return (WEIGHTS if want_weights else INPUTS) if network.device.type == "cpu" else GPU


def whole_flops(network: Network, want_weights: bool) -> int:
    """FLOPs of the un-tiled pass, forward and backward."""
    extents = network.extents
    forward = sum(n.operation.flops(n.channels) * math.prod(extents[n.name]) for n in network.nodes)
    return forward * (3 if want_weights else 2)
