"""Network surgery against the network that was operated on, window by window."""

import pytest
import torch
from torch import nn

import tilestream as ts
from tilestream.nets import ResidualNet, resnet18, resnet34, resnet50
from tilestream.nets.surgery import fully_convolutional


def random(net: nn.Module) -> nn.Module:
    """In float64, batch norm as after training: nothing is at its initial value."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.3), (module.running_var, 0.7), (module.bias, -0.3)):
                nn.init.uniform_(tensor, low, low + 0.6)
    return net.double().eval()


def small(k: int | None, pool: type[nn.Module] = nn.AdaptiveAvgPool2d, padding: int = 0) -> nn.Module:
    """Windows of 20 px give maps of 4 x 4, a position every 5 px; the head sees k x k of it, or all without pooling."""
    head = [] if k is None else [pool(k)]
    side = 4 if k is None else k
    tail = [nn.Linear(6 * side * side, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 3)]
    body = [nn.Conv2d(3, 5, 5, 5, bias=False), nn.ReLU(), nn.Conv2d(5, 6, 1 + 2 * padding, padding=padding)]
    return random(nn.Sequential(*body, *head, nn.Flatten(), *tail))


MAKE = {
    "paper": lambda: ResidualNet(3, (4, 4, 6, 8, 8)),
    "local average": lambda: ResidualNet(3, (4, 4, 6, 8, 8), local_average_px=7),
    "18": resnet18,
    "34": resnet34,
    "50": resnet50,
}


@pytest.mark.parametrize("name", MAKE)
def test_on_one_window_the_logits_are_the_networks(name):
    net = random(MAKE[name]())
    windows = fully_convolutional(net, 128)
    assert (windows.window_px, windows.stride_px) == (128, 32 if name.isdigit() else 64)
    x = torch.rand(2, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        found = windows(x)
    assert found.shape == (2, expected.shape[1], 1, 1)
    torch.testing.assert_close(found[:, :, 0, 0], expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
@pytest.mark.parametrize("k", [None, 1, 2, 4])
def test_without_padding_every_window_is_the_network_on_it_alone(k, pool):
    net = small(k, pool)
    windows = fully_convolutional(net, 20)
    assert windows.stride_px == 5
    x = torch.rand(1, 3, 43, 52, dtype=torch.float64)
    with torch.no_grad():
        found = windows(x)
        assert found.shape == (1, 3, 5, 7)
        for i in range(5):
            for j in range(7):
                alone = net(x[:, :, 5 * i : 5 * i + 20, 5 * j : 5 * j + 20])
                torch.testing.assert_close(found[:, :, i, j], alone, rtol=0, atol=1e-12)


def test_with_padding_lone_windows_differ_inside_a_photograph():
    net = small(2, padding=1)
    x = torch.rand(1, 3, 60, 60, dtype=torch.float64)
    with torch.no_grad():
        found, alone = fully_convolutional(net, 20)(x)[:, :, 4, 4], net(x[:, :, 20:40, 20:40])
    assert (found - alone).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(300, 270), (128, 431)])
def test_streamed_over_a_photograph_it_is_the_uncut_network(size):
    windows = fully_convolutional(random(ResidualNet(2, (4, 4, 6, 8, 8))), 128)
    x = torch.rand(3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = windows(x[None])
        found = ts.stream(windows, tile=128)(x)
    assert found.shape == expected.shape == (1, 2, *(-(-n // 64) - 1 for n in size))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_weights_are_copies_and_the_network_stays_as_it_was():
    net = small(2).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    windows = fully_convolutional(net, 20)
    assert net.training
    assert not windows.training
    for value in windows.state_dict().values():
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


class Branching(Reshaped):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("net", "window_px", "words"),
    [
        (Reshaped(), 20, "net=Reshaped: its head must be .*flatten, Linear"),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 20, "its head must be"),
        (small(1), 21, "window_px=21 gives a map of 4 x 4"),
        (ResidualNet(2, (4, 4)), 100, "use a multiple of 8"),
        (ResidualNet(2, (4, 4, 4, 4, 4)), 50, "window_px=50 gives a map of 1 x 1.* use a multiple of 64"),
        (small(3), 20, "pooling to 3 x 3"),
        (nn.Sequential(nn.Conv2d(3, 2, 5), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(4, 2)), 20, "k x k"),
        (small(1), 3, "a window of 3 px does not fit"),
        (Branching(), 20, "net=Branching cannot be traced"),
        (nn.Sequential(nn.Conv2d(3, 2, 5, 5), nn.Flatten(), nn.Linear(18, 2)), 20, "takes 18 values.* 2 x 4 x 4"),
    ],
)  # fmt: skip
def test_other_heads_and_windows_are_refused(net, window_px, words):
    with pytest.raises(ValueError, match=words):
        fully_convolutional(net, window_px)
