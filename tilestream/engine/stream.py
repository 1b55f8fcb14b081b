"""The public face of the engine: `stream(net)` and what can be done with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tilestream.geometry import TilePlan

from .allocator import return_freed_memory
from .planner import parse_bytes, plan
from .saliency import Reduce, Saliency, SaliencyPass
from .tile import Array, Source, TileRunner, combine, tensors
from .trace import Network, trace

DEFAULT_MEMORY = "2 GiB"


def stream(net: nn.Module, *, memory: int | str | None = None, tile: int | None = None) -> Streamed:
    """A network that runs over images of any size tile by tile, with the results of the un-tiled network.

    `memory` bounds what a call adds to the process's resident memory ("2 GiB" unless given); `tile` fixes the side of
    the tiles instead, in input px, a multiple of the network's stride. `net` must be in evaluation mode, and every
    operation before its global pooling must be one that can be streamed exactly; ValueError names the module otherwise.
    """
    return Streamed(net, memory=memory, tile=tile)


class Streamed:
    """A network, streamed: see `stream`. Weights may change between calls: the network is traced again if they did."""

    def __init__(self, net: nn.Module, *, memory: int | str | None = None, tile: int | None = None) -> None:
        if memory is not None and tile is not None:
            raise ValueError(f"memory={memory!r} and tile={tile} both fix the tiles; give one of them")
        self.net, self.tile = net, tile
        self.memory = parse_bytes(DEFAULT_MEMORY if memory is None else memory)
        self._stamp: Any = None
        return_freed_memory()
        self.network()

    def network(self) -> Network:
        """The traced network, traced anew if a parameter or buffer changed."""
        state = [*self.net.parameters(), *self.net.buffers()]
        stamp = [(t.data_ptr(), t._version, t.dtype, t.device) for t in state], [m.training for m in self.net.modules()]
        if stamp != self._stamp:
            self._network, self._stamp = trace(self.net), stamp
            self._held = [t.detach() for t in state]  # or new weights could get the addresses of old ones
        return self._network

    def plan(self, shape: Sequence[int], *, reduce: Reduce | None = "mean") -> TilePlan:
        """The tiles for an image of this shape, (C, H, W) or (H, W), with predicted peak bytes and FLOPs.

        Raises ValueError when the budget is too small (got, needed and the smallest that works) or the image is.
        """
        network = self.network()
        channels_out = 1 if reduce == "mean" else network.channels
        return plan(
            network,
            (int(shape[-2]), int(shape[-1])),
            memory=None if self.tile is not None else self.memory,
            tile=self.tile,
            channels_out=channels_out,
        )

    def __call__(self, image: Source) -> Tensor:
        """Logits, (N, num_classes), equal to `net(image)`; `image` is (C, H, W) or (N, C, H, W), cast, not scaled."""
        images = [image] if len(image.shape) == 3 else [_Item(image, i) for i in range(image.shape[0])]
        if not images:
            raise ValueError(f"image.shape={tuple(image.shape)} holds no image; give at least one")
        return torch.cat([self._forward(each) for each in images])

    def saliency(
        self,
        image: Source,
        target: int = 1,
        method: str = "gradient",
        reduce: Reduce | None = "mean",
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Saliency:
        """d logit[target] / d input, tile by tile, over `image` (C, H, W) or (1, C, H, W).

        Channels are reduced by their signed mean, or `reduce="absmean"`, `"absmax"`, None (kept). After each tile
        `progress(done, tiles)` is called. Raises ValueError for an unknown target, method or reduce, a budget that is
        too small, and NaN.
        """
        network, source = self.network(), self._single(image)
        layout = self.plan(source.shape, reduce=reduce)
        work = SaliencyPass(network, layout, target=target, reduce=reduce, method=method)
        shape = layout.image if reduce is not None else (network.channels, *layout.image)
        values = np.empty(shape, torch.empty((), dtype=network.dtype).numpy().dtype)

        def write(cell: Any, block: Array) -> None:
            values[..., cell.y0 : cell.y1, cell.x0 : cell.x1] = block

        return Saliency(values, work.run(source, write, progress))

    def _forward(self, image: Source) -> Tensor:
        network = self.network()
        self._check(image)
        layout = self.plan(image.shape)
        runner = TileRunner(network, layout.image)
        pooled = combine(network, [runner.forward(image, tile) for tile in layout.tiles], layout.map)
        with torch.no_grad():
            logits: Tensor = network.head(*tensors(network, pooled))
        return logits

    def _single(self, image: Source) -> Source:
        if len(image.shape) == 4 and image.shape[0] == 1:
            image = _Item(image, 0)
        self._check(image)
        return image

    def _check(self, image: Source) -> None:
        channels = self.network().channels
        if len(image.shape) != 3 or image.shape[0] != channels:
            raise ValueError(f"image.shape={tuple(image.shape)} must be ({channels}, H, W)")


class _Item:
    """One image of a batch, still read in windows."""

    def __init__(self, batch: Any, index: int) -> None:
        self.batch, self.index = batch, index
        self.shape: tuple[int, ...] = tuple(batch.shape[1:])

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Array:
        block: Array = self.batch[(self.index, *index)]
        return block
