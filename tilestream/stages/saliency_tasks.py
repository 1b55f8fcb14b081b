"""What workers do for a saliency map: some tiles of one photograph, their cells, and how they are put together.

Every function takes a small `Task` and indices, so that a task can run on any worker, twice if it must; networks and
plans are read once a process, by path and hash.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zarr

from tilestream.cluster import Reduction, tile_done
from tilestream.engine import Network, Peak, Reduce, SaliencyPass, Source, highest, highest_of, plan, trace
from tilestream.geometry import Extent, Granularity, Region, TilePlan, interior
from tilestream.methods import Extremes, Normalised, normalise_square, resize_square
from tilestream.nets import load_model
from tilestream.store import Store

Precision = Literal["float32", "bf16"]
OVERVIEW = 8
"""Side in px of the blocks whose maxima make the small picture of a map."""


@dataclass(frozen=True)
class Task:
    """One photograph's map: everything by name, so that it pickles small."""

    store: str
    id: str
    model: str
    model_sha256: str
    plan: str
    net: str | None = None
    target: int = 1
    method: str = "gradient"
    reduce: Reduce = "mean"
    border: float = 0.1
    extremes: Extremes | None = None
    write: str | None = None
    granularity: Granularity = "tile"
    precision: Precision = "float32"
    device: str = "cpu"
    threads: int | None = None
    """Of torch, for each task anew: another run on the same workers may want another number. None leaves them."""


@dataclass(frozen=True)
class Result:
    """A map's highest point inside the border, its small picture (h, w) float32, and the network's probability."""

    peak: Peak
    probability: float
    overview: np.ndarray


@lru_cache(maxsize=2)
def network(
    path: str, sha256: str, net: str | None, precision: Precision = "float32", device: str = "cpu"
) -> tuple[Network, np.ndarray | None]:
    """A traced network and its average image, once a process; the file must be the one that the driver saw."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"model file {path!r} changed while the run was going on; start the run again")
    model = load_model(path, architecture=net)
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
    return SaliencyPass(
        _network(task)[0], read_plan(task.plan), target=task.target, reduce=task.reduce, method=task.method
    )


def _network(task: Task) -> tuple[Network, np.ndarray | None]:
    if task.threads is not None and torch.get_num_threads() != task.threads:
        torch.set_num_threads(task.threads)
    return network(task.model, task.model_sha256, task.net, task.precision, task.device)


def source(task: Task) -> Source:
    """The photograph as the network takes it: normalised if the model says how, raw grey levels otherwise."""
    image = Store(task.store).image(task.id)
    average = _network(task)[1]
    if average is None or task.extremes is None:
        return image
    return Normalised(image, average, task.extremes)


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
Cell = tuple[Peak | None, Region, np.ndarray]
"""The highest point of a box of the map (a cell, or a part of one), the box, and its small picture."""


def _routes(layout: TilePlan, groups: tuple[range, ...]) -> dict[int, tuple[int, ...]]:
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    sources: dict[int, set[int]] = {number: {number} for number in range(len(groups))}
    for cell, readers in layout.routes.items():
        sources[group_of[cell]].update(group_of[tile] for tile in readers)
    return {number: tuple(sorted(found)) for number, found in sources.items()}


def _forward(task: Task, group: range) -> Mapping[int, Any]:
    work, image, shares = saliency_pass(task), source(task), []
    for index in group:
        shares.append(work.forward(image, work.plan.tiles[index]))
        tile_done()
    return {0: shares}


def _pool(task: Task, _: int, partials: list[list[Any]]) -> Any:
    return saliency_pass(task).pooled([share for shares in partials for share in shares])


def _only(values: list[Any]) -> Any:
    return values[0]


def _tiles(task: Task, group: range, pooled: Any = None) -> Mapping[int, Any]:
    """What a group's tiles add to the cells of each group, and the tiles' forward shares.

    What no other group adds to is finished at once: only strips travel, and those of a whole image never pile up.
    """
    work, image = saliency_pass(task), source(task)
    layout, upstream, size = work.plan, work.upstream(pooled), len(group)
    waiting, finished, shares = Strips(), list[Cell](), list[Any]()
    last = {cell: max((t for t in layout.routes[cell] if t in group), default=group[0])
            for cell in group if cell in layout.routes}  # fmt: skip
    for index in group:
        share, pieces = work.pieces(image, layout.tiles[index], upstream)
        shares.append(share)
        for cell, piece in pieces.items():
            waiting.setdefault(cell, []).append(piece)
        for cell in [cell for cell, tile in last.items() if tile == index]:
            now, later = _shared_out(task, layout, cell, group)
            mine = waiting.pop(cell, [])
            finished += [_box(task, box, mine) for box in now]
            waiting[cell] = [part for piece in mine for box in later for part in _cut(piece, box)]
        tile_done()
    found: dict[int, Any] = {group[0] // size: (finished, {}), _LOGITS: shares}
    for cell, strips in waiting.items():
        if strips:
            found.setdefault(cell // size, ([], {}))[1][cell] = strips
    return found


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
    _network(task)
    work = saliency_pass(task)
    if number == _LOGITS:
        logits = work.logits(work.pooled([share for shares in parts for share in shares]))
        return float(torch.softmax(logits.double(), dim=1)[0, task.target])
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
    """The highest point and small picture of a box of the map, its values written where they are wanted."""
    work = saliency_pass(task)
    values = work.summed(box, pieces)
    if task.write is not None:
        zarr.open_array(task.write, mode="r+")[box.y0 : box.y1, box.x0 : box.x1] = values
    return highest(values, box, interior(work.plan.image, task.border)), box, overview(values, box)


def _finish(task: Task, values: list[Any]) -> Result:
    probability, *groups = values  # the destination -1 comes first
    cells = [cell for group in groups for cell in group]
    extent = read_plan(task.plan).image
    small = np.full(tuple(-(-n // OVERVIEW) for n in extent), -np.inf, np.float32)
    for _, cell, block in cells:
        y, x = cell.y0 // OVERVIEW, cell.x0 // OVERVIEW
        part = small[y : y + block.shape[0], x : x + block.shape[1]]
        np.maximum(part, block, out=part)  # cells of a small stride share blocks
    return Result(highest_of([peak for peak, _, _ in cells]), probability, small)


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
    if task.device == "cuda":  # the same bits on every run
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    _network(task)


def distance_to_float32(task: Task, side_px: int = 1024) -> tuple[float, float]:
    """Of the map of a photograph's middle alone: L2 distance by the norm, and how many px the highest point moves."""
    image = source(task)
    _, height, width = image.shape
    box = Region.whole((height, width)).intersect(
        Region(*(v for n in (height, width) for v in ((n - side_px) // 2, (n + side_px) // 2)))
    )
    part = np.asarray(image[:, box.y0 : box.y1, box.x0 : box.x1])
    maps = []
    both: tuple[Precision, ...] = ("float32", task.precision)
    for precision in both:
        net, _ = network(task.model, task.model_sha256, task.net, precision, task.device)
        layout = plan(net, box.shape, tile=_stride_multiple(net, max(box.shape)))
        values = np.empty(box.shape, np.float32)
        SaliencyPass(net, layout, target=task.target, reduce=task.reduce, method=task.method).run(part, _into(values))
        maps.append(values)
    peaks = [highest_of([highest(values, Region.whole(box.shape), Region.whole(box.shape))]) for values in maps]
    moved = math.hypot(peaks[0].y_px - peaks[1].y_px, peaks[0].x_px - peaks[1].x_px)
    return float(np.linalg.norm(maps[1] - maps[0]) / np.linalg.norm(maps[0])), moved


def _into(values: np.ndarray) -> Callable[[Region, np.ndarray], None]:
    def write(cell: Region, block: np.ndarray) -> None:
        values[cell.y0 : cell.y1, cell.x0 : cell.x1] = block

    return write


def squashed(task: Task, size_px: int) -> Result:
    """The map over the squashed square (paper A's training crops), its highest point in px of the photograph."""
    net, average = _network(task)
    store = Store(task.store)
    raw = resize_square(np.asarray(store.square(task.id)[:]), size_px)
    image = raw if average is None else normalise_square(raw, average)
    layout = plan(net, (size_px, size_px), tile=_stride_multiple(net, size_px))
    work = SaliencyPass(net, layout, target=task.target, reduce=task.reduce, method=task.method)
    values = np.empty((size_px, size_px), np.float32)

    logits = work.run(image, _into(values))
    found = highest_of([highest(values, Region(0, size_px, 0, size_px), interior((size_px, size_px), task.border))])
    height, width = store.levels(task.id)[0][1:]
    y_px, x_px = (_unsquash(p, n, size_px) for p, n in zip((found.y_px, found.x_px), (height, width), strict=True))
    probability = float(torch.softmax(logits.double(), dim=1)[0, task.target])
    return Result(Peak(y_px, x_px, found.value), probability, overview(values))


def _unsquash(position: int, length: int, size_px: int) -> int:
    """The px of the photograph whose centre lies nearest: i maps to (i + 1/2) H / S - 1/2."""
    return min(length - 1, max(0, round((position + 0.5) * length / size_px - 0.5)))


def _stride_multiple(net: Network, size_px: int) -> int:
    stride = math.ceil(max(net.nodes[-1].stride))
    return -(-size_px // stride) * stride


def image_extent(store: Store, id: str) -> Extent:
    """Height and width of a photograph, from its commit."""
    _, height, width = store.levels(id)[0]
    return height, width
