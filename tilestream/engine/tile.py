"""One tile of one segment: forward over regions, with what the way back needs put on a tape; and backward.

Forward, every value covers a region that holds what the tile's outputs need (`needed`). Backward there are two ways.
Scatter: gradients cover the same regions, as shares that sums over tiles complete. Gather: they cover what the tile's
own part of the inputs can influence (`influenced`), and are complete at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tilestream.geometry import Extent, Interval, Region

from .allocator import keep_under
from .operations import Add, AveragePool, Backward, Convolution, MaxPool, Operation, ReLU, Rule, fitted
from .trace import Network, Node

Array = npt.NDArray[Any]
FRESH = (Convolution, AveragePool, MaxPool, Add)
"""Operations whose result is theirs alone, so that the next may overwrite it."""


class Source(Protocol):
    """An image that is read in windows: a numpy array, a zarr.Array, a memmap, a lazily normalised view, a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> Any: ...


def read(network: Network, source: Source, window: Region) -> Tensor:
    """A window of the image, (1, C, h, w), in the network's dtype and on its device; a copy."""
    block = source[:, window.y0 : window.y1, window.x0 : window.x1]
    dtype = torch.empty((), dtype=network.dtype).numpy().dtype
    x = block.detach() if isinstance(block, Tensor) else torch.from_numpy(np.array(block, dtype))
    x = x.to(network.device, network.map_dtype)[None]
    return x.clone(memory_format=torch.channels_last) if x.data_ptr() else x


def needed(nodes: Sequence[Node], outputs: Mapping[str, Region], extents: Mapping[str, Extent]) -> dict[str, Region]:
    """The region of every value that the regions `outputs` need, hulls over readers."""
    return _both(needed_along, nodes, outputs, extents)


def influenced(nodes: Sequence[Node], inputs: Mapping[str, Region], extents: Mapping[str, Extent]) -> dict[str, Region]:
    """The other way: for every value the region that can depend on the regions `inputs`, hulls over what is read."""
    return _both(influenced_along, nodes, inputs, extents)


def needed_along(
    axis: int, nodes: Sequence[Node], outputs: Mapping[str, Interval], extents: Mapping[str, Extent]
) -> dict[str, Interval]:
    """Backward interval propagation along one axis; no interval is empty."""
    spans = dict(outputs)
    for node in reversed(nodes):
        if (span := spans.get(node.name)) is None:
            continue
        for name in node.inputs:
            need = node.operation.axes[axis].need(*span, extents[name][axis])
            spans[name] = _hull(need, spans[name]) if name in spans else need
    return spans


def influenced_along(
    axis: int, nodes: Sequence[Node], inputs: Mapping[str, Interval], extents: Mapping[str, Extent]
) -> dict[str, Interval]:
    """Forward interval propagation along one axis."""
    spans = dict(inputs)
    for node in nodes:
        for name in node.inputs:
            if name in spans:
                reach = node.operation.axes[axis].influence(*spans[name], extents[name][axis])
                spans[node.name] = _hull(reach, spans[node.name]) if node.name in spans else reach
    return spans


def _both(
    along: Callable[..., dict[str, Interval]], nodes: Sequence[Node], parts: Mapping[str, Region],
    extents: Mapping[str, Extent],
) -> dict[str, Region]:  # fmt: skip
    """Axes do not see each other."""
    ys = along(0, nodes, {name: (r.y0, r.y1) for name, r in parts.items()}, extents)
    xs = along(1, nodes, {name: (r.x0, r.x1) for name, r in parts.items()}, extents)
    return {name: Region(*y, *xs[name]) for name, y in ys.items()}


def _hull(a: Interval, b: Interval) -> Interval:
    return min(a[0], b[0]), max(a[1], b[1])


def keeps(operation: Operation, want_weights: bool) -> str:
    """What the tape holds of an operation: with gradients of weights or vectors wanted, its inputs."""
    if operation.saves == "nothing" and want_weights and operation.weights:
        return "input"
    return operation.saves


Save = Callable[[Node, str, Any], None]
"""Takes a node, what the tape holds of it, and that; for "sign" the result, which the next step may overwrite."""


def forward(
    network: Network, nodes: Sequence[Node], regions: Mapping[str, Region], values: dict[str, Tensor],
    env: Mapping[str, Any], wanted: Iterable[str], save: Save | None = None, want_weights: bool = False,
    limit_bytes: int = sys.maxsize,
) -> dict[str, Tensor]:  # fmt: skip
    """Runs `nodes` from `values`, which cover their regions; returns those `wanted`, and tells `save` what to keep."""
    users: dict[str, int] = dict.fromkeys(wanted, 1)
    for node in nodes:
        for name in node.inputs:
            users[name] = users.get(name, 0) + (node.name in regions)
    free: set[str] = set()  # values that nobody else holds
    for node in nodes:
        if (region := regions.get(node.name)) is None:
            continue
        operation, inputs = node.operation, []
        for name in node.inputs:
            need = operation.need(region, network.extents[name])
            inputs.append(values[name] if need == regions[name] else values[name][(..., *need.within(regions[name]))])
            users[name] -= 1
        alone = node.inputs[0] in free and users[node.inputs[0]] == 0
        for name in node.inputs:
            if users[name] == 0:
                values.pop(name, None)
        extent, vectors = network.extents[node.inputs[0]], [env[v] for v in node.vectors]
        kept = keeps(operation, want_weights or bool(node.vectors)) if save else "nothing"
        in_place = alone and _whole(inputs[0]) and operation.overwrites(inputs)
        step = (sum(x.numel() for x in inputs), node.channels * region.area, inputs[0].element_size())
        keep_under(limit_bytes - (0 if in_place else _step_bytes(operation, *step)))
        place: Tensor | None = None
        if kept == "winners":
            assert isinstance(operation, MaxPool)
            result, place = operation.winners(inputs[0], region, extent)
        elif in_place:
            result = operation.overwrite(inputs)
        else:
            result = operation.run(inputs, vectors, region, extent)
        if save:
            save(node, kept, {"input": inputs, "sign": result, "winners": place}.get(kept))
        held = [n for n, x in zip(node.inputs, inputs, strict=True) if kept == "input" or _shares(result, x)]
        free.difference_update(held)  # the tape, or a view, still wants their values
        if isinstance(operation, FRESH) or in_place:
            free.add(node.name)
        values[node.name] = result
        del inputs, result
    return {name: values[name] for name in wanted}


def _step_bytes(operation: Operation, inputs: int, outputs: int, itemsize: int) -> int:
    """What a step over so many values adds to memory at most, either way; winners are int64 on theirs."""
    return itemsize * (inputs + outputs * (4 if isinstance(operation, MaxPool) else 1))


def _whole(x: Tensor) -> bool:
    """Whether a tensor is no part of a larger one, which would live as long as what is written over it."""
    return x.untyped_storage().nbytes() == x.nbytes


def _shares(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Gradients:
    """What comes back from a tile: of values (over their regions), of vectors, and of weights by node."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values
        self.vectors: dict[str, Tensor] = {}
        self.weights: dict[str, list[Tensor]] = {}


def backward(
    network: Network, nodes: Sequence[Node], regions: Mapping[str, Region], upstream: dict[str, Tensor],
    load: Callable[[Node], Any], env: Mapping[str, Any], *, rule: Rule = "gradient", want_weights: bool = False,
    want_image: bool = True, mean: bool = False, limit_bytes: int = sys.maxsize,
) -> Gradients:  # fmt: skip
    """Runs `nodes` backward from gradients `upstream` over their regions; `load` gives what the tape holds of a node.

    `mean`: of the image the mean over its channels is wanted, (1, 1, h, w).
    """
    found, channels = Gradients(upstream), network.channels_of()
    values = found.values
    stem = mean and _single_stem(network)
    owned: set[str] = set()  # values whose gradient nobody else holds
    for node in reversed(nodes):
        if (gradient := values.pop(node.name, None)) is None:
            continue
        if not want_image and not want_weights and set(node.inputs) == {network.image}:
            continue
        call = Backward(
            network.extents[node.inputs[0]], [channels[name] for name in node.inputs], rule, want_weights,
            stem and node.inputs[0] == network.image, node.name in owned,
            want_image or set(node.inputs) != {network.image},
        )  # fmt: skip
        region = regions[node.name]
        wide = sum(channels[name] * regions[name].area for name in node.inputs if name in regions)
        keep_under(limit_bytes - _step_bytes(node.operation, wide, gradient.numel(), gradient.element_size()))
        parts, vectors, weights = node.operation.backward(
            gradient, region, load(node), [env[v] for v in node.vectors], call
        )
        del gradient
        fresh = isinstance(node.operation, (Convolution, MaxPool)) or (
            isinstance(node.operation, ReLU) and (node.name in owned or rule != "deconv")
        )
        for name, part in zip(node.inputs, parts, strict=True):
            if part is None or name not in regions or (name == network.image and not want_image):
                continue
            share = fitted(*part, regions[name])
            if name in values:
                values[name] = values[name].add_(share) if name in owned else values[name] + share
                owned.add(name)
            else:
                values[name] = share
                if fresh:
                    owned.add(name)
        for name, vector in zip(node.vectors, vectors, strict=True):
            if vector is not None:
                found.vectors[name] = found.vectors[name] + vector if name in found.vectors else vector
        if weights:
            found.weights[node.name] = [
                (torch.zeros_like(w) if g is None else g).to(network.dtype)
                for g, w in zip(weights, node.operation.weights, strict=True)
            ]
    if mean and network.image in values and values[network.image].shape[1] > 1:
        values[network.image] = values[network.image].mean(1, keepdim=True)
    return found


def _single_stem(network: Network) -> bool:
    """Whether one convolution alone reads the image, and can give the mean over its channels directly."""
    readers = [n.operation for n in network.nodes if network.image in n.inputs]
    return len(readers) == 1 and isinstance(readers[0], Convolution) and readers[0].phased
