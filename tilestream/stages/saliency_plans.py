"""How a saliency stage cuts photographs, and shares the tiles out to tasks: for each size of photograph."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

from tilestream.engine import Network, SaliencyPass, plan, stream, trace
from tilestream.geometry import Granularity, TilePlan

from . import saliency_tasks as tasks
from .base import Context, replacing, write_json
from .granularity import choose, shares
from .jobs import Load
from .saliency_config import SaliencyConfig


class Plans:
    """One recorded plan for each size of photograph, in the run's folder; an unfinished run's plan is used again."""

    def __init__(self, config: SaliencyConfig, context: Context, net: Any) -> None:
        self.config, self.context, self.network = config, context, trace(net)
        self._plans: dict[tuple[int, int], tuple[str, int]] = {}

    def path(self, extent: tuple[int, int]) -> str:
        if extent not in self._plans:
            self._plans[extent] = self._record(extent)
        return self._plans[extent][0]

    def layout(self, extent: tuple[int, int]) -> TilePlan:
        return tasks.read_plan(self.path(extent))

    def tiles(self, extent: tuple[int, int]) -> int:
        """Of all sweeps over an image."""
        self.path(extent)
        return self._plans[extent][1] * (self.config.samples if self.config.method == "smoothgrad" else 1)

    def _record(self, extent: tuple[int, int]) -> tuple[str, int]:
        path = self.context.partial_path / f"plan-{extent[0]}x{extent[1]}.json"
        if not path.exists():
            layout = self._cut(extent)
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

    def _cut(self, extent: tuple[int, int]) -> TilePlan:
        channels = 1 if self.config.reduce == "mean" else self.network.channels
        tile = self.config.tile_px

        def within(budget: int) -> TilePlan:
            return plan(self.network, extent, memory=None if tile else budget, tile=tile, channels_out=channels)

        memory = int(self.context.cluster.memory)
        layout = within(memory)
        if self.config.method != "smoothgrad":
            return layout
        # besides, SmoothGrad holds a noisy copy of a tile's window and the sum of its gradients
        each_bytes = (self.network.channels + channels) * self.network.dtype.itemsize
        extra = each_bytes * max(tile.window.area for tile in layout.tiles)
        if layout.peak_bytes + extra > memory:
            layout = within(memory - extra)
        return replace(layout, peak_bytes=layout.peak_bytes + extra)


class Whole:
    """A whole image a task, by stored maps: the budget that its tiles follow from.

    An unfinished run's budget is used again.
    """

    def __init__(self, config: SaliencyConfig, context: Context, net: Any) -> None:
        self.config, self.context, self.network = config, context, trace(net)
        if config.granularity in ("band", "tile"):
            raise ValueError(f"granularity={config.granularity!r}, but {self.why}; use image or auto")
        path = context.partial_path / "budget.json"
        if not path.exists():
            write_json(path, {"memory": int(context.cluster.memory), "tile_px": config.tile_px})
        self.budget: dict[str, Any] = json.loads(path.read_text())
        precision = None if config.precision == "float32" else config.precision
        tile = self.budget["tile_px"]
        self.streamed = stream(net, precision=precision, memory=None if tile else self.budget["memory"], tile=tile)
        self._tiles: dict[tuple[int, int], int] = {}

    @property
    def why(self) -> str:
        if self.config.method != "gradient":
            return f"method={self.config.method!r} takes whole {'photographs' if self.full else 'squares'}"
        if self.config.window_px is not None:
            return f"windows of {self.config.window_px} px take whole photographs"
        return "this network looks at the whole image before its end, or returns a map"

    @property
    def full(self) -> bool:
        return self.config.resolution == "full"

    def tiles(self, extent: tuple[int, int]) -> int:
        """Of all sweeps over an image, roughly."""
        if extent not in self._tiles:
            smooth = self.config.method == "smoothgrad"
            reduce = None if smooth and self.config.reduce != "mean" else self.config.reduce
            method = "gradient" if smooth else self.config.method
            sides = (max(n, self.config.window_px or 0) for n in extent)
            layout = self.streamed.plan((self.network.channels, *sides), reduce=reduce, method=method, out=True)
            self.context.say(f"{self.context.name}: {self.why}: {layout}")
            sweeps = (2 if layout.mode == "gather" else 1) * (self.config.samples if smooth else 1)
            self._tiles[extent] = layout.tiles * sweeps
        return self._tiles[extent]


def takes_whole(config: SaliencyConfig, network: Network) -> bool:
    """Whether tiles of the whole network cannot do it, each on its own; of squares, whether one tile cannot."""
    if config.resolution == "square" and config.method == "smoothgrad":
        return True
    return config.method in ("guided", "deconv") or not _one_pass(network)


def _one_pass(network: Network) -> bool:
    """Whether no map depends on the whole image, and the result is no map."""
    return not network.dense and not any(node.level for node in network.nodes)


def check_target(config: SaliencyConfig, network: Network, extent: tuple[int, int]) -> None:
    """ValueError for a logit that the network does not have, where that is known before it ran."""
    if _one_pass(network) and network.linear:
        side = math.ceil(max(network.nodes[-1].stride))
        layout = plan(network, extent, tile=-(-max(extent) // side) * side)
        SaliencyPass(network, layout, target=config.target).upstream()


class Shares:
    """What a task computes, for each size of photograph; recorded nowhere, for it changes no bit."""

    def __init__(
        self, config: SaliencyConfig, context: Context, files: Plans | Whole, missing: list[tuple[int, int]]
    ) -> None:
        self.chosen: dict[tuple[int, int], Granularity] = {}
        self.largest = Load()
        if config.resolution == "square" or not missing:
            return
        slots, memory = context.slots, int(context.cluster.memory)
        channels = 1 if config.reduce == "mean" else files.network.channels
        check_memory(context)
        if isinstance(files, Whole):
            self.largest = Load(tiles=sum(files.tiles(extent) for extent in missing))
            return
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
