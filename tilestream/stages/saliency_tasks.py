"""What workers do for a saliency map: a tile of one photograph, a cell of it, and how they are put together.

Every function takes a small `Task` and indices, so that a task can run on any worker, twice if it must; networks and
plans are read once a process, by path and hash.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from tilestream.cluster import Reduction
from tilestream.engine import Network, Peak, Reduce, SaliencyPass, Source, highest, highest_of, plan, trace
from tilestream.geometry import Extent, Region, TilePlan, interior
from tilestream.methods import Extremes, Normalised, normalise_square, resize_square
from tilestream.nets import load_model
from tilestream.store import Store

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


@dataclass(frozen=True)
class Result:
    """A map's highest point inside the border, its small picture (h, w) float32, and the network's probability."""

    peak: Peak
    probability: float
    overview: np.ndarray


@lru_cache(maxsize=2)
def network(path: str, sha256: str, net: str | None) -> tuple[Network, np.ndarray | None]:
    """A traced network and its average image, once a process; the file must be the one that the driver saw."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"model file {path!r} changed while the run was going on; start the run again")
    model = load_model(path, architecture=net)
    average = model.preprocessing.get("average")
    return trace(model.net), None if average is None else np.asarray(average, np.float32)


@lru_cache(maxsize=16)
def read_plan(path: str) -> TilePlan:
    """A recorded plan, once a process."""
    return TilePlan.from_json(Path(path).read_text())


@lru_cache(maxsize=4)
def saliency_pass(task: Task) -> SaliencyPass:
    """The pass that a task's tiles and cells are steps of."""
    net, _ = network(task.model, task.model_sha256, task.net)
    return SaliencyPass(net, read_plan(task.plan), target=task.target, reduce=task.reduce, method=task.method)


def source(task: Task) -> Source:
    """The photograph as the network takes it: normalised if the model says how, raw grey levels otherwise."""
    image = Store(task.store).image(task.id)
    _, average = network(task.model, task.model_sha256, task.net)
    if average is None or task.extremes is None:
        return image
    return Normalised(image, average, task.extremes)


def reduction(task: Task) -> Reduction:
    """The photograph's map as a reduction: tiles give pieces, cells add them up, the highest point comes back."""
    work = saliency_pass(task)
    layout, tiles = work.plan, tuple(range(len(work.plan.tiles)))
    logits = len(tiles)  # one more destination: the forward shares of all tiles
    prelude = None
    if not work.one_sweep:
        prelude = Reduction(tiles, partial(_forward, task), {0: tiles}, partial(_pool, task), _only)
    return Reduction(
        tiles,
        partial(_tile, task),
        {**layout.routes, logits: tiles},
        partial(_cell, task, logits),
        partial(_finish, task),
        prelude,
    )


def _forward(task: Task, index: int) -> Mapping[int, Any]:
    work = saliency_pass(task)
    return {0: work.forward(source(task), work.plan.tiles[index])}


def _pool(task: Task, _: int, partials: list[Any]) -> Any:
    return saliency_pass(task).pooled(partials)


def _only(values: list[Any]) -> Any:
    return values[0]


def _tile(task: Task, index: int, pooled: Any = None) -> Mapping[int, Any]:
    work = saliency_pass(task)
    shares, pieces = work.pieces(source(task), work.plan.tiles[index], work.upstream(pooled))
    return {**pieces, len(work.plan.tiles): shares}


def _cell(task: Task, logits: int, index: int, pieces: list[Any]) -> Any:
    """A cell's highest point and small picture, its values written where they are wanted; or the probability."""
    work = saliency_pass(task)
    if index == logits:
        return float(torch.softmax(work.logits(work.pooled(pieces)).double(), dim=1)[0, task.target])
    values, cell = work.cell(index, pieces), work.plan.tiles[index].cell
    if task.write is not None:
        zarr.open_array(task.write, mode="r+")[cell.y0 : cell.y1, cell.x0 : cell.x1] = values
    return highest(values, cell, interior(work.plan.image, task.border)), cell, overview(values, cell)


def _finish(task: Task, values: list[Any]) -> Result:
    *cells, probability = values
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


def squashed(task: Task, size_px: int) -> Result:
    """The map over the squashed square (paper A's training crops), its highest point in px of the photograph."""
    net, average = network(task.model, task.model_sha256, task.net)
    store = Store(task.store)
    raw = resize_square(np.asarray(store.square(task.id)[:]), size_px)
    image = raw if average is None else normalise_square(raw, average)
    layout = plan(net, (size_px, size_px), tile=_stride_multiple(net, size_px))
    work = SaliencyPass(net, layout, target=task.target, reduce=task.reduce, method=task.method)
    values = np.empty((size_px, size_px), np.float32)

    def write(cell: Region, block: np.ndarray) -> None:
        values[cell.y0 : cell.y1, cell.x0 : cell.x1] = block

    logits = work.run(image, write)
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
