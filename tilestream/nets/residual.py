"""The residual network of paper A (Grzeszczuk 2019, section 2.1 and Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions, each followed by batch norm, around a skip connection.

    Where the block shrinks the map by 2, the skip is MaxPool2d(3, 2, 1), so that sizes agree whatever they are; new
    channels of the skip are zeros.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        if channels_out < channels_in:
            raise ValueError(
                f"channels_out={channels_out} must be at least channels_in={channels_in}: "
                "the skip adds channels, it drops none"
            )
        self.extra = channels_out - channels_in
        self.conv1, self.bn1 = _convolution(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out)
        self.conv2, self.bn2 = _convolution(channels_out, channels_out, 1), nn.BatchNorm2d(channels_out)
        self.conv3, self.bn3 = _convolution(channels_out, channels_out, 1), nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.skip = nn.MaxPool2d(3, 2, 1) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels_out, ceil(H / stride), ceil(W / stride))."""
        skip = self.skip(x)
        if self.extra:
            skip = F.pad(skip, (0, 0, 0, 0, 0, self.extra))
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)) + skip)
        return x


class LocalAverageSubtraction(nn.Module):
    """Every pixel less the mean of the square of odd side `size_px` about it, of what lies inside the image.

    What is smaller than the square stays, colour and shading go (B. Graham 2015, Kaggle diabetic retinopathy
    detection competition report, with a square for his Gaussian).
    """

    def __init__(self, size_px: int) -> None:
        super().__init__()
        if size_px % 2 == 0 or not 3 <= size_px < 1000:
            raise ValueError(f"size_px={size_px} of the local average must be odd, at least 3 and below 1000")
        margin = size_px // 2
        self.columns = nn.AvgPool2d((size_px, 1), 1, (margin, 0), count_include_pad=False)
        self.rows = nn.AvgPool2d((1, size_px), 1, (0, margin), count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        average: Tensor = self.rows(self.columns(x))
        return x - average


class ResidualNet(nn.Module):
    """Paper A's network: a 7x7 stem of stride 2, a residual segment for each of `widths`, pooling, one linear layer.

    The first block of each segment has stride 2, so five segments give a total stride of 64. `blocks` says how many
    blocks a segment holds. Takes (N, in_channels, H, W) of any size from one window up, gives logits (N, num_classes).
    Beyond the paper, `local_average_px` puts a LocalAverageSubtraction of that side first; 0 does not.
    """

    def __init__(
        self,
        num_classes: int = 2,
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        blocks: int = 1,
        in_channels: int = 3,
        local_average_px: int = 0,
    ) -> None:
        super().__init__()
        if type(local_average_px) is not int:
            raise ValueError(f"local_average_px={local_average_px!r} must be an odd whole number, or 0 for none")
        if not widths or blocks < 1:
            raise ValueError(f"widths={widths} must not be empty and blocks={blocks} must be at least 1")
        self.detail = LocalAverageSubtraction(local_average_px) if local_average_px else None
        self.stem = nn.Conv2d(in_channels, widths[0], 7, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        sources = [widths[0], *widths[:-1]]
        self.segments = nn.Sequential(
            *(
                nn.Sequential(*(ResidualBlock(a if i == 0 else b, b, 2 if i == 0 else 1) for i in range(blocks)))
                for a, b in zip(sources, widths, strict=True)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        if self.detail is not None:
            x = self.detail(x)
        x = self.relu(self.bn(self.stem(x)))
        x = self.fc(torch.flatten(self.pool(self.segments(x)), 1))
        return x


def _convolution(channels_in: int, channels_out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
