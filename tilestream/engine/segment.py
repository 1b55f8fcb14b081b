"""The network cut in segments: which maps are kept between them, and how tiles divide each segment's values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from tilestream.geometry import Extent, Interval, Region

from .tile import influenced, needed
from .trace import Network, Node


@dataclass(frozen=True)
class Segment:
    """Nodes [start, stop) of a bound network: between segments whole maps are stored, within one a tile is on its own.

    `inputs` are the image or stored maps that it reads, `stored` the maps that later segments read, `reduced` the
    reductions of maps made here, `owned` all the values that its tiles divide among themselves.
    """

    network: Network
    start: int
    stop: int
    takes_image: bool = False
    """Whether reductions of the image itself are its: so for the first of all sweeps, which has no nodes."""

    @property
    def nodes(self) -> list[Node]:
        return self.network.nodes[self.start : self.stop]

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        made = {n.name for n in self.nodes}
        read = [name for n in self.nodes for name in n.inputs if name not in made]
        return tuple(dict.fromkeys(read)) or (self.network.image,)

    @cached_property
    def stored(self) -> tuple[str, ...]:
        later = {name for n in self.network.nodes[self.stop :] for name in n.inputs}
        return tuple(n.name for n in self.nodes if n.name in later)

    @cached_property
    def reduced(self) -> tuple[str, ...]:
        made = {n.name for n in self.nodes} | ({self.network.image} if self.takes_image else set())
        return tuple(name for name, r in self.network.reductions.items() if r.source in made)

    @cached_property
    def owned(self) -> tuple[str, ...]:
        sources = [self.network.reductions[name].source for name in self.reduced]
        final = [n.name for n in self.nodes if n.name == self.network.output]
        return tuple(dict.fromkeys([*self.stored, *sources, *final]))

    def stride(self, names: Sequence[str]) -> tuple[int, int]:
        """The coarsest grid, in image px, that the maps `names` lie on."""
        strides = self.network.strides()
        y, x = (max([1, *(math.ceil(strides[name][axis]) for name in names)]) for axis in (0, 1))
        return y, x

    def tiles(self, names: Sequence[str], size_px: Extent) -> list[dict[str, Region]]:
        """Divides the maps `names` among tiles of `size_px` image px, in row-major order: the part of each tile."""
        rows, columns = ([self._bounds(name, axis, size_px[axis]) for name in names] for axis in (0, 1))
        tiles = []
        for y in zip(*rows, strict=True):
            for x in zip(*columns, strict=True):
                parts = {name: Region(*a, *b) for name, a, b in zip(names, y, x, strict=True)}
                if parts := {name: region for name, region in parts.items() if not region.empty}:
                    tiles.append(parts)
        return tiles

    def _bounds(self, name: str, axis: int, size: int) -> list[Interval]:
        n, stride = self.network.extents[name][axis], self.network.strides()[name][axis]
        count = -(-self.network.extents[self.network.image][axis] // size)
        edges = [min(n, math.ceil(k * size / stride)) for k in range(count)] + [n]
        return list(pairwise(edges))

    def forward_regions(self, owned: dict[str, Region]) -> dict[str, Region]:
        return needed(self.nodes, owned, self.network.extents)

    def gather_regions(self, parts: dict[str, Region]) -> dict[str, Region]:
        return influenced(self.nodes, parts, self.network.extents)


def segments(network: Network, cuts: Sequence[int]) -> list[Segment]:
    """The network cut before the nodes of these numbers, and wherever a level ends."""
    levels = [i for i in range(1, len(network.nodes)) if network.nodes[i].level != network.nodes[i - 1].level]
    edges = sorted({0, len(network.nodes), *levels, *cuts})
    return [*before(network), *(Segment(network, a, b) for a, b in pairwise(edges))]


def winners(network: Network) -> int | None:
    """From how many places gradients come at most, where all that is reduced are maxima; None where they are not."""
    if network.dense or any(r.kind != "max" for r in network.reductions.values()):
        return None
    return sum(math.prod(r.size()) for r in network.reductions.values())


def before(network: Network) -> list[Segment]:
    """A sweep over the image alone, where it is reduced itself."""
    reduced = any(r.source == network.image for r in network.reductions.values())
    return [Segment(network, 0, 0, True)] if reduced else []
