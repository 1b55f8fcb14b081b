"""The public face of the engine: `stream(net)` and what can be done with it."""

from __future__ import annotations

import math
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tilestream.geometry import Plan, Region

from .allocator import resident_bytes, reused_buffers, trim
from .autograd import differentiable, each_back
from .context import as_it_stands
from .passes import Mode, Pass
from .planner import Planner, cut, parse_bytes
from .probe import awake, check_against_plain
from .saliency import Reduce, Saliency, Sink, check, reduced
from .scratch import Allocate, FileArray, Scratch
from .tile import Array, Source, keeps
from .trace import Network, Precision, content, record, trace, unchanged

DEFAULT_MEMORY = "2 GiB"
Progress = Callable[[int, int], None]


def stream(
    net: nn.Module, *, memory: int | str | None = None, tile: int | None = None, scratch: Allocate = FileArray,
    precision: Precision | None = None,
) -> Streamed:  # fmt: skip
    """A network that runs over images of any size tile by tile, with the results of the un-tiled network.

    `memory` bounds what a call adds to the process's resident memory ("2 GiB" unless given); `tile` fixes the side of
    the tiles instead, in input px, a multiple of the network's stride. Maps between tiles that do not fit are kept in
    arrays that `scratch(shape, dtype)` makes: files that vanish by themselves, unless given. `net` must be in
    evaluation mode, and every operation on maps must be one that can be streamed exactly; ValueError names the
    module otherwise. `precision="bf16"` keeps maps in bfloat16: an approximation, asked for by name, for machines that
    are faster in it; sums, head and results stay in the dtype of the parameters.
    """
    return Streamed(net, memory=memory, tile=tile, scratch=scratch, precision=precision)


class Streamed(nn.Module):
    """A network, streamed: see `stream`. Weights may change between calls: the network is traced again if they did."""

    def __init__(
        self, net: nn.Module, *, memory: int | str | None = None, tile: int | None = None,
        scratch: Allocate = FileArray, precision: Precision | None = None,
    ) -> None:  # fmt: skip
        if tile is not None and (not isinstance(tile, int) or tile < 1):
            raise ValueError(f"tile={tile!r} must be the side of the tiles in px, a positive integer")
        if memory is not None and tile is not None:
            raise ValueError(f"memory={memory!r} and tile={tile} both fix the tiles; give one of them")
        super().__init__()
        self.net, self.tile, self.scratch, self.precision = net, tile, scratch, precision
        self.training = False
        self.gone_back: tuple[int, int] | None = None
        """Of the last `backward`: tiles gone back over, of all. Where only maxima are pooled, those with winners."""
        self.memory = parse_bytes(DEFAULT_MEMORY if memory is None else memory)
        self._stamp: Any = None
        self._plans: dict[Any, Plan] = {}
        self._lock = threading.RLock()
        self.network()

    def __getstate__(self) -> dict[str, Any]:
        """All but what follows from the rest."""
        derived: dict[str, Any] = {"_lock": None, "_network": None, "_stamp": None, "_held": None, "_plans": {}}
        return {**self.__dict__, **derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_lock": threading.RLock()})  # type: ignore[no-untyped-call]

    @as_it_stands
    def network(self) -> Network:
        """The traced network, traced anew if its forward code does something else than last, or tensors changed.

        The code is run on a stand-in for an image at each call (10 ms for ResNet-50), so whatever it reads is seen.
        """
        with self._lock:
            recorded = record(self.net)
            stamp = self._tensors(), recorded.settings
            if stamp != self._stamp:
                network = trace(self.net, self.precision, recorded)
                if self._stamp is None or stamp[1] != self._stamp[1]:
                    with unchanged(self.net):
                        plain = trace(self.net, None, recorded) if self.precision else network
                        self._alone = check_against_plain(self.net, plain)
                    if (roused := awake(self.net)) is not None:
                        check_against_plain(roused, trace(roused))
                    trim()
                self._network, self._stamp = network, (self._tensors(), recorded.settings)
                self._held = [*self.net.parameters(), *self.net.buffers()]  # or new ones could get their identities
                self._plans.clear()
            return self._network

    def _tensors(self) -> Any:
        """Parameters and buffers under all their names: which they are, and what they hold."""
        named = chain(self.net.named_parameters(remove_duplicate=False), self.net.named_buffers(remove_duplicate=False))
        return [
            (name, id(t), t.data_ptr() if t.layout is torch.strided else 0, t.device, t.requires_grad, content(t))
            for name, t in named
        ]

    def plan(
        self, shape: Sequence[int], *, reduce: Reduce | None = "mean", method: str = "gradient", weights: bool = False,
        mode: Mode | None = None, backward: bool = True, out: bool = False,
    ) -> Plan:  # fmt: skip
        """How an image of this shape, (C, H, W) or (H, W), is taken: segments, tiles, predicted peak bytes and FLOPs.

        For saliency by `method`, for `backward` of one image (weights=True), or forward alone (backward=False). Where
        autograd goes back, or the image's gradient is wanted too, one sweep more may be taken. `out`: the map
        goes to an array of the caller's, which takes no part of the budget. `mode` is "scatter" or "gather" by
        predicted time unless given. Raises ValueError when the budget is too small (got, needed and the smallest
        that works) or the image is.
        """
        network = self.network() if len(shape) == 2 else self._fitting(shape)
        return self._planned(network, shape, reduce, method, weights, mode, backward, out)

    def _planned(
        self, network: Network, shape: Sequence[int], reduce: Reduce | None = "mean", method: str = "gradient",
        weights: bool = False, mode: Mode | None = None, backward: bool = True, out: bool = False, at_once: bool = True,
    ) -> Plan:  # fmt: skip
        """`plan` of a network as it was traced. `at_once`: the call may go there and back in one sweep."""
        check(method, reduce)
        if method != "gradient" and network.clamped:
            raise ValueError(f"method={method!r} clamps gradients at rectifiers on maps; this network has others "
                             "behind its pooling")  # fmt: skip
        network = network.bind((int(shape[-2]), int(shape[-1])))
        if mode is None:
            modes: list[Mode] = ["scatter"] if weights or not backward else ["gather"]
            if (
                not weights
                and backward
                and method == "gradient"
                and any(keeps(n.operation, False) == "input" for n in network.nodes)
            ):
                modes = ["scatter", "gather"]
        else:
            modes = [mode]
        if method != "gradient" and modes != ["gather"]:
            raise ValueError(
                f"method={method!r} clamps gradients, so shares of tiles cannot be added; use mode='gather'"
            )
        if weights and modes != ["scatter"]:
            raise ValueError("gradients of weights come by mode='scatter'")
        wanted = reduce == "mean", tuple(modes), weights, backward, out, at_once
        key = (network.channels, network.extents[network.image], *wanted)
        if key not in self._plans:
            plans, errors = [], []
            for each in modes:
                try:
                    plans.append(self._plan(network, each, reduce, weights, backward, out, at_once))
                except ValueError as error:
                    errors.append(error)
            if not plans:
                raise errors[-1]
            self._plans[key] = min(plans, key=lambda p: p.seconds)
        return self._plans[key]

    def _plan(
        self, network: Network, mode: Mode, reduce: Reduce | None, weights: bool, backward: bool, out: bool,
        at_once: bool,
    ) -> Plan:  # fmt: skip
        height, width = network.extents[network.image]
        itemsize = network.dtype.itemsize
        result = 0
        if backward and not weights and not out:
            result = height * width * itemsize * (network.channels if reduce is None else 1)
        elif network.dense and not out:
            result = network.channels_of()[network.output] * math.prod(network.extents[network.output]) * itemsize
        planner = Planner(
            network, mode=mode, want_weights=weights, backward=backward, mean=reduce == "mean" and not weights,
            result_bytes=result,
            one_sweep=at_once and (bool(_known_logits(network)) if weights else network.linear and not network.dense),
        )  # fmt: skip
        return planner.plan(None if self.tile is not None else self.memory, self.tile)

    def forward(self, image: Source) -> Tensor:
        """Logits, (N, num_classes), or the map (N, C, h, w), equal to `net(image)`.

        `image` is (C, H, W) or (N, C, H, W), cast, not scaled. A tensor gives a result that autograd can go back from,
        to the image and to the weights, by streaming.
        """
        network, images = self._images(image)
        wanted = any(t.requires_grad for t in [image, *self.net.parameters()] if isinstance(t, Tensor))
        track = isinstance(image, Tensor) and torch.is_grad_enabled() and wanted
        return self._run(network, images, image if track else None)

    @as_it_stands
    @reused_buffers()
    def _run(self, network: Network, images: list[Any], image: Any) -> Tensor:
        """The results of all images, with a history that goes back to `image`, which holds them, unless it is None."""
        way = image is not None
        plan = self._planned(network, images[0].shape, weights=way, backward=way, at_once=False)
        network, scratch = network.bind(plan.image), Scratch(plan.scratch_bytes, self.scratch)
        works = [self._pass(network, plan, each, scratch=scratch) for each in images]
        try:
            if image is not None:
                return differentiable(network, works, self.net, image, partial(each_back, works))
            results = []
            for work in works:
                results.append(work.result())
                work.close()
            return torch.cat(results) if len(results) > 1 else results[0]
        except BaseException:
            for work in works:
                work.close()
            raise

    @as_it_stands
    @reused_buffers()
    def saliency(
        self,
        image: Source,
        target: int = 1,
        method: str = "gradient",
        reduce: Reduce | None = "mean",
        *,
        upstream: Any = None,
        mode: Mode | None = None,
        out: Sink | None = None,
        progress: Progress | None = None,
    ) -> Saliency:
        """d logit[target] / d input, tile by tile, over `image` (C, H, W) or (1, C, H, W).

        `method`: "gradient", "guided" back-propagation (Springenberg et al. 2015) or "deconv" (Zeiler and Fergus 2014).
        `upstream` is the gradient of the logits, (num_classes,), instead of a target's; for a network that returns a
        map, that of the map, (C, h, w), read in windows (by default 1 all over channel `target`). Channels are reduced
        by their signed mean, or `reduce="absmean"`, `"absmax"`, None (kept). The map goes to `out`, an array of its
        shape, if given. After each tile `progress(done, tiles)` is called. Raises ValueError for an unknown target,
        method or reduce, a budget that is too small, and NaN.
        """
        check(method, reduce)
        try:
            target = operator.index(target)
        except TypeError:
            raise ValueError(f"target={target!r} must be the number of a logit, an int") from None
        network, (source,) = self._images(image, one=True)
        plan = self._planned(network, source.shape, reduce, method, mode=mode, out=out is not None)
        network = network.bind(plan.image)
        shape = plan.image if reduce is not None else (network.channels, *plan.image)
        if out is not None and tuple(out.shape) != shape:
            raise ValueError(f"out.shape={tuple(out.shape)} must be {shape}, the shape of the saliency map")
        values: Any = np.empty(shape, torch.empty((), dtype=network.dtype).numpy().dtype) if out is None else out

        def write(region: Region, block: Tensor) -> None:
            part = reduced(block.contiguous().cpu().numpy(), reduce)
            values[(Ellipsis, slice(region.y0, region.y1), slice(region.x0, region.x1))] = part

        work = self._pass(network, plan, source, tape=plan.mode == "gather", progress=progress)
        try:
            rule: Any = method
            options: Any = {"mode": plan.mode, "rule": rule, "write": write, "mean": reduce == "mean"}
            if network.dense:
                dense = _dense(network, target, upstream)
                work.forward()
                work.backward(None, dense=dense, **options)
                logits = torch.empty((1, 0))
            else:
                logits = work.there_and_back(lambda: _given(work, target, upstream), **options)
        finally:
            work.close()
        return Saliency(values, logits)

    @as_it_stands
    @reused_buffers()
    def backward(
        self, image: Source, loss_fn: Callable[[Tensor], Tensor], *, gradient: Sink | None = None,
        progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """Adds the exact gradient of `loss_fn(logits)` to every parameter's `.grad`; returns the loss, detached.

        `image` is (C, H, W) or (N, C, H, W); `loss_fn` takes the logits (N, num_classes), or the map (N, C, h, w), and
        gives a scalar. `gradient`, an array of the image's shape, gets the gradient of the image as well.
        """
        network, images = self._images(image)
        if gradient is not None and tuple(gradient.shape) != tuple(image.shape):
            raise ValueError(f"gradient.shape={tuple(gradient.shape)} must be {tuple(image.shape)}, that of the image")
        at_once = gradient is None and self._accumulators_fit(len(images))
        plan = self._planned(network, images[0].shape, weights=True, at_once=at_once)
        network = network.bind(plan.image)
        scratch = Scratch(plan.scratch_bytes, self.scratch)
        tick = _Ticker(progress, plan, len(images))
        works = [self._pass(network, plan, each, tick=tick, scratch=scratch) for each in images]
        guess = self._guess(network) if at_once else None

        def back(down: Tensor, _: Any) -> Iterable[Pass]:
            if guess is not None and _as_guessed(down, network):
                for work, upstream in zip(works, down[:, None], strict=True):
                    work.scale(upstream)
                return works
            if guess is not None:
                works[:] = [self._pass(network, plan, each, tick=tick, scratch=scratch) for each in images]
                for work in works:
                    work.result()
            return each_back(works, down, gradient)

        try:
            if guess is not None:
                for work in works:
                    work.there_and_back(lambda: guess, mode="scatter", want_weights=True)
            start = torch.zeros(0, device=network.device, requires_grad=True)  # there may be no parameters
            with torch.enable_grad():
                loss = _scalar(loss_fn(differentiable(network, works, self.net, start, back)))
            inner = [start, *(leaf for work in works for leaf in work.leaves.values())]
            leaves = [p for p in _leaves(loss) if not any(p is t for t in inner)]
            if any(p is image for p in leaves):
                raise ValueError("loss_fn reads the image, which wants a gradient; use loss(streamed(image)) instead")
            # all at once: a call that is cancelled leaves nothing behind, and hooks see the sum
            _, *found = torch.autograd.grad(loss, [start, *leaves], allow_unused=True)
            self.gone_back = sum(work.gone_back for work in works), sum(work.back_tiles() for work in works)
            self._add(leaves, found)
            return loss.detach()
        finally:
            for work in works:
                work.close()

    def _accumulators_fit(self, images: int) -> bool:
        """Whether each image of a batch may have gradients of weights of its own."""
        weights = sum(p.numel() * p.element_size() for p in self.net.parameters() if p.requires_grad)
        return images == 1 or images * weights <= self.memory // 4

    def _guess(self, network: Network) -> Tensor | None:
        """The gradient of the logits up to a factor, where it is known before the forward pass; None where not.

        Then one sweep does forward and backward: for one logit, and for two whose gradients sum to zero, as softmax
        and cross-entropy have it. What the loss says afterwards confirms it, or the way back is gone as for any other.
        """
        if not (classes := _known_logits(network)):
            return None
        return torch.tensor([[1.0]] if classes == 1 else [[-1.0, 1.0]], dtype=network.dtype, device=network.device)

    def _add(self, parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
        with self._lock, torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)  # two may have got one tensor
                else:
                    parameter.grad += gradient
                for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
                    hook(parameter)

    def _pass(
        self, network: Network, plan: Plan, source: Source, *, tape: bool = False, progress: Progress | None = None,
        scratch: Scratch | None = None, tick: _Ticker | None = None,
    ) -> Pass:  # fmt: skip
        tick = tick or _Ticker(progress, plan)
        scratch = Scratch(plan.scratch_bytes, self.scratch) if scratch is None else scratch
        limit = resident_bytes() + int(0.9 * plan.peak_bytes) if network.device.type == "cpu" else sys.maxsize
        return Pass(network, cut(network, plan.segments), source, scratch, tape=tape, tick=tick, limit_bytes=limit)

    def _images(self, image: Source, one: bool = False) -> tuple[Network, list[Any]]:
        """The images of a call, which begins here, and the network as it is now."""
        if torch._C._are_functorch_transforms_active():
            raise ValueError("torch.func transforms cannot be streamed; use loss.backward() or torch.autograd.grad")
        if not hasattr(image, "shape"):
            raise ValueError(f"image is a {type(image).__name__}; give an array or tensor, (C, H, W)")
        shape = tuple(image.shape)
        if len(shape) == 4 and not shape[0]:
            raise ValueError(f"image.shape={shape} holds no image; give at least one")
        if _is_complex(image):
            raise ValueError(f"image.dtype={image.dtype} is complex; give real values")  # type: ignore[attr-defined]
        network = self._fitting(shape, one)
        if len(shape) == 3:
            return network, [image]
        if shape[0] > 1 and self._alone:
            raise ValueError(f"image.shape={shape}: {type(self.net).__name__}.forward takes one image: {self._alone}")
        return network, [image[i] if isinstance(image, Tensor) else _Item(image, i) for i in range(shape[0])]

    def _fitting(self, shape: Sequence[int], one: bool = False) -> Network:
        """The network for images of this shape; ValueError where it takes none such."""
        network = self.network()
        try:
            if len(shape) in (3, 4) and not (one and len(shape) == 4 and shape[0] != 1):
                return network if shape[-3] == network.channels else network.of(shape[-3])
        except ValueError:
            pass
        raise ValueError(f"image.shape={tuple(shape)} must be ({network.channels}, H, W)")


class _Item:
    """One image of a batch, still read in windows."""

    def __init__(self, batch: Any, index: int) -> None:
        self.batch, self.index = batch, index
        self.shape: tuple[int, ...] = tuple(batch.shape[1:])

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Array:
        block: Array = self.batch[(self.index, *index)]
        return block


class _Ticker:
    """Counts tiles for a caller's progress(done, tiles); more sweeps than foreseen raise the total."""

    def __init__(self, progress: Progress | None, plan: Plan, images: int = 1) -> None:
        self.progress, self.done = progress, 0
        self.sweep = plan.tiles * images
        self.total = self.sweep * (2 if plan.mode == "gather" else 1)

    def __call__(self) -> None:
        self.done += 1
        while self.total < self.done:
            self.total += self.sweep
        if self.progress is not None:
            self.progress(self.done, self.total)


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a loss depends on and that gather gradients."""
    found: dict[int, Tensor] = {}
    stack, seen = [loss.grad_fn], set[Any]()
    while stack:
        function: Any = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if type(function).__name__ == "AccumulateGrad" and function.variable.requires_grad:
            found[id(function.variable)] = function.variable
        stack += [following for following, _ in function.next_functions]
    return list(found.values())


def _known_logits(network: Network) -> int:
    """How many logits there are if their gradient is known but for a factor before anything runs, 1 or 2; else 0."""
    if not network.linear or network.dense:
        return 0
    classes = Pass(network, [], np.empty((0, 0, 0)), Scratch(0)).classes()
    return classes if classes <= 2 else 0


def _as_guessed(down: Tensor, network: Network) -> bool:
    """Whether the gradients of two logits sum to zero, up to rounding."""
    tolerance = 4 * torch.finfo(network.dtype).eps * down.abs().amax(1)  # each image by itself: weights may be of one
    return down.shape[1] == 1 or bool((down.sum(1).abs() <= tolerance).all())


def _is_complex(image: Any) -> bool:
    return "complex" in str(getattr(image, "dtype", ""))  # a source need not tell


def _given(work: Pass, target: int, upstream: Any) -> Tensor:
    hot = work.one_hot(target)
    if upstream is None:
        return hot
    given = upstream.detach() if isinstance(upstream, Tensor) else torch.as_tensor(np.asarray(upstream))
    given = given.to(hot).reshape(1, -1)
    if given.shape != hot.shape:
        raise ValueError(f"upstream of shape {tuple(np.shape(upstream))} must hold one value for each of "
                         f"{hot.shape[1]} logits")  # fmt: skip
    return given


def _dense(network: Network, target: int, upstream: Any) -> Callable[[Region], Tensor]:
    channels, extent = network.channels_of()[network.output], network.extents[network.output]
    if upstream is not None and tuple(upstream.shape) != (channels, *extent):
        raise ValueError(f"upstream.shape={tuple(upstream.shape)} must be {(channels, *extent)}, that of the result")
    if upstream is None and not 0 <= target < channels:
        raise ValueError(f"target={target} must be in [0, {channels}): the network's map has that many channels")

    def part(region: Region) -> Tensor:
        if upstream is not None:
            block = upstream[:, region.y0 : region.y1, region.x0 : region.x1]
            block = block.detach() if isinstance(block, Tensor) else torch.as_tensor(np.asarray(block))
            return block.to(network.device, network.dtype)[None]
        hot = torch.zeros((1, channels, *region.shape), dtype=network.dtype, device=network.device)
        hot[:, target] = 1
        return hot

    return part


def _scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn gives {shape}; it must give one number")
    if loss.is_complex():
        raise ValueError("loss_fn gives a complex number; it must give a real one")
    if not loss.requires_grad:
        raise ValueError("loss_fn gives a number that does not depend on the logits; it must be computed from them")
    return loss.reshape(())
