"""The operations that the engine can stream, each as the window it slides and the function it applies.

A value on its way through the network is a tensor that covers a region of a map whose whole extent is known. A windowed
operation pads only where its region touches the border of the whole map: that is what makes tiles exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilestream.geometry import Extent, Region, Window

Pair = tuple[int, int]


def pair(value: int | Sequence[int]) -> Pair:
    """PyTorch's `int or (y, x)` as a pair."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1] if len(value) > 1 else value[0]))


@dataclass
class Pointwise:
    """out[y, x] depends on in[y, x] only; several inputs must be maps of one extent."""

    function: Callable[..., Tensor]
    channels: Callable[[int], int] = field(default=lambda n: n)
    flops_per_channel: int = 1
    in_place: Callable[[Tensor], Tensor] | None = None
    keeps_output: bool = False
    """Whether autograd keeps the result for the backward pass (ReLU does)."""

    keeps_input = False
    keeps_index = False

    def extent(self, *inputs: Extent) -> Extent:
        if len(set(inputs)) != 1:
            raise ValueError(f"maps of different extents meet: {', '.join(map(str, inputs))}")
        return inputs[0]

    def need(self, region: Region, extent: Extent) -> Region:
        """The part of an input map of this extent that the outputs in `region` are computed from."""
        return region

    def reads(self, axis: int, start: Any, stop: Any, length: int) -> tuple[Any, Any]:
        """`need` along one axis, for one interval or (arrays) for many at once; `length` is the input map's."""
        return start, stop

    def flops(self, channels: int) -> int:
        """FLOPs for one pixel of the output map."""
        return channels * self.flops_per_channel

    def run(self, tensors: list[Tensor], region: Region, extent: Extent) -> Tensor:
        """The values of `region`, from tensors that cover `need(region)` of input maps of `extent`."""
        return self.function(*tensors)


@dataclass
class Windowed:
    """A window slides over one map; `function(x, padding)` computes it with symmetric padding of `fill`."""

    window: Window
    function: Callable[[Tensor, Pair], Tensor]
    fill: float = 0.0
    channels: Callable[[int], int] = field(default=lambda n: n)
    flops_per_channel: int = 1
    keeps_input: bool = True
    keeps_index: bool = False
    """Whether the backward pass keeps an index (int64) an output value: max pooling's winners."""

    keeps_output = False
    in_place = None

    def extent(self, *inputs: Extent) -> Extent:
        return self.window.extent(inputs[0])

    def need(self, region: Region, extent: Extent) -> Region:
        y0, y1 = self.reads(0, region.y0, region.y1, extent[0])
        x0, x1 = self.reads(1, region.x0, region.x1, extent[1])
        return Region(int(y0), int(y1), int(x0), int(x1))

    def reads(self, axis: int, start: Any, stop: Any, length: int) -> tuple[Any, Any]:
        window = self.window
        offset, stride = window.padding[axis][0], window.stride[axis]
        # outputs that see nothing but padding read the nearest pixel, which `run` crops away
        first = np.clip(start * stride - offset, 0, length - 1)
        return first, np.clip((stop - 1) * stride - offset + window.reach[axis], first + 1, length)

    def flops(self, channels: int) -> int:
        return channels * self.flops_per_channel

    def run(self, tensors: list[Tensor], region: Region, extent: Extent) -> Tensor:
        span, have = self.window.span(region), self.need(region, extent)
        top, bottom, left, right = have.y0 - span.y0, span.y1 - have.y1, have.x0 - span.x0, span.x1 - have.x1
        x = tensors[0]
        if self._symmetric(0, top, bottom, have.height, region.height) and self._symmetric(
            1, left, right, have.width, region.width
        ):
            return self.function(x, (top, left))
        return self.function(_pad(x, (left, right, top, bottom), self.fill), (0, 0))

    def _symmetric(self, axis: int, before: int, after: int, have: int, wanted: int) -> bool:
        """Whether padding of `before` on both sides gives just the outputs wanted, so that no padded copy is needed."""
        outputs = (have + 2 * before - self.window.reach[axis]) // self.window.stride[axis] + 1
        return 0 <= after <= before <= self.window.kernel[axis] // 2 and outputs == wanted


Operation = Pointwise | Windowed


def _pad(x: Tensor, sides: tuple[int, int, int, int], fill: float) -> Tensor:
    """Pads (left, right, top, bottom); a negative side is cropped after the others are padded."""
    x = F.pad(x, tuple(max(0, side) for side in sides), value=fill)
    left, right, top, bottom = (max(0, -side) for side in sides)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


class Convolution(Windowed):
    """Conv2d with constant weights, frozen batch norm folded in where one follows."""

    def __init__(self, conv: nn.Conv2d) -> None:
        padding = _convolution_padding(conv)
        # channels-last is about twice as fast, but with one input channel oneDNN is wrong where kernel > stride + 1
        # and the output is one pixel wide (PyTorch 2.13 on AVX-512)
        self.layout = torch.channels_last if conv.in_channels > 1 else torch.contiguous_format
        self.weight = conv.weight.detach().to(memory_format=self.layout)
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.stride, self.dilation, self.groups = pair(conv.stride), pair(conv.dilation), conv.groups
        super().__init__(
            Window(pair(conv.kernel_size), self.stride, padding, self.dilation),
            self._convolve,
            channels=lambda _: conv.out_channels,
            flops_per_channel=2 * self.weight[0].numel(),
        )

    def _convolve(self, x: Tensor, padding: Pair) -> Tensor:
        if self.layout is torch.contiguous_format:
            x = x.squeeze(1).unsqueeze(
                1
            )  # for one channel both layouts are alike but for a stride that tells them apart
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def fold(self, norm: nn.BatchNorm2d) -> None:
        """Takes a frozen batch norm that follows into the weights: y = s (W x + b - mean) + beta, s = gamma / sigma."""
        scale, shift = frozen_norm(norm)
        self.weight = (self.weight * scale[:, None, None, None]).to(memory_format=self.layout)
        self.bias = shift if self.bias is None else self.bias * scale + shift


def frozen_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift, (channels,) each, of a batch norm in evaluation mode."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            "BatchNorm2d without running statistics depends on the whole image; use track_running_stats=True"
        )
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def batch_norm(norm: nn.BatchNorm2d) -> Pointwise:
    scale, shift = (t[None, :, None, None] for t in frozen_norm(norm))
    return Pointwise(lambda x: x * scale + shift, flops_per_channel=2)


def relu() -> Pointwise:
    return Pointwise(F.relu, in_place=F.relu_, keeps_output=True)


def add() -> Pointwise:
    return Pointwise(torch.add)


def channel_pad(before: int, after: int) -> Pointwise:
    """New channels of zeros before and after those that are there."""
    return Pointwise(
        lambda x: F.pad(x, (0, 0, 0, 0, before, after)), channels=lambda n: n + before + after, flops_per_channel=0
    )


def max_pool(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Windowed:
    if ceil_mode or return_indices:
        raise ValueError(
            f"max pooling with ceil_mode={ceil_mode}, return_indices={return_indices} cannot be streamed; use False"
        )
    window = _pool_window(kernel_size, stride, padding, dilation)
    return Windowed(
        window,
        lambda x, pad: F.max_pool2d(x, window.kernel, window.stride, pad, window.dilation),
        fill=float("-inf"),
        flops_per_channel=window.kernel[0] * window.kernel[1],
        keeps_index=True,
    )


def average_pool(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Windowed:
    if ceil_mode or divisor_override is not None or (pair(padding) != (0, 0) and not count_include_pad):
        raise ValueError(
            f"average pooling with ceil_mode={ceil_mode}, count_include_pad={count_include_pad}, "
            f"divisor_override={divisor_override} cannot be streamed; use False, True, None"
        )
    window = _pool_window(kernel_size, stride, padding, 1)
    return Windowed(
        window,
        lambda x, pad: F.avg_pool2d(x, window.kernel, window.stride, pad),
        flops_per_channel=window.kernel[0] * window.kernel[1],
    )


def _pool_window(
    kernel: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> Window:
    y, x = pair(padding)
    return Window(pair(kernel), pair(stride or kernel), ((y, y), (x, x)), pair(dilation))


def _convolution_padding(conv: nn.Conv2d) -> tuple[Pair, Pair]:
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode={conv.padding_mode!r} cannot be streamed; use 'zeros'")
    if isinstance(conv.padding, str):
        if conv.padding == "valid":
            return (0, 0), (0, 0)
        totals = [d * (k - 1) for d, k in zip(pair(conv.dilation), pair(conv.kernel_size), strict=True)]
        return (totals[0] // 2, totals[0] - totals[0] // 2), (totals[1] // 2, totals[1] - totals[1] // 2)
    y, x = pair(conv.padding)
    return (y, y), (x, x)
