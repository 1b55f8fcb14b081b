"""Every operation that can be streamed, and structures that people bring, against the un-tiled network in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilestream.engine import stream
from tilestream.engine.scratch import Bits, Scratch
from tilestream.geometry import Region


class Net(nn.Module):
    """A convolution, something with a map, a ReLU, a convolution, average pooling, a linear layer."""

    def __init__(self, function, channels=4, **modules):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        self.function, self.fc = function, nn.Linear(3, 2)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        x = self.last(self.function(self, self.first(x)))
        return self.fc(torch.relu(x).mean((2, 3)))


@pytest.fixture
def equal(whole, check_gradients):
    return lambda net: _equal(net, whole, check_gradients)


def _equal(net, whole, check_gradients, size=(23, 30), tile=24):
    torch.manual_seed(1)
    net = net.double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, (nn.GroupNorm, nn.InstanceNorm2d)) and module.weight is not None:
            nn.init.normal_(module.weight)
    image = torch.randn(3, *size, dtype=torch.float64)
    logits, gradient = whole(net, image, 1)
    check_gradients(net, image, stream(net, tile=tile), logits, gradient)


MODULES = [
    nn.PReLU(), nn.PReLU(4), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.2, inplace=True), nn.Sigmoid(),
    nn.Softplus(), nn.ELU(), nn.Softmax(dim=1), nn.Softmax2d(), nn.BatchNorm2d(4),
    nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 4, padding=3, dilation=2), nn.Conv2d(4, 4, (2, 5), (2, 1)),
    nn.Conv2d(4, 4, (4, 3), padding="same"), nn.Conv2d(4, 4, 3, 2, (0, 3)),
    nn.Conv2d(4, 4, 5, padding=2, padding_mode="reflect"), nn.Conv2d(4, 4, 5, padding=2, padding_mode="replicate"),
    nn.Conv2d(4, 4, 3, padding=(2, 1), padding_mode="circular"),
    nn.ConvTranspose2d(4, 4, 2, 2), nn.ConvTranspose2d(4, 4, 3, 2, 1, 1),
    nn.ConvTranspose2d(4, 4, 4, (1, 2), 1, groups=2),
    nn.ConvTranspose2d(4, 4, 3, 2, 2, dilation=2, bias=False),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d((3, 2), (1, 2), dilation=2),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), nn.AvgPool2d(3, divisor_override=5),
    nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.Upsample(scale_factor=(1.5, 2.3), mode="bilinear"), nn.Upsample(scale_factor=1.7),
    nn.Upsample(size=(31, 17), mode="bilinear", align_corners=True), nn.Upsample(size=(9, 70)),
    nn.ZeroPad2d((1, 2, 3, 0)), nn.ReflectionPad2d((3, 2, 1, 4)), nn.ReplicationPad2d(2),
    nn.CircularPad2d((1, 2, 3, 4)),
    nn.ZeroPad2d((-1, 2, -3, 0)),
    nn.GroupNorm(2, 4), nn.GroupNorm(4, 4), nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, affine=True),
    nn.GroupNorm(1, 4, affine=False),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("module", MODULES, ids=str)
def test_modules(module, equal):
    equal(Net(lambda net, x: net.inner(x), inner=module))


FUNCTIONS = {
    "constants": lambda net, x: 1 - (2 * x + 1) / 3 - 0.5,
    "products": lambda net, x: x * torch.sigmoid(x) - x / (1 + x.abs()),
    "powers": lambda net, x: torch.sqrt(x**2 + 1) + torch.exp(-x).clamp(max=3),
    "in place": lambda net, x: x.mul_(0.5).add_(1).sigmoid_(),
    "a channel's mean": lambda net, x: x - x.mean(1, keepdim=True),
    "cut and joined": lambda net, x: torch.cat([F.relu(x[:, 2:]), x[:, :2]], 1),
    "chunks": lambda net, x: torch.cat([b * a for a, b in [torch.chunk(x, 2, 1)]] * 2, 1),
    "squeeze and excitation": lambda net, x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1) * 2),
    "excitation by the maximum": lambda net, x: x * torch.tanh(x.amax((2, 3), keepdim=True)),
    "excitation of shape": lambda net, x: x * x.mean((2, 3)).view(x.shape[0], x.size(1), 1, 1),
    "standardised": lambda net, x: (x - x.mean((2, 3), keepdim=True)) / (1 + x.mean([2, 3], True).abs()),
    "a shape": lambda net, x: F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:], mode="bilinear") + x,
    "a shape of a map that is used for nothing else": lambda net, x: F.interpolate(
        x, size=(F.max_pool2d(x, 2) * x.mean((2, 3), keepdim=True)).shape[2:]
    ),
    "padded to even": lambda net, x: F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)),
    "softmax over positions": lambda net, x: torch.softmax(x.flatten(2), -1).view(x.shape) * 100,
    "parameters": lambda net, x: x * net.scale + net.shift,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, equal):
    shift = {"scale": nn.Parameter(torch.randn(1, 4, 1, 1)), "shift": nn.Parameter(torch.randn(4, 1, 1))}
    equal(Net(FUNCTIONS[name], **shift))


class Headed(nn.Module):
    """A convolution or two and a head of any kind over their map."""

    def __init__(self, head, width, **modules):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.score, self.head, self.fc = nn.Conv2d(4, 1, 1), head, nn.Linear(width, 2)

    def forward(self, x):
        return self.fc(self.head(self, self.body(x)))


HEADS = {
    "average 3 x 2": (lambda net, x: F.adaptive_avg_pool2d(x, (3, 2)).flatten(1), 24),
    "maximum 2 x 2": (lambda net, x: F.adaptive_max_pool2d(x, 2).flatten(1), 16),
    "power mean": (lambda net, x: x.clamp(min=1e-2).pow(3).mean((2, 3)).pow(1 / 3), 4),
    "sum": (lambda net, x: x.sum((2, 3)) * 0.01, 4),
    "flat mean and maximum": (lambda net, x: torch.cat([x.flatten(2).mean(-1), x.flatten(2).amax(2)], 1), 8),
    "attention": (lambda net, x: (x.flatten(2) * torch.softmax(net.score(x).flatten(2), -1)).sum(-1), 4),
    "attention by view": (
        lambda net, x: (x.view(x.size(0), 4, -1) * F.softmax(net.score(x).view(1, 1, -1), dim=2)).sum(2), 4
    ),
    "two levels": (lambda net, x: (x * torch.sigmoid(x.mean((2, 3), keepdim=True))).amax((2, 3)), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads(name, equal):
    equal(Headed(*HEADS[name]))


class UNet(nn.Module):
    """Two levels, down by pooling, up by transposed convolution or bilinearly, skips concatenated, any size."""

    def __init__(self, transposed):
        super().__init__()
        block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))  # noqa: E731
        self.down1, self.down2, self.bottom = block(3, 4), block(4, 6), block(6, 8)
        self.up2, self.up1 = nn.ConvTranspose2d(8, 6, 2, 2), nn.ConvTranspose2d(6, 4, 2, 2)
        self.join2, self.join1, self.last = (
            block(12 if transposed else 14, 6),
            block(8 if transposed else 10, 4),
            nn.Conv2d(4, 2, 1),
        )
        self.transposed = transposed

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        d = self.join2(torch.cat([self._up(self.up2, c, b), b], 1))
        return self.last(self.join1(torch.cat([self._up(self.up1, d, a), a], 1)))

    def _up(self, up, x, like):
        if not self.transposed:
            return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
        x = up(x)
        return F.pad(x, (0, like.shape[3] - x.shape[3], 0, like.shape[2] - x.shape[2]))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("tile", [4, 12])
def test_maps_as_results(transposed, tile, differs):
    torch.manual_seed(0)
    net, image = UNet(transposed).double().eval(), torch.randn(3, 21, 26, dtype=torch.float64)
    x = image[None].clone().requires_grad_()
    result = net(x)
    upstream = torch.randn_like(result)
    (gradient,) = torch.autograd.grad(result, x, upstream)
    streamed = stream(net, tile=tile)
    assert not differs(streamed(image).detach(), result.detach())
    for mode in ("scatter", "gather"):
        got = streamed.saliency(image, upstream=upstream[0], reduce=None, mode=mode)
        assert not differs(got.numpy(), gradient[0])
    target = torch.randn_like(result)
    loss = F.mse_loss(net(image[None]), target)
    loss.backward()
    wanted = [p.grad.clone() if p.grad is not None else None for p in net.parameters()]
    net.zero_grad()
    assert not differs(streamed.backward(image, lambda z: F.mse_loss(z, target)), loss.detach())
    for parameter, want in zip(net.parameters(), wanted, strict=True):
        if want is not None:
            assert not differs(parameter.grad, want)


class Guided(torch.autograd.Function):
    """ReLU as guided back-propagation and the deconvolution network have it: the oracle."""

    @staticmethod
    def forward(ctx, x, deconv):
        ctx.save_for_backward(x)
        ctx.deconv = deconv
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        g = g.clamp(min=0)
        return (g if ctx.deconv else g * (x > 0)), None


@pytest.mark.parametrize("method", ["guided", "deconv"])
def test_guided_and_deconvolution(method, small_resnet18, monkeypatch, differs):
    net, image = small_resnet18, torch.randn(3, 90, 121, dtype=torch.float64)
    got = [stream(net, tile=tile).saliency(image, method=method, reduce=None) for tile in (32, 64)]
    got.append(stream(net, memory="300 MiB").saliency(image, method=method, reduce=None))
    with pytest.raises(ValueError, match="use mode='gather'"):
        stream(net, tile=32).saliency(image, method=method, mode="scatter")
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: Guided.apply(x, method == "deconv"))
    x = image[None].clone().requires_grad_()
    (want,) = torch.autograd.grad(net(x)[0, 1], x)
    for result in got:
        assert not differs(result.numpy(), want[0])


def test_batches_add_up(small_resnet18, differs):
    net, images = small_resnet18, torch.randn(3, 3, 65, 70, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1])
    loss_fn = lambda z: F.cross_entropy(z, labels)  # noqa: E731
    loss = loss_fn(net(images))
    wanted = torch.autograd.grad(loss, list(net.parameters()))
    streamed = stream(net, tile=32)
    for run in (lambda: streamed.backward(images, loss_fn), lambda: loss_fn(streamed(images)).backward()):
        net.zero_grad()
        run()
        for parameter, want in zip(net.parameters(), wanted, strict=True):
            assert not differs(parameter.grad, want)


@pytest.mark.parametrize("classes", [1, 2])
def test_one_sweep_where_the_gradient_is_known_but_for_a_factor(classes, differs):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
    net, images = net.double().eval(), torch.randn(2, 3, 20, 22, dtype=torch.float64)
    reads = []

    class Counted:
        shape = images.shape

        def __getitem__(self, index):
            reads.append(index)
            return images[index]

    known = (lambda z: F.cross_entropy(z, torch.tensor([1, 0]))) if classes == 2 else (lambda z: z.square().sum())
    other = lambda z: (z**3).sum()  # noqa: E731
    for loss_fn, sweeps in ((known, 1), (other, 1 if classes == 1 else 3)):
        wanted = torch.autograd.grad(loss_fn(net(images)), list(net.parameters()))
        net.zero_grad()
        reads.clear()
        stream(net, tile=100).backward(Counted(), loss_fn)
        assert len(reads) == 2 * sweeps
        for parameter, want in zip(net.parameters(), wanted, strict=True):
            assert not differs(parameter.grad, want)


ADDITIONS = {
    "twice": lambda net, x: (y := net.inner(x)) + y,
    "pooled besides": lambda net, x: (y := net.inner(x)) + x * y.mean((2, 3), keepdim=True),
    "kept by a tape": lambda net, x: F.gelu(y := net.inner(x)) + y,
    "read again": lambda net, x: (y := net.inner(x)) - x + net.tall(y),
    "a part of a larger map": lambda net, x: net.tall(y := net.inner(x)) + y,
    "the first a part": lambda net, x: (y := net.inner(x)) + net.tall(y),
    "a view": lambda net, x: (y := net.inner(x)).chunk(2, 1)[0] + torch.relu(y.chunk(2, 1)[1]),
    "overwritten by the code": lambda net, x: net.inner(x).add_(x),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_additions_overwrite_only_what_nobody_else_reads(equal, name):
    tall = nn.Conv2d(4, 4, (3, 1), padding=(2, 0), dilation=(2, 1))
    channels = 2 if name == "a view" else 4
    equal(Net(ADDITIONS[name], channels, inner=nn.Conv2d(4, 4, 1), tall=tall))


@pytest.mark.parametrize("memory", [0, 2**20])
@pytest.mark.parametrize("channels", [3, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signs_are_stored_by_bands(monkeypatch, memory, channels, dtype):
    monkeypatch.setattr("tilestream.engine.scratch.BAND_BYTES", 100)
    bits = Bits(Scratch(memory), channels, (9, 11), torch.device("cpu"))
    values = torch.randn(1, channels, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    values[0, 0, 0, :3] = torch.tensor([0.0, -0.0, float("nan")])
    bits.write(Region(3, 8, 2, 9), values)
    assert torch.equal(bits.read(Region(3, 8, 2, 9)), values > 0)
    assert not bits.read(Region(0, 3, 0, 11)).any()
