"""A whole image's map as one task: squares, ways back that clamp gradients, networks that look at the whole image.

Full-resolution photographs go through the network by stored maps, within the task's budget of memory; the map itself
lies in a file that vanishes, and is looked at box by box as tiles' cells are.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tilestream.cluster import tile_done
from tilestream.engine import Network, Reduce, SaliencyPass, Source, Streamed, plan, stream
from tilestream.engine.saliency import reduced
from tilestream.engine.scratch import FileArray
from tilestream.geometry import Extent, Region, tile_regions
from tilestream.methods import normalise_square, resize_square
from tilestream.methods.windows import Padded
from tilestream.nets import fully_convolutional
from tilestream.store import Store

from . import saliency_tasks as tasks
from .models import read_once
from .saliency_tasks import Precision, Result, Task

BOX_PX = 1024
"""Side of the boxes in which a map is looked at, and of the chunks in which it is kept."""


def photograph(task: Task) -> Result:
    """The map of a photograph at full resolution."""
    image = tasks.source(task)
    values, probability = _streamed_map(task, image)
    extent = (image.shape[1], image.shape[2])
    rule, boxes = task.rule(extent), tile_regions(extent, (BOX_PX, BOX_PX))
    return tasks.result(task, rule, [tasks.found(task, rule, box, values.mean(box)) for box in boxes], probability)


def square(task: Task, size_px: int) -> Result:
    """The map over the squashed square (paper A's training crops), its centres in px of the photograph."""
    net, average = tasks.traced(task)
    store, whole = Store(task.store), Region(0, size_px, 0, size_px)
    raw = resize_square(np.asarray(store.square(task.id)[:]), size_px)
    image = raw if average is None else normalise_square(raw, average)
    if task.memory:
        summed, probability = _streamed_map(task, image)
        values = summed.mean(whole)
    else:
        values, logits = _one_tile(task, net, image)
        probability = tasks.probability_of(logits, task.target)
    height, width = store.levels(task.id)[0][1:]
    rule = task.rule((size_px, size_px), (height, width))
    return tasks.result(task, rule, [tasks.found(task, rule, whole, values)], probability)


class _Map:
    """The engine's target, (H, W) or (C, H, W): what is written is added, in a file without a name.

    `mean` reads a box: divided by the number of copies and reduced to (h, w).
    """

    def __init__(self, extent: Extent, channels: int | None, copies: int, reduce: Reduce) -> None:
        self.extent, self.copies, self.reduce = extent, copies, reduce
        self.shape = extent if channels is None else (channels, *extent)
        self.file = FileArray((*extent, channels or 1), np.dtype(np.float32))

    def __setitem__(self, index: Any, block: Any) -> None:
        *_, ys, xs = index
        values = np.asarray(block, np.float32)
        self.file[ys, xs] = self.file[ys, xs] + (values[..., None] if values.ndim == 2 else np.moveaxis(values, 0, -1))

    def mean(self, box: Region) -> np.ndarray:
        values = np.moveaxis(self.file[box.y0 : box.y1, box.x0 : box.x1], -1, 0) / np.float32(self.copies)
        return np.ascontiguousarray(reduced(values, "mean" if len(self.shape) == 2 else self.reduce))


def streamed(task: Task) -> Streamed:
    """The task's network over images of any size, once a process; after surgery where it slides."""
    return _streamed(
        task.model, task.model_sha256, task.net, task.precision, task.device, task.memory, task.tile_px, task.window_px
    )


@lru_cache(maxsize=2)
def _streamed(
    path: str, sha256: str, net: str | None, precision: Precision, device: str, memory: int, tile_px: int | None,
    window_px: int | None,
) -> Streamed:  # fmt: skip
    how: Any = {"memory": memory} if tile_px is None else {"tile": tile_px}
    module = read_once(path, sha256, net).net.to(device)
    if window_px is not None:
        module = fully_convolutional(module, window_px)
    return stream(module, precision=None if precision == "float32" else precision, **how)


def _streamed_map(task: Task, image: Source) -> tuple[_Map, float | None]:
    """The map, and the probability of the image itself; of an image smaller than a window, the map is a window's."""
    net, noise = streamed(task), task.noise
    if task.window_px is not None:
        image = Padded(image, task.window_px)
    kept = noise is not None and task.reduce != "mean"  # reduced after the mean over copies, not before
    reduce = None if kept else task.reduce
    channels, height, width = image.shape
    values = _Map((height, width), channels if kept else None, noise.samples if noise else 1, task.reduce)
    for copy in tasks.copies(task, image):
        method = "gradient" if noise else task.method
        logits = net.saliency(
            copy, task.target, method, reduce, out=values, progress=lambda done, total: tile_done()
        ).logits
    if noise is not None:
        logits = net(image)
    return values, tasks.probability_of(logits, task.target)


def _one_tile(task: Task, net: Network, image: Source) -> tuple[np.ndarray, torch.Tensor]:
    """The map of a small image by one whole-network tile, and the logits."""
    extent = (image.shape[1], image.shape[2])
    stride = math.ceil(max(net.nodes[-1].stride))
    values = np.empty(extent, np.float32)

    def write(cell: Region, block: np.ndarray) -> None:
        values[cell.y0 : cell.y1, cell.x0 : cell.x1] = block

    work = SaliencyPass(net, plan(net, extent, tile=-(-max(extent) // stride) * stride), target=task.target,
                        reduce=task.reduce)  # fmt: skip
    return values, work.run(image, write)


def distance_to_float32(task: Task, side_px: int = 1024) -> tuple[float, float]:
    """Of the map of a photograph's middle alone: L2 distance by the norm, and how many px the highest point moves.

    SmoothGrad's error is taken for that of the gradient.
    """
    image = tasks.source(task)
    _, height, width = image.shape
    box = Region.whole((height, width)).intersect(
        Region(*(v for n in (height, width) for v in ((n - side_px) // 2, (n + side_px) // 2)))
    )
    part = np.asarray(image[:, box.y0 : box.y1, box.x0 : box.x1])
    maps = []
    both: tuple[Precision, ...] = ("float32", task.precision)
    for precision in both:
        each = replace(task, precision=precision, noise=None, method="gradient" if task.noise else task.method)
        if task.memory:
            maps.append(_streamed_map(each, part)[0].mean(Region.whole(box.shape)))
        else:
            maps.append(_one_tile(each, tasks.traced(each)[0], part)[0])
    peaks = [np.unravel_index(int(values.argmax()), box.shape) for values in maps]
    moved = math.dist(*peaks)
    return float(np.linalg.norm(maps[1] - maps[0]) / np.linalg.norm(maps[0])), moved
