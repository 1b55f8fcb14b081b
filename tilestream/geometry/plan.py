"""The tile plan: a value, made before anything runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from .region import Extent, Region

Granularity = Literal["image", "band", "tile"]
"""What one task computes: all tiles of an image, a row of them, or one."""
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


@dataclass(frozen=True, slots=True)
class Tile:
    """One unit of work: it computes `output` of the last map, reads `window` of the image, and owns `cell` of it.

    Outputs partition the last map, cells partition the image; windows overlap by the halo.
    """

    index: int
    output: Region
    window: Region
    cell: Region


@dataclass(frozen=True)
class TilePlan:
    """How one image is cut, with what that is predicted to cost.

    `peak_bytes` is what the whole call adds to the process, `tile_bytes` the part of it that one tile's work takes;
    `flops` counts forward and backward over all tiles, `whole_flops` the same for the uncut image.
    """

    image: Extent
    map: Extent
    stride: tuple[int, int]
    tile_px: tuple[int, int]
    tiles: tuple[Tile, ...]
    tile_bytes: int
    peak_bytes: int
    flops: int
    whole_flops: int

    @property
    def overhead(self) -> float:
        """FLOPs over those of the uncut image; 1.0 means that no halo is computed twice."""
        return self.flops / self.whole_flops if self.whole_flops else 1.0

    @property
    def halo_px(self) -> int:
        """The widest border, in image pixels, that a tile borrows beyond its own cell."""
        return max(
            max(
                tile.cell.y0 - tile.window.y0,
                tile.window.y1 - tile.cell.y1,
                tile.cell.x0 - tile.window.x0,
                tile.window.x1 - tile.cell.x1,
                0,
            )
            for tile in self.tiles
        )

    @cached_property
    def routes(self) -> dict[int, tuple[int, ...]]:
        """For each cell that is not empty the tiles, ascending, whose windows touch it: who adds to its gradient."""
        return self._meeting("cell", "window")

    @cached_property
    def targets(self) -> dict[int, tuple[int, ...]]:
        """`routes` the other way: for each tile the cells that its window touches."""
        return self._meeting("window", "cell")

    def groups(self, granularity: Granularity) -> tuple[range, ...]:
        """Indices of the tiles of each task, ascending. Grouping changes no bit of a result."""
        size = {"image": len(self.tiles), "band": self.columns, "tile": 1}[granularity]
        return tuple(range(start, start + size) for start in range(0, len(self.tiles), size))

    def inner(self, index: int, group: range) -> Region:
        """The part of a cell that no tile outside `group` adds to; empty where there is none.

        Foreign windows come in from the sides, so a box is left; each is cut off where least is lost.
        """
        box = self.tiles[index].cell
        for reader in self.routes[index]:
            if reader in group:
                continue
            other = self.tiles[reader].window.intersect(box)
            if not other.empty:
                box = max(box.minus(other), key=lambda each: each.area, default=Region(0, 0, 0, 0))
        return box

    def exchanged_px(self, groups: tuple[range, ...]) -> int:
        """Pixels of gradient that are added up across groups: the strips of cells in which windows of several meet."""
        group_of = {index: group for group in groups for index in group}
        theirs = sum(
            self.tiles[reader].window.intersect(self.tiles[cell].cell).area
            for cell, readers in self.routes.items()
            for reader in readers
            if reader not in group_of[cell]
        )
        mine = sum(self.tiles[cell].cell.area - self.inner(cell, group_of[cell]).area for cell in self.routes)
        return theirs + mine

    @property
    def columns(self) -> int:
        """Tiles in a row of them."""
        return sum(tile.output.y0 == self.tiles[0].output.y0 for tile in self.tiles)

    def _meeting(self, mine: str, others: str) -> dict[int, tuple[int, ...]]:
        """For each tile whose `mine` is not empty the tiles, ascending, whose `others` meet it.

        Tiles lie on a grid, where boxes meet if their rows and their columns do: no need to try all pairs of tiles.
        """
        columns = self.columns
        row, column = self.tiles[:columns], self.tiles[::columns]
        ys = _meets([getattr(t, mine) for t in column], [getattr(t, others) for t in column], 0)
        xs = _meets([getattr(t, mine) for t in row], [getattr(t, others) for t in row], 1)
        return {
            tile.index: tuple(y * columns + x for y in ys[tile.index // columns] for x in xs[tile.index % columns])
            for tile in self.tiles
            if not getattr(tile, mine).empty
        }

    def to_json(self) -> str:
        """The plan as text, for run folders: `from_json` gives it back equal."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TilePlan:
        raw: dict[str, Any] = json.loads(text)
        tiles = tuple(
            Tile(t["index"], Region(**t["output"]), Region(**t["window"]), Region(**t["cell"]))
            for t in raw.pop("tiles")
        )
        pairs: dict[str, Any] = {key: tuple(raw.pop(key)) for key in ("image", "map", "stride", "tile_px")}
        return cls(**pairs, **raw, tiles=tiles)

    def __str__(self) -> str:
        rows, columns = (-(-n // t) for n, t in zip(self.map, _cells(self), strict=True))
        return (
            f"image {self.image[0]} x {self.image[1]} px, "
            f"{rows} x {columns} tiles of {self.tile_px[0]} x {self.tile_px[1]} px, halo {self.halo_px} px, "
            f"peak {_bytes(self.peak_bytes)}, {self.flops / 1e9:.1f} GFLOP ({self.overhead:.2f}x the uncut image)"
        )


@dataclass(frozen=True)
class SegmentPlan:
    """Nodes [start, stop) of the network, with the tiles of its sweeps, (height, width) in image px."""

    start: int
    stop: int
    forward_px: tuple[int, int]
    backward_px: tuple[int, int]
    tile_bytes: int


@dataclass(frozen=True)
class Plan:
    """How one image goes through the network: the segments between stored maps, each with its tiles.

    `mode` is how gradients come back: "scatter" (tiles own outputs) or "gather" (tiles own inputs), see the engine's
    DESIGN.md. `peak_bytes` is what the whole call adds to the process, `scratch_bytes` the part of it that stored maps
    may take before they go to files, `stored_bytes` all that is stored at once. `flops` counts all sweeps with their
    halos, `whole_flops` the un-tiled pass, forward and backward.
    """

    image: Extent
    mode: str
    segments: tuple[SegmentPlan, ...]
    paths: tuple[str, ...]
    """For each segment the module that it starts with."""
    halo_px: int
    peak_bytes: int
    scratch_bytes: int
    stored_bytes: int
    flops: int
    whole_flops: int
    seconds: float
    """What the cost model expects, on a machine like the one it was measured on: to compare plans by."""

    @property
    def overhead(self) -> float:
        """FLOPs over those of the un-tiled pass; 1.0 means that nothing is computed twice."""
        return self.flops / self.whole_flops if self.whole_flops else 1.0

    @property
    def tiles(self) -> int:
        """Tiles of the forward sweep, over all segments."""
        return sum(-(-self.image[0] // s.forward_px[0]) * -(-self.image[1] // s.forward_px[1]) for s in self.segments)

    def __str__(self) -> str:
        head = (
            f"image {self.image[0]} x {self.image[1]} px, {self.mode}, {self.tiles} tiles in {len(self.segments)} "
            f"segment{'s' * (len(self.segments) > 1)}, halo {self.halo_px} px, peak {_bytes(self.peak_bytes)}, "
            f"{self.flops / 1e9:.1f} GFLOP ({self.overhead:.2f}x the uncut image)"
        )
        rows = [
            f"  from {path or 'the image'}: tiles of {s.forward_px[0]} x {s.forward_px[1]} px"
            + (f", back {s.backward_px[0]} x {s.backward_px[1]} px" if s.backward_px != s.forward_px else "")
            + f", {_bytes(s.tile_bytes)}"
            for s, path in zip(self.segments, self.paths, strict=True)
        ]
        return "\n".join([head, *rows])


def tile_regions(extent: Extent, size: tuple[int, int]) -> list[Region]:
    """Cuts a map into boxes of `size` in row-major order, smaller at the far borders.

    >>> [str(r) for r in tile_regions((3, 2), (2, 2))]
    ['y [0, 2) x [0, 2)', 'y [2, 3) x [0, 2)']
    """
    return [
        Region(y, min(y + size[0], extent[0]), x, min(x + size[1], extent[1]))
        for y in range(0, extent[0], size[0])
        for x in range(0, extent[1], size[1])
    ]


def _meets(mine: list[Region], others: list[Region], axis: int) -> list[list[int]]:
    """For each of `mine` the places in `others` of those that share a row (axis 0) or a column (axis 1) with it."""
    a, b = ([(r.y0, r.y1) if axis == 0 else (r.x0, r.x1) for r in boxes] for boxes in (mine, others))
    return [[i for i, (lo, hi) in enumerate(b) if max(lo, start) < min(hi, stop)] for start, stop in a]


def _cells(plan: TilePlan) -> tuple[int, int]:
    return plan.tile_px[0] // plan.stride[0], plan.tile_px[1] // plan.stride[1]


def _bytes(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
