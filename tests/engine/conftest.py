"""Networks and the oracle for the engine's tests."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilestream.engine import stream
from tilestream.engine.segment import segments
from tilestream.geometry import SegmentPlan
from tilestream.nets import ResidualNet, resnet18


@pytest.fixture
def paper_net() -> nn.Module:
    """Paper A's network, narrow, in float64."""
    return _random_norms(ResidualNet(3, widths=(4, 6, 8, 8, 10))).double()


@pytest.fixture
def local_average_net() -> nn.Module:
    """The same, seeing each pixel less the mean of 21 x 21 about it."""
    return _random_norms(ResidualNet(3, widths=(4, 6, 8, 8, 10), local_average_px=21)).double()


@pytest.fixture
def small_resnet18() -> nn.Module:
    """ResNet-18 as it is, but for the width of its maps, which cost time and prove nothing; in float64."""
    net = resnet18(3)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d):
            channels = (n if n == 3 else n // 16 for n in (module.in_channels, module.out_channels))
            new = nn.Conv2d(*channels, module.kernel_size, module.stride, module.padding, bias=False)
        elif isinstance(module, nn.BatchNorm2d):
            new = nn.BatchNorm2d(module.num_features // 16)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, new)
    net.fc = nn.Linear(32, 3)
    return _random_norms(net).double()


@pytest.fixture(scope="session")
def whole():
    """The un-tiled network in plain PyTorch: logits (1, classes) and input gradient (C, H, W)."""

    def run(net: nn.Module, image: torch.Tensor, target: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = image[None].clone().requires_grad_()
        logits = net(x)
        (gradient,) = torch.autograd.grad(logits[0, target], x)
        return logits.detach(), gradient[0]

    return run


def _random_norms(net: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights that are not those of a fresh network."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net.eval()


def _differs(got, expected) -> bool:
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    return got.shape != expected.shape or bool(
        (got - expected).abs().max() > 1e-12 * max(expected.abs().max(), 1e-4)  # what cancels leaves noise
    )


def _always(value, *_, **__):
    return value


def _check_gradients(net, image, streamed, logits, gradient):
    """Saliency by scatter and gather, also cut at random with tiles at random; gradients of weights; autograd."""
    rng = np.random.default_rng(image.shape[1] * 100 + image.shape[2])
    for mode in ("scatter", "gather"):
        result = streamed.saliency(image, reduce=None, mode=mode)
        assert not _differs(result.logits, logits)
        assert not _differs(result.numpy(), gradient)
        cut_up = stream(net, memory="1 GiB")
        found = cut_up.plan(image.shape, reduce=None, mode=mode)
        count = len(cut_up.network().nodes)
        edges = [0, *sorted({int(rng.integers(0, count + 1)) for _ in range(3)} | {count})]
        parts = tuple(
            SegmentPlan(
                a, b, *(tuple(int(n) for n in rng.integers(1, 1 + max(image.shape[1:]), 2)) for _ in range(2)), 0
            )
            for bound in [segments(cut_up.network().bind(image.shape[1:]), edges)]
            for a, b in [(s.start, s.stop) for s in bound]
        )
        made = replace(found, segments=parts, scratch_bytes=int(rng.integers(0, 2)) << 20)
        cut_up._planned = partial(_always, made)
        result = cut_up.saliency(image, reduce=None, mode=mode)
        assert not _differs(result.logits, logits)
        assert not _differs(result.numpy(), gradient)
        if mode == "scatter":
            _check_weights(net, image, cut_up)
    _check_weights(net, image, streamed)


def _check_weights(net, image, streamed):
    """Every parameter's gradient and the image's: cross-entropy (one sweep where it may) and a loss of another kind."""
    losses = (lambda z: F.cross_entropy(z, torch.tensor([1])), lambda z: (z * z).sum())
    for loss_fn in losses:
        net.zero_grad()
        x = image[None].clone().requires_grad_()
        loss = loss_fn(net(x))
        loss.backward()
        wanted = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        assert not _differs(streamed.backward(image, loss_fn), loss.detach())
        _same(net, wanted)
        into = np.empty(image.shape)
        streamed.backward(image, loss_fn, gradient=into)
        assert not _differs(into, x.grad[0])
        net.zero_grad()
        y = image.clone().requires_grad_()
        loss_fn(streamed(y)).backward()
        _same(net, wanted)
        assert not _differs(y.grad, x.grad[0])
    net.zero_grad()


def _same(net, wanted):
    scale = max([1e-30, *(w.abs().max().item() for w in wanted if w is not None)])
    for parameter, want in zip(net.parameters(), wanted, strict=True):
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (got - (0 if want is None else want)).abs().max() <= 1e-11 * scale


@pytest.fixture(scope="session")
def differs():
    """Whether two arrays differ by more than 1e-12 of the maximum."""
    return _differs


@pytest.fixture(scope="session")
def check_gradients():
    return _check_gradients
