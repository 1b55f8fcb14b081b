"""Networks built as torchvision and timm build them, small: they trace, and equal the un-tiled network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilestream.engine import stream


def conv_norm(cin, cout, kernel=3, stride=1, groups=1, act=nn.ReLU):
    steps = [nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(cout)]
    return nn.Sequential(*steps, act(inplace=True) if act else nn.Identity())


class InvertedResidual(nn.Module):
    """MobileNetV2."""

    def __init__(self, cin, cout, stride, expand, act=nn.ReLU6, squeeze=False):
        super().__init__()
        wide = cin * expand
        self.use_res_connect = stride == 1 and cin == cout
        steps = [conv_norm(cin, wide, 1, act=act), conv_norm(wide, wide, 3, stride, wide, act)]
        self.conv = nn.Sequential(
            *steps, *([SqueezeExcite(wide)] if squeeze else []), conv_norm(wide, cout, 1, act=None)
        )

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class SqueezeExcite(nn.Module):
    """As in torchvision's MobileNetV3 and EfficientNet."""

    def __init__(self, channels):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, channels, 1)
        self.activation, self.scale_activation = nn.SiLU(), nn.Hardsigmoid()

    def forward(self, x):
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class Classifier(nn.Module):
    """Features, a mean over positions as torchvision writes it, a head."""

    def __init__(self, features, width, classes=3):
        super().__init__()
        self.features, self.classifier = features, nn.Sequential(nn.Dropout(0.2), nn.Linear(width, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


class DenseBlock(nn.Module):
    """DenseNet: each layer reads all before it."""

    def __init__(self, cin, growth, count):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(cin + i * growth), nn.ReLU(), nn.Conv2d(cin + i * growth, growth, 3, padding=1)
            )
            for i in range(count)
        )

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Inception(nn.Module):
    """Branches of asymmetric kernels, and average pooling with padding."""

    def __init__(self, cin):
        super().__init__()
        self.b1 = conv_norm(cin, 3, 1)
        self.b2 = nn.Sequential(
            conv_norm(cin, 3, 1), nn.Conv2d(3, 4, (1, 7), padding=(0, 3)), nn.Conv2d(4, 4, (7, 1), padding=(3, 0))
        )
        self.b3 = conv_norm(cin, 2, 1)

    def forward(self, x):
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        return torch.cat([self.b1(x), self.b2(x), self.b3(pooled)], 1)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half of the channels pass, then all are shuffled."""

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_norm(half, half, 1), conv_norm(half, half, 3, 1, half, None), conv_norm(half, half, 1)
        )

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        x = torch.cat((a, self.branch(b)), dim=1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Vgg(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(True),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(6, 5, 3, padding=1),
            nn.ReLU(True),
            nn.MaxPool2d(2, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(nn.Linear(5 * 49, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 2))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Aspp(nn.Module):
    """DeepLabV3: dilated branches, and one that is pooled over the whole image and spread again."""

    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3, 6, 3, 2)
        self.branches = nn.ModuleList(
            [nn.Conv2d(6, 4, 1), *(nn.Conv2d(6, 4, 3, padding=d, dilation=d) for d in (2, 4))]
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1), nn.ReLU())
        self.project = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        size = x.shape[-2:]
        x = self.stem(x)
        pooled = F.interpolate(self.pooled(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        x = self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Fpn(nn.Module):
    """A feature pyramid's top-down way."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([conv_norm(3, 4, 3, 2), conv_norm(4, 6, 3, 2), conv_norm(6, 8, 3, 2)])
        self.side = nn.ModuleList([nn.Conv2d(c, 5, 1) for c in (4, 6, 8)])
        self.head = nn.Conv2d(5, 2, 3, padding=1)

    def forward(self, x):
        maps = []
        for down in self.down:
            x = down(x)
            maps.append(x)
        x = self.side[2](maps[2])
        for i in (1, 0):
            x = self.side[i](maps[i]) + F.interpolate(x, size=maps[i].shape[-2:], mode="nearest")
        return self.head(x)


class LayerNorm2d(nn.LayerNorm):
    """torchvision's: over channels."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.rand(channels))

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class GeM(nn.Module):
    """Generalised mean pooling."""

    def __init__(self):
        super().__init__()
        self.features, self.p, self.fc = conv_norm(3, 6, 3, 2), nn.Parameter(torch.tensor(3.0)), nn.Linear(6, 2)

    def forward(self, x):
        x = self.features(x)
        x = F.avg_pool2d(x.clamp(min=1e-6).pow(self.p), (x.size(-2), x.size(-1))).pow(1.0 / self.p)
        return self.fc(x.flatten(1))


NETS = {
    "MobileNetV2": lambda: Classifier(
        nn.Sequential(conv_norm(3, 4, 3, 2, act=nn.ReLU6), InvertedResidual(4, 4, 1, 2), InvertedResidual(4, 6, 2, 3)),
        6,
    ),
    "MobileNetV3": lambda: Classifier(
        nn.Sequential(conv_norm(3, 4, 3, 2, act=nn.Hardswish), InvertedResidual(4, 4, 1, 2, nn.Hardswish, True)), 4
    ),
    "EfficientNet": lambda: Classifier(
        nn.Sequential(
            conv_norm(3, 4, 3, 2, act=nn.SiLU),
            InvertedResidual(4, 6, 2, 2, nn.SiLU, True),
            InvertedResidual(6, 6, 1, 2, nn.SiLU, True),
        ),
        6,
    ),
    "DenseNet": lambda: Classifier(
        nn.Sequential(
            nn.Conv2d(3, 4, 7, 2, 3, bias=False),
            nn.MaxPool2d(3, 2, 1),
            DenseBlock(4, 3, 3),
            nn.Conv2d(13, 6, 1),
            nn.AvgPool2d(2, 2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
        ),
        6,
    ),
    "Inception": lambda: Classifier(nn.Sequential(conv_norm(3, 5, 3, 2), nn.MaxPool2d(3, 2), Inception(5)), 9),
    "ShuffleNetV2": lambda: Classifier(nn.Sequential(conv_norm(3, 8, 3, 2), ShuffleUnit(8), ShuffleUnit(8)), 8),
    "VGG": Vgg,
    "FPN": Fpn,
    "ConvNeXt": lambda: Classifier(
        nn.Sequential(nn.Conv2d(3, 6, 4, 4), LayerNorm2d(6), ConvNeXtBlock(6), nn.Conv2d(6, 8, 2, 2)), 8
    ),
    "GeM": GeM,
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("tile", [16, 48])
def test_structures(name, tile, differs):
    torch.manual_seed(0)
    net = NETS[name]().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    image = torch.randn(1, 3, 81, 103, dtype=torch.float64)
    x = image.clone().requires_grad_()
    want = net(x)
    upstream = torch.randn_like(want)
    gradients = torch.autograd.grad(want, [x, *net.parameters()], upstream)
    streamed = stream(net, tile=tile)
    y = image.clone().requires_grad_()
    got = streamed(y)
    assert not differs(got, want)
    back = torch.autograd.grad(got, [y, *net.parameters()], upstream)
    assert all(not differs(a, b) for a, b in zip(back, gradients, strict=True))


def test_a_branch_pooled_over_the_whole_image_is_refused():
    with pytest.raises(ValueError, match="cat: joins a map and a vector, pooled over the whole image"):
        stream(Aspp().eval())


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda x: x.permute(0, 3, 1, 2), "only channels last"),
        (lambda x: x.permute(0, 2, 3, 1).mean(-1), "permute it back first"),
        (lambda x: x + x.permute(0, 2, 3, 1), "different arrangements"),
        (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (5, 4)), "only channels"),
        (lambda x: torch.relu(x.view(x.size(0), 2, 2, x.size(2), x.size(3))), "join them first"),
        (lambda x: F.avg_pool2d(x, x.size(2) // 2), "only that of the whole map"),
    ],
)
def test_arrangements_that_cannot_be_streamed(forward, why):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(forward(self.first(x)).mean((2, 3)))

    with pytest.raises(ValueError, match=why):
        stream(Net().eval(), tile=8).plan((3, 20, 20))
