"""The operations on maps that the engine can stream: forward over a region, and backward from one.

A value on its way through the network is a tensor that covers a region of a map whose whole extent is known. An
operation pads only where its region touches the border of the whole map: that is what makes tiles exact. Backward, an
operation takes the gradient over a region of its output and gives that over a region of its inputs: the whole region
that was read (scatter: sums over tiles are complete), or a part small enough that every reader is known (gather).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilestream.geometry import Axis, Extent, Pixel, Region, Sliding, Table, Transposed

from .allocator import untouched

Module = TypeVar("Module", bound=nn.Module)
Pair = tuple[int, int]
Saves = Literal["nothing", "sign", "winners", "input"]
Rule = Literal["gradient", "guided", "deconv"]
Covered = tuple[Tensor, Region]
"""A tensor (1, C, h, w) and the region that it covers."""


def pair(value: Any) -> Pair:
    """PyTorch's `int or (y, x)` as a pair."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def held(module: Module) -> Module:
    """The module with the parameters and buffers that it has now, whichever it is given later."""
    copied = module.__new__(type(module))  # copy.copy refuses those whose weights are parametrized
    copied.__dict__.update(vars(module), _parameters=dict(module._parameters), _buffers=dict(module._buffers))
    return copied


def fitted(x: Tensor, have: Region, want: Region, fill: float = 0.0) -> Tensor:
    """`x`, which covers `have`, cropped or padded so that it covers `want`."""
    if have == want:
        return x
    both = have.intersect(want)
    if both.empty:
        return x.new_full((*x.shape[:-2], *want.shape), fill)
    x = x[(..., *both.within(have))]
    sides = [both.x0 - want.x0, want.x1 - both.x1, both.y0 - want.y0, want.y1 - both.y1]
    return F.pad(x, sides, value=fill) if any(sides) else x


class Operation:
    """One step over maps. `axes` is its geometry, `function(*maps, *vectors, *weights)` what it computes."""

    saves: Saves = "input"
    """What the gradient of its inputs needs: nothing (it is linear), the sign of the result, winners, or its inputs."""
    vectors: Literal["map", "flat", "last", "own"] = "map"
    """How its vectors are laid out: (N, C, 1, 1); (N, C, 1) beside flattened positions; (N, 1, 1, C) beside a map with
    its channels last; or as its function wants them."""

    def __init__(self, axes: tuple[Axis, Axis] = (Pixel(), Pixel())) -> None:
        self.axes = axes
        self.weights: list[Tensor] = []

    def effective(self) -> list[Tensor]:
        """`weights` again, as differentiable functions of the module's parameters."""
        return []

    def cast(self, dtype: torch.dtype) -> Operation:
        """Takes maps of this dtype from now on; `effective` stays as it is."""
        self.weights = [w.to(dtype) for w in self.weights]
        return self

    def channels(self, *channels: int) -> int:
        return max(channels)

    def flops(self, channels: int) -> int:
        """FLOPs for one pixel of the output map, forward."""
        return channels

    def extent(self, *inputs: Extent) -> Extent:
        return self.axes[0].length(inputs[0][0]), self.axes[1].length(inputs[0][1])

    def need(self, region: Region, extent: Extent) -> Region:
        """The part of an input map of this extent that the outputs in `region` are computed from."""
        y, x = self.axes
        return Region(*y.need(region.y0, region.y1, extent[0]), *x.need(region.x0, region.x1, extent[1]))

    def run(self, xs: Sequence[Tensor], vectors: Sequence[Tensor], region: Region, extent: Extent) -> Tensor:
        """The values of `region`, from maps that cover `need(region)` of extent `extent`."""
        raise NotImplementedError(type(self).__name__)

    def overwrites(self, xs: Sequence[Tensor]) -> bool:
        """Whether `overwrite` can put the result of `run` in the place of the first map."""
        return False

    def overwrite(self, xs: Sequence[Tensor]) -> Tensor:
        """`run` in the place of the first map, which nobody else may hold."""
        raise NotImplementedError(type(self).__name__)

    def backward(
        self, grad: Tensor, region: Region, saved: Any, vectors: Sequence[Tensor], call: Backward
    ) -> tuple[list[Covered | None], list[Tensor | None], list[Tensor | None]]:
        """Gradients of the maps (with the regions they cover), of the vectors and of the weights.

        This one takes autograd's word for `run`, from the inputs that were saved or, for a linear operation, from
        blanks.
        """
        have = self.need(region, call.extent)
        maps = saved if isinstance(saved, (list, tuple)) else call.blanks(have, grad)
        mine = copy.copy(self)  # with weights of its own: another thread may be at the same operation
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in maps]
            small = [v.detach().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v for v in vectors]
            mine.weights = [w.detach().requires_grad_(call.want_weights) for w in self.weights]
            result = mine.run(leaves, small, region, call.extent)
            wanted = [*leaves, *small, *(mine.weights if call.want_weights else ())]
            grads: list[Tensor | None] = [None] * len(wanted)  # outputs that read nothing but padding
            if result.requires_grad:
                asked = [i for i, w in enumerate(wanted) if isinstance(w, Tensor) and w.requires_grad]
                found = torch.autograd.grad(result, [wanted[i] for i in asked], grad, allow_unused=True)
                for i, g in zip(asked, found, strict=True):
                    grads[i] = g
        n, m = len(leaves), len(leaves) + len(small)
        return [None if g is None else (g, have) for g in grads[:n]], grads[n:m], grads[m:]


class Backward:
    """What a backward step is told: extent and channels of the inputs, what is wanted of it, and by which rule."""

    def __init__(
        self, extent: Extent, channels: Sequence[int], rule: Rule = "gradient", want_weights: bool = False,
        mean: bool = False, owns: bool = False, want_maps: bool = True,
    ) -> None:  # fmt: skip
        self.want_maps = want_maps
        self.extent, self.channels, self.rule, self.want_weights = extent, channels, rule, want_weights
        self.owns = owns
        """Whether nobody else holds the gradient, so that it may be overwritten."""
        self.mean = mean
        """Whether the mean over the input's channels is wanted instead of the gradient of each."""

    def blanks(self, region: Region, like: Tensor) -> list[Tensor]:
        """Inputs over `region` whose values do not matter."""
        return [like.new_zeros(()).expand(1, c, *region.shape) for c in self.channels]


class Pointwise(Operation):
    """out[y, x] depends on in[y, x] only; several inputs must be maps of one extent."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        channels: Callable[..., int] | None = None,
        *,
        linear: bool = False,
        weights: Callable[[], list[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.function, self._channels, self._effective = function, channels, weights
        self.saves = "nothing" if linear else "input"
        self.weights = [w.detach() for w in self.effective()]

    def effective(self) -> list[Tensor]:
        return self._effective() if self._effective else []

    def channels(self, *channels: int) -> int:
        if self._channels:
            return self._channels(*channels)
        count = max(channels)
        met = {*channels, *(len(w) for w in self.weights)}
        if met - {1, count}:
            raise ValueError(f"{' and '.join(map(str, sorted(met)))} channels meet")
        return count

    def extent(self, *inputs: Extent) -> Extent:
        if len(set(inputs)) != 1:
            raise ValueError(f"maps of different extents meet: {', '.join(map(str, inputs))}")
        return inputs[0]

    def run(self, xs: Sequence[Tensor], vectors: Sequence[Tensor], region: Region, extent: Extent) -> Tensor:
        return self.function(*xs, *vectors, *self.weights).to(xs[0].dtype)


class Add(Pointwise):
    def __init__(self, sign: int = 1) -> None:
        super().__init__(lambda x, y: x + y if sign > 0 else x - y, linear=True)
        self.sign = sign

    def overwrites(self, xs: Sequence[Tensor]) -> bool:
        return xs[0].shape == xs[1].shape and xs[0].is_contiguous(memory_format=torch.channels_last)

    def overwrite(self, xs: Sequence[Tensor]) -> Tensor:
        return xs[0].add_(xs[1], alpha=self.sign)

    def backward(self, grad: Tensor, region: Region, saved: Any, vectors: Any, call: Backward) -> Any:
        # a map of one channel may be repeated over all those of the other
        parts = [grad, grad if self.sign > 0 else -grad]
        parts = [g.sum(1, keepdim=True) if c < g.shape[1] else g for g, c in zip(parts, call.channels, strict=True)]
        return [(g, region) for g in parts], [], []


class ReLU(Pointwise):
    """Its rule of going backward is the gradient's, guided back-propagation's or the deconvolution network's."""

    def __init__(self) -> None:
        super().__init__(torch.relu)
        self.saves = "sign"

    def overwrites(self, xs: Sequence[Tensor]) -> bool:
        return True

    def overwrite(self, xs: Sequence[Tensor]) -> Tensor:
        return xs[0].relu_()

    def backward(self, grad: Tensor, region: Region, saved: Any, vectors: Any, call: Backward) -> Any:
        if call.rule != "gradient":
            grad = grad.clamp_(min=0) if call.owns else grad.clamp(min=0)
        owns = call.owns or call.rule != "gradient"
        return [(grad if call.rule == "deconv" else masked(grad, saved, owns), region)], [], []


def masked(grad: Tensor, mask: Tensor, in_place: bool) -> Tensor:
    """`grad * mask`, on a CPU a band of rows at a time: PyTorch's product with booleans is five times as slow there."""
    if not grad.is_cpu:
        return grad.mul_(mask) if in_place else grad * mask
    result = grad if in_place else torch.empty_like(grad, memory_format=torch.channels_last)
    rows = max(1, 2**18 // max(1, grad.shape[1] * grad.shape[3]))
    for y in range(0, grad.shape[2], rows):
        band = slice(y, y + rows)
        torch.mul(grad[:, :, band], mask[:, :, band].to(grad.dtype), out=result[:, :, band])
    return result


class Windowed(Operation):
    """A window slides over one map; `_slide(x, padding)` computes it with symmetric padding of `fill`."""

    axes: tuple[Sliding, Sliding]
    fill = 0.0

    def __init__(self, y: Sliding, x: Sliding) -> None:
        super().__init__((y, x))
        self.kernel, self.stride = (y.kernel, x.kernel), (y.stride, x.stride)
        self.dilation = (y.dilation, x.dilation)

    def flops(self, channels: int) -> int:
        return channels * self.kernel[0] * self.kernel[1]

    def span(self, region: Region) -> Region:
        """Inputs that the outputs of `region` read, padding included."""
        y, x = self.axes
        return Region(*y.span(region.y0, region.y1), *x.span(region.x0, region.x1))

    def padded(self, x: Tensor, region: Region, extent: Extent) -> tuple[Tensor, Pair, Region]:
        """The input as the kernel takes it: a tensor, symmetric padding to ask for, and the region that it covers."""
        span, have = self.span(region), self.need(region, extent)
        sides = ((have.y0 - span.y0, span.y1 - have.y1), (have.x0 - span.x0, span.x1 - have.x1))
        if all(self._symmetric(a, *sides[a], have.shape[a], region.shape[a]) for a in (0, 1)):
            return x, (sides[0][0], sides[1][0]), have
        return fitted(x, have, span, self.fill), (0, 0), span

    def _symmetric(self, a: int, before: int, after: int, have: int, wanted: int) -> bool:
        """Whether padding of `before` on both sides gives just the outputs wanted, so that no padded copy is needed."""
        axis = self.axes[a]
        outputs = (have + 2 * before - axis.reach) // axis.stride + 1
        return 0 <= after <= before <= axis.kernel // 2 and outputs == wanted

    def run(self, xs: Sequence[Tensor], vectors: Sequence[Tensor], region: Region, extent: Extent) -> Tensor:
        x, padding, _ = self.padded(xs[0], region, extent)
        return self._slide(x, padding)

    def _slide(self, x: Tensor, padding: Pair) -> Tensor:
        raise NotImplementedError(type(self).__name__)


class Convolution(Windowed):
    """Conv2d; frozen batch norm that follows is folded in."""

    saves = "nothing"

    def __init__(self, conv: nn.Conv2d) -> None:
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode={conv.padding_mode!r} is not zero padding")  # trace pads apart from it
        sides = _convolution_padding(conv)
        parts = zip(pair(conv.kernel_size), pair(conv.stride), sides, pair(conv.dilation), strict=True)
        super().__init__(*(Sliding(k, s, *p, d) for k, s, p, d in parts))
        self.conv, self.groups = held(conv), conv.groups
        self.norm: nn.BatchNorm2d | None = None
        # channels-last is about twice as fast, but with one input channel oneDNN is wrong where kernel > stride + 1
        # and the output is one pixel wide (PyTorch 2.13 on AVX-512)
        self.layout = torch.channels_last if conv.in_channels > 1 else torch.contiguous_format
        self._prepare()

    def fold(self, norm: nn.BatchNorm2d) -> None:
        """Folds frozen batch norm that follows into weight and bias."""
        self.norm = held(norm)
        self._prepare()

    def _prepare(self) -> None:
        with torch.no_grad():  # folded in float64: rounding twice would flip more rectifiers
            self.weights = [w.detach().to(self.conv.weight.dtype) for w in self.effective(torch.float64)]
        self.weights[0] = self.weights[0].contiguous(memory_format=self.layout)
        self._mean: Tensor | None = None

    def effective(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        weight, bias = self.conv.weight, self.conv.bias
        if self.norm is None:
            return [weight] if bias is None else [weight, bias]
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        scale, shift = frozen_norm(self.norm, dtype)
        return [weight * scale[:, None, None, None], shift if bias is None else bias * scale + shift]

    def channels(self, *channels: int) -> int:
        return _out_channels(self.conv, channels[0])

    def flops(self, channels: int) -> int:
        return channels * 2 * self.weights[0][0].numel()

    def _slide(self, x: Tensor, padding: Pair) -> Tensor:
        weight, bias = self.weights[0], self.weights[1] if len(self.weights) > 1 else None
        return F.conv2d(self._laid(x), weight, bias, self.stride, padding, self.dilation, self.groups)

    def _laid(self, x: Tensor) -> Tensor:
        if (
            self.layout is torch.contiguous_format
        ):  # for one channel both are alike but for a stride that tells them apart
            x = x.squeeze(1).unsqueeze(1)
        return x.contiguous(memory_format=self.layout)

    def backward(self, grad: Tensor, region: Region, saved: Any, vectors: Any, call: Backward) -> Any:
        if not call.want_weights and self.phased:
            return [self._by_phases(grad, region, call.mean)], [], []
        (x,) = saved if saved is not None else call.blanks(self.need(region, call.extent), grad)
        padded = region_of = None
        if saved is None:  # only its shape counts
            padded, padding, region_of = self._blank(x, region, call.extent)
        else:
            padded, padding, region_of = self.padded(x, region, call.extent)
            padded = self._laid(padded)
        bias = len(self.weights) > 1
        gx, gw, gb = torch.ops.aten.convolution_backward(
            grad.contiguous(memory_format=self.layout), padded, self.weights[0],
            [self.conv.out_channels] if bias else None, self.stride, padding, self.dilation, False, [0, 0], self.groups,
            [call.want_maps, call.want_weights, bias and call.want_weights],
        )  # fmt: skip
        return [None if gx is None else (gx, region_of)], [], ([gw, gb] if bias else [gw]) if call.want_weights else []

    def _blank(self, x: Tensor, region: Region, extent: Extent) -> tuple[Tensor, Pair, Region]:
        span, have = self.span(region), self.need(region, extent)
        sides = ((have.y0 - span.y0, span.y1 - have.y1), (have.x0 - span.x0, span.x1 - have.x1))
        fits = all(self._symmetric(a, *sides[a], have.shape[a], region.shape[a]) for a in (0, 1))
        covered, padding = (have, (sides[0][0], sides[1][0])) if fits else (span, (0, 0))
        return untouched((1, x.shape[1], *covered.shape), x, self.layout), padding, covered

    @property
    def phased(self) -> bool:
        """A strided convolution of few channels, the stem: oneDNN's gradient is slow, one a phase of the stride not."""
        return self.conv.in_channels <= 4 and max(self.stride) > 1 and self.groups == 1 and self.dilation == (1, 1)

    def _by_phases(self, grad: Tensor, region: Region, mean: bool) -> Covered:
        """The input gradient as an ordinary convolution: one output channel a phase of the stride, then interleaved.

        With x = stride (o + q) + p, the gradient at block b and phase p is the sum over q of g[b - q] w[stride q + p].
        """
        (sy, sx), weight = self.stride, self.weights[0]
        weight = weight.mean(1, keepdim=True) if mean else weight
        out, channels, ky, kx = weight.shape
        qy, qx = -(-ky // sy), -(-kx // sx)
        weight = F.pad(weight.contiguous(), (0, qx * sx - kx, 0, qy * sy - ky)).reshape(out, channels, qy, sy, qx, sx)
        weight = weight.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(channels * sy * sx, out, qy, qx)
        result = F.conv2d(
            grad.contiguous(memory_format=torch.channels_last),
            weight.contiguous(memory_format=torch.channels_last), padding=(qy - 1, qx - 1),
        )  # fmt: skip
        height, width = result.shape[-2:]
        result = result.reshape(channels, sy, sx, height, width).permute(0, 3, 1, 4, 2)
        span = self.span(region)
        box = Region(span.y0, span.y0 + height * sy, span.x0, span.x0 + width * sx)
        return result.reshape(1, channels, height * sy, width * sx), box


class Dense(Convolution):
    """A linear layer over the channels of every pixel: a convolution with a window of one."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, bias = held(linear), linear.bias is not None
        shape = nn.Conv2d(
            linear.in_features, linear.out_features, 1, bias=bias, device="meta", dtype=linear.weight.dtype
        )
        super().__init__(shape)

    def effective(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        weight = self.linear.weight[:, :, None, None]
        return [weight] if self.linear.bias is None else [weight, self.linear.bias]


class TransposedConvolution(Operation):
    saves = "nothing"

    def __init__(self, conv: nn.ConvTranspose2d) -> None:
        k, s, p, d = (pair(v) for v in (conv.kernel_size, conv.stride, conv.padding, conv.dilation))
        after = pair(conv.output_padding)
        super().__init__(
            (Transposed(k[0], s[0], p[0], p[0] - after[0], d[0]), Transposed(k[1], s[1], p[1], p[1] - after[1], d[1]))
        )
        self.conv = held(conv)
        self.weights = [w.detach() for w in self.effective()]

    def effective(self) -> list[Tensor]:
        return [self.conv.weight] if self.conv.bias is None else [self.conv.weight, self.conv.bias]

    def channels(self, *channels: int) -> int:
        return _out_channels(self.conv, channels[0])

    def flops(self, channels: int) -> int:
        stride = pair(self.conv.stride)
        return 2 * self.conv.in_channels * self.weights[0][0].numel() // (stride[0] * stride[1])

    def run(self, xs: Sequence[Tensor], vectors: Sequence[Tensor], region: Region, extent: Extent) -> Tensor:
        conv, have = self.conv, self.need(region, extent)
        y = F.conv_transpose2d(xs[0], self.weights[0], None, conv.stride, 0, 0, conv.groups, conv.dilation)
        (sy, sx), (py, px) = pair(conv.stride), pair(conv.padding)
        top, left = have.y0 * sy - py, have.x0 * sx - px
        y = fitted(y, Region(top, top + y.shape[-2], left, left + y.shape[-1]), region)
        return y + self.weights[1][None, :, None, None] if len(self.weights) > 1 else y


class MaxPool(Windowed):
    """Winners are kept as their place in the window, 256 * row + column; ties go to the first, as in PyTorch."""

    saves = "winners"
    fill = float("-inf")

    def __init__(self, y: Sliding, x: Sliding) -> None:
        super().__init__(y, x)
        if y.kernel > 128 or x.kernel > 256:
            raise ValueError(f"kernel_size={self.kernel}; max pooling over up to (128, 256) px can be streamed")

    def _slide(self, x: Tensor, padding: Pair) -> Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, padding, self.dilation)

    def winners(self, x: Tensor, region: Region, extent: Extent) -> tuple[Tensor, Tensor]:
        """The values of `region` and the place of each winner in its window, (1, C, h, w) int16."""
        x, padding, _ = self.padded(x, region, extent)
        value, index = F.max_pool2d(x, self.kernel, self.stride, padding, self.dilation, return_indices=True)
        width = x.shape[-1]
        place = index.double()  # exact, and divides several times as fast as integers do
        del index
        apart = 256 if self.dilation == (1, 1) else 2**20  # rows of a window, so that its columns fit in between
        row = (place + 0.5).mul_(1 / width).floor_()
        place.add_(row, alpha=apart - width).sub_(self._corners(region, apart, padding).to(x.device))
        if self.dilation != (1, 1):
            row = torch.div(place, apart, rounding_mode="floor")
            place = row / self.dilation[0] * 256 + (place - row * apart) / self.dilation[1]
        return value, place.to(torch.int16)

    def _corners(self, region: Region, width: int, padding: Pair) -> Tensor:
        """For each output the place of its window's corner, rows `width` apart, in an input with this padding."""
        y = torch.arange(region.height)[:, None] * self.stride[0] - padding[0]
        return y * width + torch.arange(region.width) * self.stride[1] - padding[1]

    def backward(self, grad: Tensor, region: Region, saved: Any, vectors: Any, call: Backward) -> Any:
        span = self.span(region)
        index = (saved >> 8).to(torch.int64).mul_(self.dilation[0] * span.width)
        index.add_(saved & 255, alpha=self.dilation[1])
        index.add_(self._corners(region, span.width, (0, 0)).to(grad.device))
        shape = untouched((1, grad.shape[1], *span.shape), grad, torch.channels_last)
        result = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, shape, self.kernel, self.stride, (0, 0), self.dilation, False, index
        )
        return [(result, span)], [], []


class AveragePool(Windowed):
    saves = "nothing"

    def __init__(self, y: Sliding, x: Sliding, include_pad: bool = True, divisor: int | None = None) -> None:
        super().__init__(y, x)
        self.include_pad, self.divisor = include_pad, divisor

    def run(self, xs: Sequence[Tensor], vectors: Sequence[Tensor], region: Region, extent: Extent) -> Tensor:
        x = fitted(xs[0], self.need(region, extent), self.span(region))
        if self._depthwise(x):
            ones = x.new_ones(x.shape[1], 1, *self.kernel)
            total = F.conv2d(x.contiguous(memory_format=torch.channels_last), ones, groups=x.shape[1])
        else:
            total = F.avg_pool2d(x, self.kernel, self.stride, divisor_override=1)
        if self.divisor is not None:
            return total.div_(self.divisor)
        counts = [
            self._counts(a, lo, hi, n)
            for a, (lo, hi), n in zip((0, 1), ((region.y0, region.y1), (region.x0, region.x1)), extent, strict=True)
        ]
        return total.div_((counts[0][:, None] * counts[1]).to(total))

    def _depthwise(self, x: Tensor) -> bool:
        """Whether oneDNN's depthwise convolution sums windows faster than avg_pool2d does, on three channels by five.

        In bfloat16 it does not return from windows of 15 px and more (torch 2.13); one channel is not depthwise.
        """
        onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        onednn = onednn and bool(torch.backends.mkldnn.enabled) and x.device.type == "cpu" and x.dtype == torch.float32
        return onednn and x.shape[1] > 1 and self.stride == (1, 1) != self.kernel

    def _counts(self, a: int, lo: int, hi: int, n: int) -> Tensor:
        axis = self.axes[a]
        start = torch.arange(lo, hi) * axis.stride - axis.before
        stop = torch.clamp(start + axis.kernel, max=n + axis.after)
        return stop - start if self.include_pad else torch.clamp(stop, max=n) - torch.clamp(start, min=0)


class Resample(Operation):
    """Both axes separately: out[o] = a[o] * in[first[o]] + b[o] * in[second[o]].

    Nearest and bilinear upsampling, and padding by zeros, reflection, replication and wrapping round.
    """

    saves = "nothing"

    def __init__(self, rows: Line, columns: Line) -> None:
        super().__init__((rows.table, columns.table))
        self.lines = rows, columns

    def run(self, xs: Sequence[Tensor], vectors: Sequence[Tensor], region: Region, extent: Extent) -> Tensor:
        have = self.need(region, extent)
        x = self.lines[0].apply(xs[0], 2, region.y0, region.y1, have.y0, have.y1)
        return self.lines[1].apply(x, 3, region.x0, region.x1, have.x0, have.x1)


class Line:
    """One axis of `Resample`."""

    def __init__(self, n: int, first: Any, second: Any = None, weight: Any = None) -> None:
        self.first = np.asarray(first)
        self.second = self.first if second is None else np.asarray(second)
        self.weight = None if weight is None else torch.as_tensor(weight)
        self.table = Table(n, tuple(self.first.tolist()), tuple(self.second.tolist()))

    def apply(self, x: Tensor, dim: int, lo: int, hi: int, start: int, stop: int) -> Tensor:
        at = [torch.as_tensor(np.clip(i[lo:hi] - start, 0, stop - start - 1)) for i in (self.first, self.second)]
        shape = [-1 if d == dim else 1 for d in range(4)]
        y = x.index_select(dim, at[0].to(x.device))
        if self.weight is not None:
            w = self.weight[lo:hi].to(x).reshape(shape)
            y = y * (1 - w) + x.index_select(dim, at[1].to(x.device)) * w
        padding = torch.as_tensor(self.first[lo:hi] < 0)
        return y.masked_fill(padding.reshape(shape).to(x.device), 0) if bool(padding.any()) else y


def resized(
    n: int, size: int, mode: str, align_corners: bool | None, scale: float | None, dtype: torch.dtype = torch.float32
) -> Line:
    """F.interpolate along one axis, from n to `size` px; `scale` where it was given and is to be used as it is."""
    o = np.arange(size, dtype=np.float64)
    if mode == "nearest":  # PyTorch itself says which, for its rounding differs by dtype and by how the size was given
        given: Any = {"scale_factor": (scale, 1.0)} if scale else {"size": (size, 1)}
        places = F.interpolate(torch.arange(n, dtype=dtype).reshape(1, 1, n, 1), mode="nearest", **given)
        return Line(n, places.flatten().to(torch.int64).numpy())
    if align_corners:
        source = o * ((n - 1) / (size - 1) if size > 1 else 0.0)
    else:
        source = np.maximum((o + 0.5) * (1 / scale if scale else n / size) - 0.5, 0)
    first = np.minimum(source.astype(np.int64), n - 1)
    return Line(n, first, np.minimum(first + 1, n - 1), source - first)


def bordered(n: int, before: int, after: int, mode: str) -> Line:
    """F.pad along one axis; negative sides crop. ValueError where PyTorch has none."""
    o = np.arange(-before, n + after)
    if len(o) < 1 or (mode == "reflect" and max(before, after) >= n) or (mode == "circular" and max(before, after) > n):
        raise ValueError(f"padding {before} + {after} of mode {mode!r} does not fit a map of {n} px")
    if mode == "constant":
        return Line(n, np.where((o < 0) | (o >= n), -1, o))
    if mode == "replicate":
        return Line(n, np.clip(o, 0, n - 1))
    if mode == "circular":
        return Line(n, o % n)
    return Line(n, np.where(o < 0, -o, np.where(o >= n, 2 * (n - 1) - o, o)))


def _out_channels(conv: nn.Conv2d | nn.ConvTranspose2d, channels: int) -> int:
    if channels != conv.in_channels:
        raise ValueError(f"reads {conv.in_channels} channels, not {channels}")
    return conv.out_channels


def frozen_norm(norm: nn.BatchNorm2d, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Scale and shift, (C,) each, of a batch norm in evaluation mode, differentiable in its weight and bias."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("batch norm without running statistics depends on the whole image")
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = -norm.running_mean.to(dtype) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.to(dtype)


def batch_norm(norm: nn.BatchNorm2d) -> Pointwise:
    def apply(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return x * scale[None, :, None, None] + shift[None, :, None, None]

    norm = held(norm)
    return Pointwise(apply, linear=True, weights=lambda: list(frozen_norm(norm)))


def _convolution_padding(conv: nn.Conv2d) -> tuple[Pair, Pair]:
    if isinstance(conv.padding, str):
        if conv.padding == "valid":
            return (0, 0), (0, 0)
        totals = [d * (k - 1) for d, k in zip(pair(conv.dilation), pair(conv.kernel_size), strict=True)]
        return (totals[0] // 2, totals[0] - totals[0] // 2), (totals[1] // 2, totals[1] - totals[1] // 2)
    y, x = pair(conv.padding)
    return (y, y), (x, x)
