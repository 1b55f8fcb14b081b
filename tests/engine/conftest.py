"""Networks and the oracle for the engine's tests."""

import pytest
import torch
from torch import nn

from tilestream.nets import ResidualNet, resnet18


@pytest.fixture
def paper_net() -> nn.Module:
    """Paper A's network, narrow, in float64."""
    return _random_norms(ResidualNet(3, widths=(4, 6, 8, 8, 10))).double()


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
