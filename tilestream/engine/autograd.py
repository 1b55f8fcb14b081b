"""A streamed result that autograd goes back from, by streaming: to the image, and to what is computed of parameters.

Where streaming ends, autograd takes over: at the weights of operations on maps (those of all images are one) and at the
vectors of each image, both differentiable functions of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tilestream.geometry import Region

from .allocator import reused_buffers
from .context import as_it_stands
from .passes import Pass
from .trace import Network

Back = Callable[[Tensor, "Tensor | None"], Iterable[Pass]]
"""Takes the gradient of the results, (N, ...), and a tensor for the images' (None: not wanted), and gives the passes
that went back, one an image, with what they brought along."""


def differentiable(network: Network, works: Sequence[Pass], net: nn.Module, image: Tensor, back: Back) -> Tensor:
    """The results of `works`, (N, classes) or (N, C, h, w), with a history that calls `back` once.

    `net` is what autograd is to watch between the two ways. Raises RuntimeError on the way back where parameters were
    overwritten, for gradients of gradients and the second time.
    """
    results = [work.result() for work in works]
    ends: dict[Any, Tensor] = {}
    with torch.enable_grad():
        for node in network.nodes:
            ends.update({(node.name, i): w for i, w in enumerate(node.operation.effective())})
    for i, work in enumerate(works):
        for name in {network.output, *(v for node in network.nodes for v in node.vectors)} & work.env.keys():
            ends[name, i] = work.env[name]
    ends = {key: t for key, t in ends.items() if isinstance(t, Tensor) and t.requires_grad}
    watched = [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point()), image]
    apply: Any = _Streamed.apply
    with torch.enable_grad():
        result: Tensor = apply(results, back, watched, list(ends), image, *ends.values())
    return result


def each_back(works: Sequence[Pass], down: Tensor, into: Any) -> Iterator[Pass]:
    """Takes every pass back; `into`, of the shape of the image or images, gets the gradient of it unless it is None."""
    for i, work in enumerate(works):
        work.back(down[i : i + 1], None if into is None else partial(_write, into, (i,) * (len(into.shape) - 3)))
        yield work
        work.close()


def _write(into: Any, index: tuple[int, ...], region: Region, values: Tensor) -> None:
    block: Any = values.to(into.device, into.dtype) if isinstance(into, Tensor) else values.contiguous().cpu().numpy()
    into[(*index, slice(None), slice(region.y0, region.y1), slice(region.x0, region.x1))] = block


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, results: list[Tensor], back: Back, watched: Any, keys: list[Any], image: Tensor, *ends: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(*watched)  # PyTorch tells when one is overwritten before `backward`
        ctx.back, ctx.ends = back, [(key, t.shape) for key, t in zip(keys, ends, strict=True)]
        ctx.like_image = partial(torch.empty, image.shape, dtype=image.dtype, device=image.device)
        return torch.cat(results) if len(results) > 1 else results[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: gradients of gradients cannot be streamed")
        return _Streamed.once(ctx, gradient)

    @staticmethod
    @as_it_stands
    @reused_buffers()
    def once(ctx: Any, gradient: Tensor) -> Any:
        back, ctx.back = ctx.back, None
        if back is None:
            raise RuntimeError("this result was gone back from already; call the streamed network again")
        assert ctx.saved_tensors is not None
        into = ctx.like_image() if ctx.needs_input_grad[4] else None
        found: dict[Any, Tensor] = {}
        for i, work in enumerate(back(gradient, into)):
            found.update({(name, i): g for name, g in work.at_vectors.items()})
            for name, tensors in work.weights.items():
                for j, g in enumerate(tensors):
                    found[name, j] = found[name, j].add_(g) if (name, j) in found else g
        got = [found[key].reshape(shape) if key in found else None for key, shape in ctx.ends]
        return None, None, None, None, into, *got
