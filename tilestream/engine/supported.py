"""What can be streamed: for every module, function and method the steps over maps, reductions, vectors it becomes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from tilestream.geometry import Sliding, Transposed

from . import operations as op
from .reductions import Reduction

Number = int | Fraction
Stride = tuple[Number, Number]
Context = Any


@dataclass(frozen=True)
class Arrangement:
    """How the code sees a map (N, C, H, W): "last" as (N, H, W, C), or "groups" as (N, G, C/G, H, W), turned or not."""

    kind: str
    there: Callable[[Tensor], Tensor]


LAST = Arrangement("last", lambda t: t.permute(0, 2, 3, 1))
LINEAR_HEAD = (nn.Linear, nn.Flatten, nn.Identity, nn.Dropout)
RESHAPES = (torch.flatten, torch.squeeze, "flatten", "view", "reshape", "squeeze", "size", getattr, operator.getitem)


def is_linear(target: Any) -> bool:
    """Whether a module or function of the head is linear."""
    if isinstance(target, nn.Module):
        return type(target) in LINEAR_HEAD and not has_hooks(target)
    return target in RESHAPES


def is_relu(target: Any) -> bool:
    """Whether a module or function of the head is a rectifier, whose gradient guided back-propagation clamps."""
    return type(target) is nn.ReLU or target in (F.relu, torch.relu, torch.relu_, "relu", "relu_")


def is_inplace(target: Any, kwargs: Any) -> bool:
    """Whether a module, function or method writes on its input."""
    if isinstance(target, nn.Module):
        return bool(getattr(target, "inplace", False))
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    written = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.setitem)
    return bool(kwargs.get("inplace")) or target in written or (name.endswith("_") and not name.endswith("__"))


def kind(module: Any) -> Any:
    """The class of a module; where its weights are parametrized (weight norm, LoRA) the one that it had before."""
    return type(module).__base__ if is_parametrized(module) else type(module)


def has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def step(operation: op.Operation) -> Stride:
    """Pixels of the input between neighbours of the output."""
    if isinstance(operation, op.Windowed):
        return operation.stride
    if all(isinstance(a, Transposed) for a in operation.axes):
        y, x = operation.axes
        return Fraction(1, y.stride), Fraction(1, x.stride)  # type: ignore[attr-defined]
    return 1, 1


def whole(value: Number) -> Number:
    return int(value) if value == int(value) else value


def add(ctx: Context) -> None:
    """Puts what a node of the recorded graph means into the network; ValueError says why it cannot be streamed."""
    if any(n in ctx.builder.arranged for n in ctx.node.all_input_nodes):
        _arranged(ctx)
    elif ctx.is_module:
        handler = MODULES.get(kind(ctx.target))
        if handler is None:
            raise ValueError("cannot be streamed exactly")
        handler(ctx, ctx.target, *ctx.args)
    else:
        handler = FUNCTIONS.get(ctx.target)
        if handler is None:
            raise ValueError("cannot be streamed exactly")
        handler(ctx, *ctx.args, **ctx.kwargs)


# ---- other arrangements of a map


def _order(*order: Any) -> tuple[int, ...]:
    flat = order[0] if len(order) == 1 and isinstance(order[0], (tuple, list)) else order
    return tuple(int(d) % len(flat) for d in flat)


def _permute(ctx: Context, x: Any, *order: Any) -> None:
    if _order(*order) != (0, 2, 3, 1):
        raise ValueError(f"permute{order} of a map; only channels last, (0, 2, 3, 1), and back can be streamed")
    ctx.alias(x)
    ctx.builder.arranged[ctx.node] = LAST


def _arranged(ctx: Context) -> None:
    """A step over maps of which at least one is in another arrangement."""
    maps = [n for n in ctx.node.all_input_nodes if ctx.is_map(n)]
    arrangement, x = ctx.builder.arranged.get(maps[0]), maps[0]
    if any(ctx.builder.arranged.get(m) != arrangement for m in maps):
        raise ValueError("mixes maps of different arrangements; permute or view them alike first")
    target = ctx.target
    if arrangement.kind == "groups":
        _in_groups(ctx, arrangement, x)
        return
    if target in (torch.permute, "permute"):
        if _order(*ctx.args[1:]) != (0, 3, 1, 2):
            raise ValueError(f"permute{ctx.args[1:]}; only back to channels first, (0, 3, 1, 2), can be streamed")
        ctx.alias(x)
        return
    if isinstance(target, nn.Linear):
        ctx.map(op.Dense(target), (x,))
    elif isinstance(target, nn.LayerNorm) or target is F.layer_norm:
        _channel_norm(ctx, target, x)
    elif isinstance(target, (nn.Dropout, nn.Identity)) or target in ("contiguous", F.dropout):
        (MODULES if ctx.is_module else FUNCTIONS)[type(target) if ctx.is_module else target](
            ctx, *([target] if ctx.is_module else []), *ctx.args, **ctx.kwargs
        )
    elif type(target) in (*ELEMENTWISE_MODULES, nn.ReLU) and type(target) is not nn.Softmax2d:
        MODULES[type(target)](ctx, target, *ctx.args)
    elif target in ARITHMETIC and len(maps) == 1 and len(ctx.node.all_input_nodes) == 2:
        function, args = ARITHMETIC[target], ctx.args
        (vector,) = (n for n in args if n is not x and isinstance(n, fx.Node))

        def apply(t: Tensor, v: Tensor) -> Any:
            sides = LAST.there(t), v
            return function(*(sides if args[0] is x else sides[::-1])).permute(0, 3, 1, 2)

        operation = op.Pointwise(apply)
        operation.vectors = "last"
        ctx.map(operation, (x,), (vector.name,))
    elif target in ARITHMETIC or target in POINTWISE:
        FUNCTIONS[target](ctx, *ctx.args, **ctx.kwargs)
    else:
        raise ValueError("cannot be streamed over a map with its channels last; permute it back first")
    ctx.builder.arranged[ctx.node] = arrangement


def _channel_norm(ctx: Context, target: Any, x: Any) -> None:
    """Layer norm over the channels of every pixel."""
    if ctx.is_module:
        shape, eps, parameters = target.normalized_shape, target.eps, (target.weight, target.bias)
    else:
        given = dict(zip(("shape", "weight", "bias", "eps"), ctx.args[1:], strict=False)) | dict(ctx.kwargs)
        shape, eps = given.get("normalized_shape", given.get("shape")), given.get("eps", 1e-5)
        parameters = tuple(ctx.constant(given.get(name)) for name in ("weight", "bias"))
    if len(shape) != 1:
        raise ValueError(f"layer norm over {tuple(shape)}; only channels, (C,), can be streamed")
    weights = [p for p in parameters if p is not None]

    def apply(t: Tensor, *given: Tensor) -> Any:
        left = iter(given)
        weight, bias = (None if p is None else next(left) for p in parameters)
        return F.layer_norm(LAST.there(t), shape, weight, bias, eps).permute(0, 3, 1, 2)

    ctx.map(op.Pointwise(apply, weights=lambda: weights), (x,))


def _in_groups(ctx: Context, arrangement: Arrangement, x: Any) -> None:
    """Channel shuffle, as ShuffleNet has it: groups are exchanged with what is in them, and joined again."""
    there = arrangement.there
    if ctx.target in (torch.transpose, "transpose") and sorted(d % 5 for d in ctx.args[1:]) == [1, 2]:
        ctx.alias(x)
        ctx.builder.arranged[ctx.node] = Arrangement("groups", lambda t: there(t).transpose(1, 2))
    elif ctx.target == "contiguous":
        ctx.alias(x)
        ctx.builder.arranged[ctx.node] = arrangement
    elif ctx.target in ("view", "reshape", torch.reshape, torch.flatten, "flatten"):
        joined = ctx.target not in (torch.flatten, "flatten") or tuple(ctx.args[1:]) == (1, 2)
        if not joined or (ctx.target not in (torch.flatten, "flatten") and len(_sides(ctx.args[1:])) != 4):
            raise ValueError("channels in groups can only be joined again, view(n, c, h, w)")
        source, given = ctx.value(x), () if ctx.target in (torch.flatten, "flatten") else _sides(ctx.args[1:])

        def make(known: Any, inputs: Any) -> op.Operation:
            want, full = [int(s) for s in ctx.resolve(given, known)], tuple(known[source])
            if want and any(a not in (-1, b) for a, b in zip(want, full, strict=True)):
                raise ValueError(f"view{tuple(want)} of channels in groups; only view{full} can be streamed")
            return op.Pointwise(lambda t: there(t).reshape(t.shape), linear=True)

        ctx.map(op.Pointwise(lambda t: there(t).reshape(t.shape), linear=True), (x,), make=make)
    else:
        raise ValueError("cannot be streamed over channels in groups; join them first")


def _sides(shape: Any) -> tuple[Any, ...]:
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else tuple(shape)


# ---- pointwise


def _elementwise(ctx: Context, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A function of maps, vectors and constants, pixel by pixel."""
    maps: list[fx.Node] = []
    vectors: list[fx.Node] = []
    for value in args:
        if isinstance(value, fx.Node):
            (maps if ctx.is_map(value) else vectors).append(value)
    if any(isinstance(v, fx.Node) for v in kwargs.values()) or not maps:
        raise ValueError("takes a map or vector by name; pass it by position")
    if len({ctx.is_flat(m) for m in maps}) > 1:
        raise ValueError("mixes a map with one whose positions were flattened")
    flat = ctx.is_flat(maps[0])
    where = [(0, maps.index(a)) if a in maps else (1, vectors.index(a)) if isinstance(a, fx.Node) else (2, a)
             for a in args]  # fmt: skip

    def apply(*tensors: Tensor) -> Any:
        small = [_spread(v) if flat else v for v in tensors[len(maps) :]]
        filled = [tensors[i] if kind == 0 else small[i] if kind == 1 else i for kind, i in where]
        return function(*filled, **kwargs)

    operation = op.Pointwise(apply)
    operation.vectors = "flat" if flat else "map"
    ctx.map(operation, tuple(maps), tuple(v.name for v in vectors), overwrites=ctx.overwrites)


def _spread(v: Any) -> Any:
    """(..., C, 1), as flattened maps meet it, for a map whose positions are not flattened."""
    return v[..., None] if isinstance(v, Tensor) and v.ndim >= 2 else v


def _overwriting(ctx: Context, inplace: bool) -> None:
    ctx.overwrites = inplace


def _module(ctx: Context, module: Any, x: Any) -> None:
    _overwriting(ctx, bool(getattr(module, "inplace", False)))
    if ctx.overwrites:
        module = op.held(module)
        module.inplace = False
    _elementwise(ctx, module, (x,), {})


def _prelu(ctx: Context, module: nn.PReLU, x: Any) -> None:
    module = op.held(module)
    ctx.map(op.Pointwise(F.prelu, weights=lambda: [module.weight]), (x,))


def _named(function: Callable[..., Any], inplace: bool = False) -> Callable[..., None]:
    def handle(ctx: Context, *args: Any, **kwargs: Any) -> None:
        _overwriting(ctx, inplace or bool(kwargs.pop("inplace", False)))
        kwargs.pop("out", None)
        _elementwise(ctx, function, args, kwargs)

    return handle


def _arithmetic(function: Callable[..., Any], inplace: bool = False) -> Callable[..., None]:
    def handle(ctx: Context, x: Any, y: Any, alpha: float = 1) -> None:
        _overwriting(ctx, inplace and ctx.is_map(x))
        if function in (operator.add, operator.sub) and alpha == 1 and ctx.is_map(x) and ctx.is_map(y):
            if ctx.is_flat(x) != ctx.is_flat(y):
                raise ValueError("mixes a map with one whose positions were flattened")
            ctx.map(op.Add(1 if function is operator.add else -1), (x, y), overwrites=ctx.overwrites)
            return
        scaled = function if alpha == 1 else lambda a, b: function(a, alpha * b)
        _elementwise(ctx, scaled, (x, y), {})

    return handle


def _relu(inplace: bool = False) -> Callable[..., None]:
    def handle(ctx: Context, x: Any, overwrite: bool = False, **kwargs: Any) -> None:
        ctx.map(op.ReLU(), (x,), overwrites=bool(inplace or overwrite or kwargs.get("inplace", False)))

    return handle


def _softmax(log: bool) -> Callable[..., None]:
    def handle(ctx: Context, x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> None:
        if dtype is not None:
            raise ValueError(f"softmax(dtype={dtype}) cannot be streamed; leave dtype out")
        if not ctx.is_flat(x):
            if dim not in (1, -3):
                raise ValueError(f"softmax over dim={dim}; of a map only channels (dim=1) can be streamed, "
                                 "or all positions after flatten(2)")  # fmt: skip
            _elementwise(ctx, F.log_softmax if log else F.softmax, (x,), {"dim": 1})
        elif dim in (1, -2):
            _elementwise(ctx, F.log_softmax if log else F.softmax, (x,), {"dim": 1})
        elif dim in (2, -1):
            name = ctx.reduce(Reduction("logsumexp", ctx.value(x)), f"{ctx.node.name}_lse")
            function = (lambda a, b: a - b.to(a)) if log else (lambda a, b: torch.exp(a - b.to(a)))
            ctx.map(op.Pointwise(function), (x,), (name,))
        else:
            raise ValueError(f"softmax over dim={dim} cannot be streamed")

    return handle


# ---- windows


def _convolution(ctx: Context, conv: nn.Conv2d, x: Any) -> None:
    if conv.padding_mode == "zeros":
        ctx.map(op.Convolution(conv), (x,))
        return
    plain = op.held(conv)
    (top, bottom), (left, right) = op._convolution_padding(conv)
    plain.padding_mode, plain.padding = "zeros", (0, 0)
    name = _border(ctx, x, (left, right, top, bottom), conv.padding_mode, f"{ctx.node.name}_pad")
    ctx.map(op.Convolution(plain), (name,))


def _convolve(
    ctx: Context, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: Any = 1,
) -> None:  # fmt: skip
    """As a module that holds these weights, parameters or buffers."""
    held, offset = ctx.constant(weight), ctx.constant(bias)
    if not isinstance(groups, int):
        raise ValueError("groups must be a number that is written in the code")
    inputs, outputs = held.shape[1] * groups, held.shape[0]
    conv = nn.Conv2d(inputs, outputs, tuple(held.shape[2:]), stride, padding, dilation, groups, device="meta")
    conv._parameters.update(weight=held, bias=offset)
    _convolution(ctx, conv, x)


def _transposed(ctx: Context, conv: nn.ConvTranspose2d, x: Any, output_size: Any = None) -> None:
    if output_size is not None:
        raise ValueError("output_size cannot be streamed; use output_padding")
    ctx.map(op.TransposedConvolution(conv), (x,))


def _batch_norm(ctx: Context, norm: nn.BatchNorm2d, x: fx.Node) -> None:
    source = ctx.builder.target(x)
    producer = ctx.producer(x)
    alone = len(x.users) == 1 and x.op == "call_module" and kind(source) is nn.Conv2d
    if alone and producer is not None and isinstance(producer.operation, op.Convolution):
        op.frozen_norm(norm)
        producer.operation.fold(norm)
        ctx.alias(x)
    else:
        ctx.map(op.batch_norm(norm), (x,))


def _slide(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> tuple[Sliding, Sliding]:
    k, p, d = op.pair(kernel), op.pair(padding), op.pair(dilation)
    s = op.pair(k if stride is None or stride == [] else stride)
    return Sliding(k[0], s[0], p[0], p[0], d[0], ceil), Sliding(k[1], s[1], p[1], p[1], d[1], ceil)


def _max_pool(
    ctx: Context, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> None:  # fmt: skip
    if return_indices:
        raise ValueError("max pooling with return_indices=True cannot be streamed; use False")
    ctx.map(op.MaxPool(*_slide(kernel_size, stride, padding, dilation, ceil_mode)), (x,))


def _average_pool(
    ctx: Context, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> None:  # fmt: skip
    if ctx.is_static(kernel_size):
        if padding not in (0, (0, 0), [0, 0]) or divisor_override is not None:
            raise ValueError(f"a window of the whole map with padding={padding}, divisor_override={divisor_override} "
                             "cannot be streamed; leave them out")  # fmt: skip
        _whole_average(ctx, x, kernel_size)
        return
    axes = _slide(kernel_size, stride, padding, 1, ceil_mode)
    ctx.map(op.AveragePool(*axes, count_include_pad, divisor_override), (x,))


def _whole_average(ctx: Context, x: Any, window: Any) -> None:
    """Average pooling by a window of the map's own size, as older code writes the global one."""
    source = ctx.value(x)

    def make(known: Any, inputs: Any) -> op.Operation:
        if tuple(op.pair(ctx.resolve(window, known))) != tuple(known[source][2:]):
            raise ValueError("a window whose size depends on the image; only that of the whole map can be streamed")
        return op.Pointwise(lambda t: t, linear=True)

    name = ctx.map(op.Pointwise(lambda t: t, linear=True), (x,), make=make, name=f"{ctx.node.name}_map")
    ctx.reduce(Reduction("mean", name, shape=lambda t: t.reshape(*t.shape[:2], 1, 1)))


# ---- resampling and padding


def _interpolate(
    ctx: Context, x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> None:  # fmt: skip
    if mode not in ("nearest", "bilinear") or antialias:
        raise ValueError(f"mode={mode!r}, antialias={antialias} cannot be streamed; use nearest or bilinear")

    def make(known: Any, inputs: Any) -> op.Operation:
        extent, want = inputs[0], ctx.resolve(size, known)
        factors: list[Any] = [None, None]
        if want is None:
            given = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * 2
            want = [math.floor(n * f) for n, f in zip(extent, given, strict=True)]
            factors = [None, None] if recompute_scale_factor else list(given)
        want = want if isinstance(want, (tuple, list)) else (want, want)
        if tuple(int(w) for w in want) == tuple(extent):  # which PyTorch copies, whatever the factor
            return op.Pointwise(lambda v: v, linear=True)
        sides = zip(extent, want, factors, strict=True)
        return op.Resample(*(op.resized(n, int(w), mode, align_corners, f, ctx.network.dtype) for n, w, f in sides))

    if size is not None and not isinstance(size, int) and not ctx.is_static(size):
        size = tuple(size)
    ctx.map(op.Pointwise(lambda v: v, linear=True), (x,), make=make)


def _upsample(ctx: Context, module: nn.Upsample, x: Any) -> None:
    _interpolate(ctx, x, module.size, module.scale_factor, module.mode, module.align_corners,
                 module.recompute_scale_factor)  # fmt: skip


def _border(ctx: Context, x: Any, sides: Any, mode: str, name: str | None = None) -> str:
    """Pads or crops (left, right, top, bottom)."""

    def make(known: Any, inputs: Any) -> op.Operation:
        left, right, top, bottom = (int(v) for v in ctx.resolve(tuple(sides), known))
        (h, w), kind = inputs[0], "constant" if mode == "zeros" else mode
        return op.Resample(op.bordered(h, top, bottom, kind), op.bordered(w, left, right, kind))

    result: str = ctx.map(op.Pointwise(lambda v: v, linear=True), (x,), make=make, name=name)
    return result


def _pad(ctx: Context, x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> None:
    sizes = tuple(pad)
    if value or len(sizes) not in (2, 4, 6):
        raise ValueError(
            f"pad={pad} value={value} cannot be streamed; only zeros, over (x), (x, y) or (x, y, channels)"
        )
    before, after = sizes[4:6] if len(sizes) == 6 else (0, 0)
    if not isinstance(before, int) or not isinstance(after, int) or min(before, after) < 0:
        raise ValueError(f"pad={pad} cannot be streamed; channels can be added, by a fixed number")
    inner = sizes[:4] + (0,) * max(0, 4 - len(sizes))
    if before or after:
        if mode != "constant":
            raise ValueError(f"pad={pad} mode={mode!r} cannot be streamed; channels are padded with zeros")
        if any(v != 0 for v in inner):
            x = _border(ctx, x, inner, mode, f"{ctx.node.name}_pad")
        ctx.map(
            op.Pointwise(
                lambda t: F.pad(t, (0, 0, 0, 0, before, after)), lambda n: n + before + after, linear=True
            ), (x,)
        )  # fmt: skip
    else:
        _border(ctx, x, inner, mode)


def _pad_module(mode: str) -> Callable[..., None]:
    def handle(ctx: Context, module: Any, x: Any) -> None:
        if getattr(module, "value", 0):
            raise ValueError(f"value={module.value} cannot be streamed; pad with zeros")
        _border(ctx, x, op_sides(module.padding), mode)

    return handle


def op_sides(padding: Any) -> tuple[int, int, int, int]:
    return (padding,) * 4 if isinstance(padding, int) else tuple(padding)


# ---- channels


def _cat(ctx: Context, tensors: Any, dim: int = 0) -> None:
    if not all(ctx.is_map(t) for t in tensors):
        raise ValueError("joins a map and a vector, pooled over the whole image, which cannot be streamed")
    if dim not in (1, -3) or any(ctx.is_flat(t) for t in tensors):
        raise ValueError(f"concatenation over dim={dim}; only maps, over channels (dim=1), can be streamed")
    ctx.map(op.Pointwise(lambda *xs: torch.cat(xs, 1), lambda *n: sum(n), linear=True), tuple(tensors))


def _getitem(ctx: Context, x: Any, index: Any) -> None:
    index = index if isinstance(index, tuple) else (index,)
    index = tuple(i for i in index if i is not Ellipsis) if index[-1:] == (Ellipsis,) else index
    whole_ = slice(None)
    if len(index) < 2 or not all(isinstance(i, slice) for i in index) or index[0] != whole_ or any(
        i != whole_ for i in index[2:]
    ):  # fmt: skip
        raise ValueError(f"index {index} cannot be streamed; channels can be cut out, x[:, a:b]")
    part = index[1]

    def count(n: int) -> int:
        if not len(range(n)[part]):
            raise ValueError(f"index {index} leaves none of {n} channels")
        return len(range(n)[part])

    if any(isinstance(v, fx.Node) for v in (part.start, part.stop, part.step)):
        raise ValueError(f"index {index} cannot be streamed; give fixed channels")
    ctx.map(op.Pointwise(lambda t: t[:, part], count, linear=True), (x,), view=True)


def _chunk(ctx: Context, x: Any, chunks: int, dim: int = 0) -> None:
    if dim not in (1, -3) or not isinstance(chunks, int):
        raise ValueError(f"cut over dim={dim}; only channels (dim=1), in equal parts, can be streamed")
    names = []
    for i in range(chunks):

        def cut(t: Tensor, i: int = i) -> Tensor:
            return torch.chunk(t, chunks, 1)[i]

        def count(c: int, i: int = i) -> int:
            size = -(-c // chunks)
            if c <= i * size:
                raise ValueError(f"{c} channels in {chunks} chunks are fewer than {chunks}; cut them x[:, a:b]")
            return min(size, c - i * size)

        names.append(ctx.map(op.Pointwise(cut, count, linear=True), (x,), name=f"{ctx.node.name}_{i}", view=True))
    ctx.parts(names)


# ---- reductions


def _positions(ctx: Context, x: Any, dim: Any) -> bool:
    """Whether `dim` means all positions of a map; ValueError if it means anything but channels."""
    dims = tuple(sorted(d % (3 if ctx.is_flat(x) else 4) for d in ((dim,) if isinstance(dim, int) else tuple(dim))))
    if dims == ((2,) if ctx.is_flat(x) else (2, 3)):
        return True
    if dims == (1,):
        return False
    raise ValueError(f"reduces dim={dim}; only channels (1) or all positions, (2, 3), can be streamed")


def _reduce(kind: str) -> Callable[..., None]:
    functions: dict[str, Callable[..., Any]] = {"mean": torch.mean, "sum": torch.sum, "amax": torch.amax}

    def handle(ctx: Context, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> None:
        if dim is None or dtype is not None:
            raise ValueError(f"{kind} with dim={dim}, dtype={dtype} cannot be streamed; give dim=(2, 3)")
        if not _positions(ctx, x, dim):
            if not keepdim:
                raise ValueError(f"{kind} over channels drops a dimension; use keepdim=True")
            _elementwise(ctx, functions[kind], (x,), {"dim": 1, "keepdim": True})
            node = ctx.network.nodes[-1]
            node.operation._channels = lambda n: 1
            return
        ends = (1, 1) if not ctx.is_flat(x) else (1,)

        def shape(t: Tensor) -> Tensor:
            return t.reshape(*t.shape[:2], *(ends if keepdim else ()))

        if kind != "sum":
            ctx.reduce(Reduction(kind, ctx.value(x), shape=shape))  # type: ignore[arg-type]
            return
        name = ctx.node.name
        source = ctx.value(x)
        mean = ctx.reduce(Reduction("mean", source, shape=shape), f"{name}_mean")
        ctx.extent_vector(f"{name}_area", source)
        ctx.vector(name, lambda env: env[mean] * env[f"{name}_area"], (mean, f"{name}_area"))

    return handle


def _adaptive(kind: str) -> Callable[..., None]:
    def handle(ctx: Context, x: Any, output_size: Any, return_indices: bool = False) -> None:
        if return_indices:
            raise ValueError("returns indices, which cannot be streamed")
        size = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        if not all(isinstance(n, int) and n >= 1 for n in size):
            raise ValueError(f"pools to {output_size}; only a fixed number of rows and columns can be streamed")
        ctx.reduce(Reduction(kind, ctx.value(x), (size[0], size[1])))  # type: ignore[arg-type]

    return handle


def _adaptive_module(kind: str) -> Callable[..., None]:
    def handle(ctx: Context, module: Any, x: Any) -> None:
        _adaptive(kind)(ctx, x, module.output_size, getattr(module, "return_indices", False))

    return handle


def _spatial_norm(ctx: Context, module: Any, x: Any) -> None:
    """Group and instance norm: mean and variance of channels in groups, over all positions; then scale and shift."""
    instance = isinstance(module, nn.InstanceNorm2d)
    if instance and module.track_running_stats:
        raise ValueError("instance norm with running statistics cannot be streamed; use track_running_stats=False")
    name, groups = ctx.node.name, None if instance else module.num_groups
    moments = ctx.reduce(Reduction("moments", ctx.value(x)), f"{name}_moments")

    def scale(env: Any) -> Tensor:
        both = env[moments].flatten()
        channels = len(both) // 2
        means, variances = both.reshape(2, groups or channels, -1)
        mean = means.mean(1)  # of a group: the channels' variances, and how far their means lie apart
        std = torch.rsqrt((variances + (means - mean[:, None]).square()).mean(1) + module.eps)
        mean, std = (t.repeat_interleave(channels // len(t)) for t in (mean, std))
        weight = 1.0 if module.weight is None else module.weight.double()
        shift = torch.zeros_like(mean) if module.bias is None else module.bias.double()
        return torch.cat([mean, std * weight, shift])[None, :, None, None]

    ctx.vector(f"{name}_scale", scale, (moments,))

    def apply(t: Tensor, scale: Tensor) -> Tensor:
        wide = torch.float32 if t.dtype is torch.bfloat16 else t.dtype
        mean, factor, shift = torch.split(scale.to(t.device, wide), t.shape[1], 1)
        return torch.addcmul(shift, t.to(wide) - mean, factor)

    operation = op.Pointwise(apply)
    operation.vectors = "own"
    ctx.map(operation, (x,), (f"{name}_scale",))


# ---- views


def _same(ctx: Context, *args: Any, **kwargs: Any) -> None:
    """The result is the input itself."""
    ctx.alias(args[-1] if ctx.is_module else args[0])


def _contiguous(ctx: Context, x: Any, memory_format: Any = None) -> None:
    """The input itself or a copy, by how its memory lies: writing on either is refused, as on views."""
    ctx.map(op.Pointwise(lambda t: t, linear=True), (x,), view=True)


def _dropout(ctx: Context, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> None:
    if training:
        raise ValueError("dropout(training=True) is random; pass training=self.training")
    ctx.alias(x)


def _flatten(ctx: Context, x: Any, start_dim: int = 0, end_dim: int = -1) -> None:
    if start_dim not in (2, -2) or end_dim not in (-1, 3):
        raise ValueError(f"flatten({start_dim}, {end_dim}) of a map; only positions, flatten(2), can be streamed")
    ctx.alias(x, flat=True)


def _view(ctx: Context, x: Any, *shape: Any) -> None:
    given = shape = _sides(shape)
    if len(shape) == 5 and not ctx.is_flat(x) and any(isinstance(s, int) and s > 0 for s in shape[1:3]):
        _group(ctx, x, shape)
        return
    if len(shape) == 1 and ctx.is_static(shape[0]):  # another map's shape
        shape = (shape[0],) * 4
    if len(shape) not in (3, 4) or not all(isinstance(s, int) or ctx.is_static(s) for s in shape):
        raise ValueError(f"view{shape} of a map; only positions flattened, (N, C, -1), and back can be streamed")
    # checked once sizes are known: the view must keep channels and positions
    flat, source = len(shape) == 3, ctx.value(x)

    def make(known: Any, inputs: Any) -> op.Operation:
        n, c, h, w = known[source]
        sides = ctx.resolve(given, known)
        want = [int(s) for s in (sides[0] if len(sides) == 1 else sides)]
        full = [n, c, h * w] if flat else [n, c, h, w]
        if want.count(-1) > 1 or any(a not in (-1, b) for a, b in zip(want, full, strict=True)):
            raise ValueError(f"view{tuple(want)} of a map {(n, c, h, w)} cannot be streamed; channels must stay")
        return op.Pointwise(lambda t: t, linear=True)

    ctx.map(op.Pointwise(lambda t: t, linear=True), (x,), make=make, view=True)
    ctx.builder.flat.discard(ctx.node)
    if flat:
        ctx.builder.flat.add(ctx.node)


def _group(ctx: Context, x: Any, shape: tuple[Any, ...]) -> None:
    """view(n, g, c // g, h, w): channels in groups."""
    sizes = [s if isinstance(s, int) else -1 for s in shape[1:3]]
    source = ctx.value(x)

    def make(known: Any, inputs: Any) -> op.Operation:
        n, c, h, w = known[source]
        want = [int(s) for s in ctx.resolve(shape, known)]
        groups = [(c // want[2] if want[1] == -1 else want[1]), (c // want[1] if want[2] == -1 else want[2])]
        full = [n, *groups, h, w]
        if groups[0] * groups[1] != c or any(a not in (-1, b) for a, b in zip(want, full, strict=True)):
            raise ValueError(f"view{tuple(want)} of a map {(n, c, h, w)} cannot be streamed; positions must stay")
        return op.Pointwise(lambda t: t, linear=True)

    if all(s > 0 for s in sizes):
        sizes[1] = -1
    ctx.map(op.Pointwise(lambda t: t, linear=True), (x,), make=make, view=True)
    ctx.builder.arranged[ctx.node] = Arrangement("groups", lambda t: t.reshape(1, *sizes, *t.shape[2:]))


def _getattr(ctx: Context, x: Any, name: str) -> None:
    calls = {"shape": lambda s: s, "ndim": len, "dtype": lambda s: ctx.network.dtype,
             "device": lambda s: ctx.network.device}  # fmt: skip
    if name not in calls:
        raise ValueError(f".{name} of a map cannot be streamed")
    ctx.shape(x, calls[name])


def _size(ctx: Context, x: Any, dim: int | None = None) -> None:
    ctx.shape(x, lambda s: s if dim is None else s[dim])


ELEMENTWISE_MODULES = (
    nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink,
    nn.Threshold, nn.Softmax2d,
)  # fmt: skip
MODULES: dict[Any, Callable[..., None]] = {
    **dict.fromkeys(ELEMENTWISE_MODULES, _module),
    nn.PReLU: _prelu,
    nn.ReLU: lambda ctx, m, x: _relu()(ctx, x, m.inplace),
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _transposed,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _spatial_norm,
    nn.InstanceNorm2d: _spatial_norm,
    nn.Softmax: lambda ctx, m, x: _softmax(False)(ctx, x, m.dim),
    nn.LogSoftmax: lambda ctx, m, x: _softmax(True)(ctx, x, m.dim),
    nn.Identity: _same,
    nn.Dropout: _same,
    nn.Dropout2d: _same,
    nn.Flatten: lambda ctx, m, x: _flatten(ctx, x, m.start_dim, m.end_dim),
    nn.MaxPool2d: lambda ctx, m, x: _max_pool(
        ctx, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d: lambda ctx, m, x: _average_pool(
        ctx, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: _adaptive_module("mean"),
    nn.AdaptiveMaxPool2d: _adaptive_module("max"),
    nn.Upsample: _upsample,
    nn.UpsamplingBilinear2d: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.ZeroPad2d: _pad_module("constant"),
    nn.ReflectionPad2d: _pad_module("reflect"),
    nn.ReplicationPad2d: _pad_module("replicate"),
    nn.CircularPad2d: _pad_module("circular"),
}
_MATHS = (
    "sigmoid", "tanh", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "abs", "neg", "square", "clamp", "clip", "erf",
    "sin", "cos", "reciprocal", "sign",
)  # fmt: skip
_ACTIVATIONS = (
    "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh",
    "softplus", "softsign", "logsigmoid", "softshrink", "hardshrink", "tanhshrink",
)  # fmt: skip
FUNCTIONS: dict[Any, Callable[..., None]] = {
    **{getattr(torch, name): _named(getattr(torch, name)) for name in _MATHS},
    **{name: _named(getattr(torch, name)) for name in _MATHS},
    **{f"{name}_": _named(getattr(torch, name), True) for name in ("sigmoid", "tanh", "clamp", "exp", "neg", "abs")},
    **{getattr(F, name): _named(getattr(F, name)) for name in _ACTIVATIONS},
    F.sigmoid: _named(torch.sigmoid),
    F.tanh: _named(torch.tanh),
    operator.neg: _named(operator.neg),
    **dict.fromkeys((torch.detach, "detach"), _named(torch.detach)),  # nothing comes back through it
    torch.maximum: _named(torch.maximum),
    torch.minimum: _named(torch.minimum),
    **dict.fromkeys((torch.add, operator.add, "add"), _arithmetic(operator.add)),
    **dict.fromkeys((operator.iadd, "add_"), _arithmetic(operator.add, True)),
    **dict.fromkeys((torch.sub, operator.sub, "sub"), _arithmetic(operator.sub)),
    **dict.fromkeys((operator.isub, "sub_"), _arithmetic(operator.sub, True)),
    **dict.fromkeys((torch.mul, operator.mul, "mul"), _arithmetic(operator.mul)),
    **dict.fromkeys((operator.imul, "mul_"), _arithmetic(operator.mul, True)),
    **dict.fromkeys((torch.div, operator.truediv, "div"), _arithmetic(operator.truediv)),
    **dict.fromkeys((operator.itruediv, "div_"), _arithmetic(operator.truediv, True)),
    **dict.fromkeys((torch.pow, operator.pow, "pow"), _arithmetic(operator.pow)),
    **dict.fromkeys((F.relu, torch.relu, "relu"), _relu()),
    **dict.fromkeys((torch.relu_, "relu_"), _relu(True)),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), _softmax(False)),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, "log_softmax"), _softmax(True)),
    **dict.fromkeys((torch.cat, torch.concat), _cat),
    **dict.fromkeys((torch.chunk, "chunk"), _chunk),
    operator.getitem: _getitem,
    F.dropout: _dropout,
    F.pad: _pad,
    F.interpolate: _interpolate,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    **dict.fromkeys((F.conv2d, torch.conv2d), _convolve),
    F.avg_pool2d: _average_pool,
    F.adaptive_avg_pool2d: _adaptive("mean"),
    F.adaptive_max_pool2d: _adaptive("max"),
    **dict.fromkeys((torch.mean, "mean"), _reduce("mean")),
    **dict.fromkeys((torch.sum, "sum"), _reduce("sum")),
    **dict.fromkeys((torch.amax, "amax"), _reduce("amax")),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys(("view", "reshape", torch.reshape), _view),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    getattr: _getattr,
    "size": _size,
    "dim": lambda ctx, x: ctx.shape(x, len),
    "contiguous": _contiguous,
}
"""By the function itself, or by the name of a method."""
ARITHMETIC: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.add, operator.add, "add", operator.iadd), operator.add),
    **dict.fromkeys((torch.sub, operator.sub, "sub"), operator.sub),
    **dict.fromkeys((torch.mul, operator.mul, "mul", operator.imul), operator.mul),
    **dict.fromkeys((torch.div, operator.truediv, "div"), operator.truediv),
}
POINTWISE = {getattr(F, name) for name in _ACTIVATIONS} | {F.relu, torch.relu, "relu"}
POINTWISE |= {getattr(torch, name) for name in _MATHS} | {*_MATHS, torch.detach, "detach"}
"""Functions that act on every value alone, whatever the arrangement."""
