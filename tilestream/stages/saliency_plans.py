"""How a saliency stage cuts photographs, and shares the tiles out to tasks: for each size of photograph."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tilestream.engine import plan, trace
from tilestream.geometry import Granularity, TilePlan

from . import saliency_tasks as tasks
from .base import Context, replacing
from .granularity import choose, shares
from .jobs import Load

if TYPE_CHECKING:
    from .saliency import SaliencyConfig


class Plans:
    """One recorded plan for each size of photograph, in the run's folder; an unfinished run's plan is used again."""

    def __init__(self, config: SaliencyConfig, context: Context, net: Any) -> None:
        self.config, self.context, self.network = config, context, trace(net)
        self._plans: dict[tuple[int, int], tuple[str, int]] = {}

    def path(self, extent: tuple[int, int]) -> str:
        if extent not in self._plans:
            self._plans[extent] = self._record(extent)
        return self._plans[extent][0]

    def tiles(self, extent: tuple[int, int]) -> int:
        self.path(extent)
        return self._plans[extent][1]

    def _record(self, extent: tuple[int, int]) -> tuple[str, int]:
        path = self.context.partial_path / f"plan-{extent[0]}x{extent[1]}.json"
        if not path.exists():
            layout = plan(
                self.network,
                extent,
                memory=None if self.config.tile_px else int(self.context.cluster.memory),
                tile=self.config.tile_px,
                channels_out=1 if self.config.reduce == "mean" else self.network.channels,
            )
            self.context.say(f"{self.context.name}: {layout}")
            with replacing(path) as temporary:
                temporary.write_text(layout.to_json())
        layout = TilePlan.from_json(path.read_text())
        # named by content: workers keep plans by path, and a name must never mean two plans
        stamp = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        recorded = self.context.run / "plans" / f"{extent[0]}x{extent[1]}-{stamp}.json"
        if not recorded.exists():
            with replacing(recorded) as temporary:
                temporary.write_bytes(path.read_bytes())
        return str(recorded), len(layout.tiles)


class Shares:
    """What a task computes, for each size of photograph; recorded nowhere, for it changes no bit."""

    def __init__(self, config: SaliencyConfig, context: Context, files: Plans, missing: list[tuple[int, int]]) -> None:
        self.chosen: dict[tuple[int, int], Granularity] = {}
        self.largest = Load()
        if config.resolution == "square" or not missing:
            return
        slots, memory = context.slots, int(context.cluster.memory)
        channels = 1 if config.reduce == "mean" else files.network.channels
        check_memory(context)
        for extent, count in Counter(missing).items():
            layout = tasks.read_plan(files.path(extent))
            ways = {share.granularity: share for share in shares(layout, count, slots, channels)}
            auto = choose(layout, count, slots, memory, channels)
            share = auto if config.granularity == "auto" else ways[config.granularity]
            self.chosen[extent] = share.granularity
            context.say(f"{context.name}: {count} of {extent[0]} x {extent[1]} px: {share}")
            groups = len(layout.groups(share.granularity))
            held = 0 if groups == 1 else extent[0] * extent[1] * channels * 4
            self.largest = Load(max(groups, self.largest.tasks), max(held, self.largest.held_bytes))
        self.largest = replace(self.largest, tiles=sum(files.tiles(extent) for extent in missing))

    def of(self, extent: tuple[int, int]) -> Granularity:
        return self.chosen[extent]

    def load(self, device: str) -> Load:
        return replace(self.largest, device=device)


def check_memory(context: Context) -> None:
    """ValueError where a worker would be ended by its own limit of memory before the budget is used."""
    for address, worker in context.workers().items():
        need = int(context.cluster.memory) * worker["nthreads"]
        if 0 < worker["memory_limit"] < need:
            raise ValueError(
                f"worker {address} may take {worker['memory_limit'] / 2**30:.1f} GiB, memory={need / 2**30:.1f} GiB (a "
                "budget for each of its threads) is more; give a smaller --memory, or fewer --workers with more each"
            )
