"""What one task of a saliency pass computes, by a small model of what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tilestream.geometry import GRANULARITIES, Granularity, TilePlan

FLOPS_PER_S = 1e11
"""Of one worker's thread, roughly; a GPU is faster, and its tasks and transfers weigh more."""
BYTES_PER_S = 1e8
"""Between workers: what Dask itself takes for granted until it has measured."""
TASK_S = 0.002
"""Dask's share of a task, which the scheduler spends one task after the other (benchmarks/cluster.py)."""
VALUE_BYTES = 4


@dataclass(frozen=True)
class Share:
    """What a task of a pass computes, and what all images together are expected to take in that way."""

    granularity: Granularity
    tasks: int
    """An image."""
    moved_bytes: int
    """An image: strips between groups of tiles, at most (tasks on one worker move nothing)."""
    seconds: float

    def __str__(self) -> str:
        what = {"image": "a whole image", "band": "a row of tiles", "tile": "a tile"}[self.granularity]
        return f"{what} a task, {self.tasks} an image, at most {self.moved_bytes / 2**20:.1f} MiB exchanged"


def shares(layout: TilePlan, images: int, slots: int, channels: int = 1) -> list[Share]:
    """Each way to share `images` images out to `slots` tasks at a time."""
    found = []
    for granularity in GRANULARITIES:
        groups = layout.groups(granularity)
        moved = layout.exchanged_px(groups) * channels * VALUE_BYTES
        each_s = layout.flops / len(groups) / FLOPS_PER_S
        waves = math.ceil(images * len(groups) / slots)  # the last one leaves slots idle
        tasks = 1 if len(groups) == 1 else 2 + sum(3 + len(_touched(layout, group)) for group in groups)
        seconds = waves * each_s + images * (moved / BYTES_PER_S / slots + tasks * TASK_S)
        found.append(Share(granularity, tasks, moved, seconds))
    return found


def _touched(layout: TilePlan, group: range) -> set[int]:
    """The groups that own cells to which this one adds, itself among them."""
    return {group[0] // len(group), *(cell // len(group) for tile in group for cell in layout.targets[tile])}


def choose(layout: TilePlan, images: int, slots: int, memory: int, channels: int = 1) -> Share:
    """The way that takes least; among equals, the coarsest. It changes no bit of a result.

    An image that is larger, as float32, than a worker's budget of `memory` bytes is always shared out over workers.
    """
    found = shares(layout, images, slots, channels)
    if len(layout.tiles) > 1 and layout.image[0] * layout.image[1] * 3 * VALUE_BYTES > memory:
        found = [share for share in found if share.granularity != "image"]
    return min(found, key=lambda share: round(share.seconds, 3))
