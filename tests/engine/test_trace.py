import pytest
import torch
from torch import nn

from tilestream.engine import stream, trace
from tilestream.nets import resnet18


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def net_with(module: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), Block(module), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()


REFUSED = [
    nn.LayerNorm(7),
    nn.InstanceNorm2d(4, track_running_stats=True),
    nn.Upsample(scale_factor=2, mode="bicubic"),
    nn.PixelShuffle(2),
    nn.LPPool2d(2, 2),
    nn.BatchNorm2d(4, track_running_stats=False),
    nn.ConstantPad2d(1, 3.0),
    nn.MaxPool2d(2, return_indices=True),
    nn.AdaptiveAvgPool2d((None, 2)),
    nn.Flatten(),
    nn.Linear(7, 7),
]


@pytest.mark.parametrize("module", REFUSED, ids=lambda m: type(m).__name__)
def test_what_cannot_be_streamed_is_refused_by_path(module):
    with pytest.raises(ValueError, match=rf"^1\.inner: {type(module).__name__}: "):
        trace(net_with(module))


def refused(forward, match: str) -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool, self.fc = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)
            self.grid = nn.Parameter(torch.zeros(1, 4, 5, 5))

    Net.forward = forward
    with pytest.raises(ValueError, match=match):
        trace(Net().eval())


def test_functions_are_refused_by_name():
    def head(self, x):
        return self.fc(self.pool(x).flatten(1))

    refused(lambda self, x: head(self, torch.fft.fft2(self.conv(x)).abs()), "fft_fft2: cannot be streamed exactly")
    refused(lambda self, x: head(self, self.conv(x).cumsum(2)), "cumsum: cannot be streamed exactly")
    refused(lambda self, x: head(self, torch.softmax(self.conv(x), 3)), "softmax over dim=3; .* flatten")
    refused(lambda self, x: head(self, self.conv(x) + self.grid), r"meets a vector of shape \(1, 4, 5, 5\)")
    refused(lambda self, x: head(self, nn.functional.pad(self.conv(x), (1, 1), value=2)), "only zeros")
    refused(lambda self, x: head(self, self.conv(x)[:, :, 1:]), "channels can be cut out")
    refused(lambda self, x: head(self, torch.cat([self.conv(x)] * 2, 2)), "over channels")
    refused(lambda self, x: head(self, self.conv(x).mean(3, keepdim=True)), "reduces dim=3")
    refused(lambda self, x: head(self, nn.functional.dropout(self.conv(x))), "dropout.* random")
    refused(lambda self, x: head(self, self.conv(x) if x.mean() > 0 else x), "cannot be traced by torch.fx")
    refused(lambda self, x, y: head(self, self.conv(x)), "takes 2 inputs")


def test_results_that_are_no_logits_are_refused():
    refused(
        lambda self, x: (self.fc(self.pool(self.conv(x)).flatten(1)), 1),
        r"Net\.forward gives tuple; it must give logits alone",
    )
    refused(
        lambda self, x: (self.fc(self.pool(y := self.conv(x)).flatten(1)), y),
        "gives tuple; it must give logits alone, or one map",
    )
    refused(lambda self, x: self.fc(self.pool(self.conv(x)).flatten(1))[0], r"gives \(2,\); it must give logits")


def test_hooks_are_refused():
    net = resnet18().eval()
    handle = net.layer1[0].conv1.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r"^layer1\.0\.conv1: Conv2d: has hooks"):
        trace(net)
    handle.remove()
    net.avgpool.register_full_backward_hook(lambda module, inputs, outputs: None)
    with pytest.raises(ValueError, match=r"^avgpool: AdaptiveAvgPool2d: has hooks"):
        trace(net)
    head = net_with(nn.ReLU())
    assert trace(head).linear
    head[4].register_forward_hook(lambda module, inputs, output: output**2)
    assert not trace(head).linear


def test_dtypes_that_cannot_be_streamed_are_refused():
    with pytest.raises(ValueError, match=r"parameters are torch\.bfloat16; call net\.float\(\)"):
        trace(resnet18().eval().bfloat16())
    with pytest.raises(ValueError, match=r"parameters are torch\.float16; call net\.float\(\)"):
        trace(resnet18().eval().half())
    net = resnet18().eval()
    net.fc.double()
    with pytest.raises(ValueError, match=r"parameters are torch\.float32, torch\.float64"):
        trace(net)


def test_train_mode_is_refused_even_in_a_part():
    with pytest.raises(ValueError, match=r"train mode at \(root\)"):
        trace(resnet18())
    net = resnet18().eval()
    net.layer2[0].bn1.train()
    with pytest.raises(ValueError, match=r"train mode at layer2\.0\.bn1"):
        trace(net)


def test_batch_norm_folds_only_where_nobody_else_reads_the_convolution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.pool, self.fc = (
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.AdaptiveAvgPool2d(1),
                nn.Linear(4, 2),
            )

        def forward(self, x):
            y = self.conv(x)
            return self.fc(self.pool(self.bn(y) + y).flatten(1))

    net = Net().double().eval()
    nn.init.uniform_(net.bn.running_var, 0.5, 2)
    image = torch.randn(3, 20, 20, dtype=torch.float64)
    torch.testing.assert_close(stream(net, tile=4)(image), net(image[None]).detach(), rtol=0, atol=1e-12)
    assert [n.path for n in trace(net).nodes] == ["conv", "bn", ""]
    assert len([n for n in trace(resnet18().eval()).nodes if "bn" in n.path]) == 0


def test_the_users_network_is_left_as_it_was():
    net = resnet18().eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    stream(net, tile=64).saliency(torch.zeros(3, 64, 64))
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
