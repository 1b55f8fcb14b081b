"""What workers do for a saliency map: some tiles of one photograph, their cells, and how they are put together.

Every function takes a small `Task` and indices, so that a task can run on any worker, twice if it must; networks and
plans are read once a process, by path and hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zarr

from tilestream.cluster import Reduction, tile_done
from tilestream.engine import Network, Peak, Reduce, SaliencyPass, Source, trace
from tilestream.geometry import Extent, Granularity, Region, Tile, TilePlan
from tilestream.methods import (
    Border,
    Extremes,
    FieldOfView,
    Noise,
    Noisy,
    Normalised,
    Search,
    Seen,
    conclude,
    look,
)
from tilestream.store import Store

from .models import read_once, steady

Precision = Literal["float32", "bf16"]
OVERVIEW = 8
"""Side in px of the blocks whose maxima make the small picture of a map."""


@dataclass(frozen=True)
class Task:
    """One photograph's map, of saliency or of windows: everything by name, so that it pickles small."""

    store: str
    id: str
    model: str
    model_sha256: str
    plan: str
    net: str | None = None
    target: int = 1
    method: str = "gradient"
    """Of `tilestream.stream`, or smoothgrad: then with `noise`."""
    noise: Noise | None = None
    reduce: Reduce = "mean"
    border: float = 0.1
    circle: FieldOfView | None = None
    """For the circle rule; None: the frame's."""
    search: Search = field(default_factory=Search)
    extremes: Extremes | None = None
    write: str | None = None
    granularity: Granularity = "tile"
    precision: Precision = "float32"
    device: str = "cpu"
    threads: int | None = None
    """Of torch, for each task anew: another run on the same workers may want another number. None leaves them."""
    memory: int = 0
    """Bytes, where a whole image is one task by stored maps, and `tile_px` its tiles; 0: whole-network tiles."""
    tile_px: int | None = None
    window_px: int | None = None
    """Side of the windows that the network slides over a whole image, after surgery; None: it is as it is."""

    def rule(self, extent: Extent, photograph: Extent | None = None) -> Border:
        """The border rule of a map."""
        return Border(extent, self.border, self.circle, photograph)


@dataclass(frozen=True)
class Result:
    """A map's centre, its small picture (h, w) float32, the photograph's probability, and all candidates.

    The centre is the first candidate. A network that returns a map has no probability.
    """

    peak: Peak
    probability: float | None
    overview: np.ndarray
    candidates: tuple[Peak, ...] = ()


@lru_cache(maxsize=2)
def network(
    path: str, sha256: str, net: str | None, precision: Precision = "float32", device: str = "cpu"
) -> tuple[Network, np.ndarray | None]:
    """A traced network and its average image, once a process."""
    model = read_once(path, sha256, net)
    average = model.preprocessing.get("average")
    traced = trace(model.net.to(device), None if precision == "float32" else precision)
    return traced, None if average is None else np.asarray(average, np.float32)


@lru_cache(maxsize=16)
def read_plan(path: str) -> TilePlan:
    """A recorded plan, once a process."""
    return TilePlan.from_json(Path(path).read_text())


@lru_cache(maxsize=4)
def saliency_pass(task: Task) -> SaliencyPass:
    """The pass that a task's tiles and cells are steps of."""
    method = "gradient" if task.noise else task.method
    return SaliencyPass(traced(task)[0], read_plan(task.plan), target=task.target, reduce=task.reduce, method=method)


def traced(task: Task) -> tuple[Network, np.ndarray | None]:
    """The task's network and average image, and its number of threads from now on."""
    steady(task.device, task.threads)
    return network(task.model, task.model_sha256, task.net, task.precision, task.device)


def source(task: Task) -> Source:
    """The photograph as the network takes it: normalised if the model says how, raw grey levels otherwise."""
    steady(task.device, task.threads)
    image = Store(task.store).image(task.id)
    average = read_once(task.model, task.model_sha256, task.net).preprocessing.get("average")
    if average is None or task.extremes is None:
        return image
    return Normalised(image, np.asarray(average, np.float32), task.extremes)


def reduction(task: Task) -> Reduction:
    """The photograph's map as a reduction: tiles give strips, their cells add them up, the highest point comes back."""
    work = saliency_pass(task)
    groups = work.plan.groups(task.granularity)
    everything = tuple(range(len(groups)))
    prelude = None
    if not work.one_sweep:
        prelude = Reduction(groups, partial(_forward, task), {0: everything}, partial(_pool, task), _only)
    return Reduction(
        groups,
        partial(_tiles, task),
        {**_routes(work.plan, groups), _LOGITS: everything},
        partial(_cells, task),
        partial(_finish, task),
        prelude,
    )


_LOGITS = -1
"""The destination of the tiles' forward shares; the others are groups of cells, numbered as those of tiles."""
Strips = dict[int, list[tuple[Region, np.ndarray]]]
"""By cell: what tiles add to its gradient, in ascending order of tiles."""
Cell = tuple[Seen, Region, np.ndarray]
"""What a box of the map (a cell, or a part of one) shows to find centres by, the box, and its small picture."""


def _routes(layout: TilePlan, groups: tuple[range, ...]) -> dict[int, tuple[int, ...]]:
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    sources: dict[int, set[int]] = {number: {number} for number in range(len(groups))}
    for cell, readers in layout.routes.items():
        sources[group_of[cell]].update(group_of[tile] for tile in readers)
    return {number: tuple(sorted(found)) for number, found in sources.items()}


def copies(task: Task, image: Source) -> Iterator[Source]:
    """What gradients are taken of: the image, or noisy copies of it."""
    if task.noise is None:
        yield image
    else:
        yield from (Noisy(image, task.noise, sample) for sample in range(task.noise.samples))


def _forward(task: Task, group: range) -> Mapping[int, Any]:
    """For each tile of a group its forward shares, of each copy of the image."""
    work, image, shares = saliency_pass(task), source(task), []
    for index in group:
        shares.append([work.forward(copy, work.plan.tiles[index]) for copy in copies(task, image)])
        tile_done()
    return {0: shares}


def _pool(task: Task, _: int, partials: list[list[Any]]) -> list[Any]:
    """The whole image's reductions, of each copy of it."""
    tiles = [shares for group in partials for shares in group]
    return [saliency_pass(task).pooled(list(shares)) for shares in zip(*tiles, strict=True)]


def _only(values: list[Any]) -> Any:
    return values[0]


def _tiles(task: Task, group: range, pooled: Sequence[Any] | None = None) -> Mapping[int, Any]:
    """What a group's tiles add to the cells of each group, and the tiles' forward shares.

    What no other group adds to is finished at once: only strips travel, and those of a whole image never pile up.
    """
    work, image = saliency_pass(task), source(task)
    layout, size = work.plan, len(group)
    upstreams = [work.upstream(each) for each in pooled or [None]]
    waiting, finished, shares = Strips(), list[Cell](), list[Any]()
    last = {cell: max((t for t in layout.routes[cell] if t in group), default=group[0])
            for cell in group if cell in layout.routes}  # fmt: skip
    for index in group:
        share, pieces = _tile(task, image, layout.tiles[index], upstreams)
        shares.append(share)
        for cell, piece in pieces.items():
            waiting.setdefault(cell, []).append(piece)
        for cell in [cell for cell, tile in last.items() if tile == index]:
            now, later = _shared_out(task, layout, cell, group)
            mine = waiting.pop(cell, [])
            finished += [_box(task, box, mine) for box in now]
            waiting[cell] = [part for piece in mine for box in later for part in _cut(piece, box)]
    found: dict[int, Any] = {group[0] // size: (finished, {}), _LOGITS: shares}
    for cell, strips in waiting.items():
        if strips:
            found.setdefault(cell // size, ([], {}))[1][cell] = strips
    return found


def _tile(task: Task, image: Source, tile: Tile, upstreams: list[Any]) -> tuple[Any, dict[int, Any]]:
    """A tile's forward shares of the image, and its gradient cut by cells: the mean over the copies."""
    work, total = saliency_pass(task), dict[int, tuple[Region, np.ndarray]]()
    if task.noise is None:
        found = work.pieces(image, tile, upstreams[0])
        tile_done()
        return found
    for number, copy in enumerate(copies(task, image)):
        for cell, (region, values) in work.pieces(copy, tile, upstreams[number % len(upstreams)])[1].items():
            if cell in total:
                np.add(total[cell][1], values, out=total[cell][1])
            else:
                total[cell] = region, values.copy()
        tile_done()
    for _, values in total.values():
        values /= task.noise.samples
    return work.forward(image, tile), total


def _shared_out(task: Task, layout: TilePlan, cell: int, group: range) -> tuple[list[Region], list[Region]]:
    """Boxes of a cell that its group finishes, and those that wait for others.

    Where maps are written, a cell is a chunk, which two tasks must never write to: it is finished at once or waits.
    """
    whole, inner = layout.tiles[cell].cell, layout.inner(cell, group)
    if inner != whole and task.write is not None:
        inner = Region(0, 0, 0, 0)
    return ([] if inner.empty else [inner]), whole.minus(inner)


def _cut(piece: tuple[Region, np.ndarray], box: Region) -> list[tuple[Region, np.ndarray]]:
    region, values = piece
    part = region.intersect(box)
    return [] if part.empty else [(part, values[(slice(None), *part.within(region))].copy())]


def _cells(task: Task, number: int, parts: list[Any]) -> Any:
    """The finished boxes of a group's cells; or, of the forward shares, the probability."""
    traced(task)
    work = saliency_pass(task)
    if number == _LOGITS:
        return probability_of(work.logits(work.pooled([share for shares in parts for share in shares])), task.target)
    waiting, finished = Strips(), list[Cell]()
    for done, strips in parts:  # in ascending order of groups, and so of tiles
        finished += done
        for cell, pieces in strips.items():
            waiting.setdefault(cell, []).extend(pieces)
    group = work.plan.groups(task.granularity)[number]
    for cell, pieces in sorted(waiting.items()):
        finished += [_box(task, box, pieces) for box in _shared_out(task, work.plan, cell, group)[1]]
    return finished


def _box(task: Task, box: Region, pieces: list[tuple[Region, np.ndarray]]) -> Cell:
    work = saliency_pass(task)
    return found(task, task.rule(work.plan.image), box, work.summed(box, pieces))


def found(task: Task, rule: Border, box: Region, values: np.ndarray) -> Cell:
    """What is kept of a box of the map, (h, w); its values are written where they are wanted."""
    if task.write is not None:
        zarr.open_array(task.write, mode="r+")[box.y0 : box.y1, box.x0 : box.x1] = values
    return look(values, box, rule, task.search), box, overview(values, box)


def _finish(task: Task, values: list[Any]) -> Result:
    probability, *groups = values  # the destination -1 comes first
    return result(task, task.rule(read_plan(task.plan).image), [c for group in groups for c in group], probability)


def result(task: Task, rule: Border, cells: Sequence[Cell], probability: float | None) -> Result:
    """What all boxes of a map show together."""
    small = np.full(tuple(-(-n // OVERVIEW) for n in rule.extent), -np.inf, np.float32)
    for _, cell, block in cells:
        y, x = cell.y0 // OVERVIEW, cell.x0 // OVERVIEW
        part = small[y : y + block.shape[0], x : x + block.shape[1]]
        np.maximum(part, block, out=part)  # cells of a small stride share blocks
    centres = conclude([seen for seen, _, _ in cells], rule, task.search)
    return Result(centres[0], probability, small, tuple(centres))


def probability_of(logits: torch.Tensor, target: int) -> float | None:
    """Of a class, by softmax; None for a network whose result is a map."""
    return float(torch.softmax(logits.double(), dim=1)[0, target]) if logits.ndim == 2 and logits.shape[1] else None


def overview(values: np.ndarray, cell: Region | None = None) -> np.ndarray:
    """Maxima of the photograph's blocks of 8 x 8 px that `cell` (default: all) meets, float32: a hot pixel stays seen.

    `values` (h, w) cover `cell`, whose corner need not be a block's.
    """
    corner = (0, 0) if cell is None else (cell.y0, cell.x0)
    starts = [np.maximum(np.arange(-(c % OVERVIEW), n, OVERVIEW), 0) for c, n in zip(corner, values.shape, strict=True)]
    rows = np.maximum.reduceat(values, starts[0], axis=0)
    return np.maximum.reduceat(rows, starts[1], axis=1).astype(np.float32)


def prepare(task: Task) -> None:
    """Reads and checks a pass's network in a worker before its first task; ValueError for a precision that it lacks."""
    if task.precision == "bf16":
        on_gpu = task.device == "cuda"
        if not (torch.cuda.is_bf16_supported() if on_gpu else torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            raise ValueError(f"precision='bf16', but this {task.device} has no bfloat16; use float32")
    traced(task)
