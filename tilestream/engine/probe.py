"""Is what was traced what the network computes? Asked once, of a small image, for what tracing cannot see.

Python code that runs while the network is traced leaves no trace of its own: gradients that it switches off, values
that it writes past autograd, a head that looks at the whole batch. So a new network is run plainly, over two small
images of noise, and compared.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .autograd import differentiable, each_back
from .passes import Pass
from .planner import Planner, cut
from .scratch import Scratch
from .trace import Network

SHAPES_PX = tuple((n, n + d) for n in (64, 128, 192, 256, 512, 1024) for d in (7, 64))
"""The first that the network takes: some want sides that 2, or 64, divides."""
ASLEEP = 1e-3
"""A weight whose entries are all smaller hides what it multiplies."""
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
"""Of the results' maximum; of gradients' norms ten times as much, for rounding flips rectifiers."""


def check_against_plain(net: nn.Module, network: Network) -> str:
    """ValueError where plain PyTorch gives other results, gradients of the image or of parameters than the engine.

    And where it gives none at all that can be compared: NaN, or errors for images of every size. Returns why it takes
    no batch, or nothing where it does.
    """
    why = "it gives NaN or infinity"
    for shape, image in product(SHAPES_PX, (torch.randn, torch.rand)):  # some take no negative values
        generator = torch.Generator().manual_seed(shape[0])
        images = image((2, network.channels, *shape), generator=generator, dtype=torch.float64)
        images = images.to(network.device, network.dtype)
        try:
            bound = network.bind(shape)
            finite = _is_finite(net, images[:1])
        except Exception as error:  # it wants another size, and says so in whatever way
            why = str(error).partition("\n")[0] or type(error).__name__
            continue
        if not finite:
            continue
        alone = ""
        try:
            _is_finite(net, images)
        except Exception as error:
            images, alone = images[:1], str(error).partition("\n")[0] or type(error).__name__
        _compare(net, bound, images)
        return alone
    raise ValueError(
        f"{type(net).__name__}.forward takes no image of noise, from {SHAPES_PX[0]} to {SHAPES_PX[-1]} px, on which it "
        f"could be compared with plain PyTorch: {why}"
    )


def awake(net: nn.Module) -> nn.Module | None:
    """A copy of the network whose weights of nearly zero are not: a gate or head that begins at zero hides the rest.

    None where it has none. Biases hide nothing.
    """
    weights = {name for name, p in net.named_parameters() if not name.endswith("bias") and p.numel() and _asleep(p)}
    if not weights:
        return None
    copied, generator = copy.deepcopy(net), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in copied.named_parameters():
            if name in weights:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return copied


def _asleep(p: Tensor) -> bool:
    return float(p.detach().abs().max()) < ASLEEP


def _is_finite(net: nn.Module, images: Tensor) -> bool:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return bool(torch.isfinite(net(images.clone())).all())


def _compare(net: nn.Module, network: Network, images: Tensor) -> None:
    name, tolerance = f"{type(net).__name__}.forward", TOLERANCE[network.dtype]
    parameters = [p for p in net.parameters() if p.requires_grad]
    plain, weight, wanted = _plain(net, images, parameters)
    x = images.clone().requires_grad_()
    parts = cut(network, Planner(network, mode="scatter", want_weights=True).plan(2**40, None).segments)
    works = [Pass(network, parts, image, Scratch(2**40)) for image in images]
    try:
        made = differentiable(network, works, net, x, partial(each_back, works))
        if made.shape != plain.shape:
            raise ValueError(
                f"{name} gives {tuple(plain.shape)} for a batch of two, {tuple(made.shape)} for its images one by one; "
                "a streamed network takes each image by itself"
            )
        if _norm(made.detach() - plain, math.inf) > tolerance * _norm(plain, math.inf):
            raise ValueError(
                f"{name} gives other results in plain PyTorch than traced; something in it cannot be seen by torch.fx, "
                "or looks at the whole batch"
            )
        if wanted is None or not all(bool(torch.isfinite(g).all()) for g in wanted):
            return
        got = torch.autograd.grad((made * weight).sum(), [x, *parameters], allow_unused=True, materialize_grads=True)
    finally:
        for work in works:
            work.close()
    least = 1e-3 * max((_norm(g) for g in wanted[1:]), default=0.0)  # some are nothing but rounding
    for mine, theirs in zip(got, wanted, strict=True):
        if _norm(mine - theirs) > 10 * tolerance * max(_norm(theirs), least):
            raise ValueError(
                f"{name} has other gradients in plain PyTorch than traced; gradients that are switched off inside it, "
                "or hooks, cannot be streamed"
            )


def _plain(net: nn.Module, images: Tensor, parameters: list[nn.Parameter]) -> Any:
    """Results, weights for each of them, and the gradients of the images and the parameters (None: there are none)."""
    x = images.clone().requires_grad_()
    with torch.enable_grad(), torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        try:
            plain = net(x.clone())
            one = plain[:1]
            weight = torch.linspace(-1, 1, one.numel(), dtype=one.dtype, device=one.device).reshape(one.shape)
            every = [x, *parameters]
            wanted = torch.autograd.grad((plain * weight).sum(), every, allow_unused=True, materialize_grads=True)
        except RuntimeError:  # it overwrites what plain autograd keeps: there is no gradient to compare with
            wanted = None
            with torch.no_grad():
                plain = net(images.clone())
                weight = plain[:1]
    return plain.detach(), weight, wanted


def _norm(t: Tensor, order: float = 2) -> float:
    return float(torch.linalg.vector_norm(t.double(), order)) if t.numel() else 0.0
