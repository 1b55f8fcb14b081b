"""Paper B's networks (Costa and Campilho 2017, section 3.2): U codes instances as visual words, D decides on a bag.

A bag is a photograph: its descriptors, or all its patches, over which U runs fully convolutionally.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOLINGS = ("max", "mean", "sum")


class WordNet(nn.Module):
    """U on descriptors: linear layer, batch norm, ReLU, dropout, linear layer, softmax over words.

    Takes bags (N, n, features), where rows of NaN stand for descriptors that a bag has not; gives p(word | descriptor),
    (N, words, n, 1), 0 for those. A batch of a single descriptor or none takes batch norm's running statistics.
    """

    def __init__(self, words: int = 100, hidden: int = 256, dropout: float = 0.3, features: int = 128) -> None:
        super().__init__()
        self.words = words
        self.hidden, self.norm = nn.Linear(features, hidden), nn.BatchNorm1d(hidden)
        self.dropout, self.code = nn.Dropout(dropout), nn.Linear(hidden, words)

    def forward(self, x: Tensor) -> Tensor:
        there = ~x[..., 0].isnan()
        rows, norm = self.hidden(x[there]), self.norm
        if norm.training and len(rows) < 2:
            rows = F.batch_norm(rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            rows = norm(rows)
        codes = self.code(self.dropout(rows.relu())).softmax(1)
        words: Tensor = codes.new_zeros(*there.shape, self.words)
        words[there] = codes
        return words.transpose(1, 2)[..., None]


class ImageWordNet(nn.Module):
    """U on images: a 3x3 convolution, batch norm, ReLU and 2x2 max pooling for each of `widths`; a k x k convolution of
    `hidden` channels, batch norm and ReLU over what is left of a patch; dropout, 1x1 convolution, softmax over words.

    Takes (N, in_channels, H, W) of any size from `patch_px` up, gives p(word | patch), (N, words, h, w): position
    (i, j) is the patch of side `patch_px` that begins at pixel (s i, s j), s = 2^len(widths). No layer pads, so a patch
    alone has the same words. `patch_px` is (k + 2) s - 2: 46, 62 or 78 for s = 16.
    """

    def __init__(
        self, words: int = 100, hidden: int = 256, dropout: float = 0.3, patch_px: int = 46,
        widths: Sequence[int] = (16, 32, 64, 128), in_channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        stride = 2 ** len(widths)
        k = (patch_px + 2) // stride - 2
        if k < 1 or (k + 2) * stride - 2 != patch_px:
            fits = (max(k, 1) + 2) * stride - 2
            raise ValueError(
                f"patch_px={patch_px} must be a multiple of {stride} less 2, from {3 * stride - 2}; use {fits}"
            )
        layers: list[nn.Module] = []
        for source, width in zip([in_channels, *widths], widths):  # noqa: B905 (pairs)
            layers += [nn.Conv2d(source, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(widths[-1], hidden, k, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(hidden, words, 1), nn.Softmax(1))

    def forward(self, x: Tensor) -> Tensor:
        words: Tensor = self.layers(x)
        return words


class ConvBoVW(nn.Module):
    """U on every instance, each word pooled over the bag, and D, one linear layer: logits (N, num_classes).

    `coding` are the arguments of U: of `WordNet` for descriptors, of `ImageWordNet` for images. Pooling takes the
    maximum, the mean or the sum over a bag's instances; of a bag without any all are 0: no word is there. Equal maxima
    are one: the gradient goes to the first, as `F.adaptive_max_pool2d` and the engine have it.
    """

    def __init__(
        self, instances: Literal["descriptors", "images"] = "descriptors", words: int = 100, pooling: str = "max",
        num_classes: int = 2, **coding: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        kinds: dict[str, type[nn.Module]] = {"descriptors": WordNet, "images": ImageWordNet}
        if pooling not in POOLINGS or instances not in kinds:
            raise ValueError(f"pooling={pooling!r} must be one of {POOLINGS}, instances={instances!r} of {(*kinds,)}")
        self.pooling = pooling
        self.coding = kinds[instances](words=words, **coding)
        self.classifier = nn.Linear(words, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        words = self.coding(x)
        z = torch.flatten(F.adaptive_max_pool2d(words, 1), 1) if self.pooling == "max" else words.sum((2, 3))
        if self.pooling == "mean":  # an instance's words sum to 1, so all of them to the number of instances
            z = z / z.sum(1, keepdim=True).clamp(min=1)
        logits: Tensor = self.classifier(z)
        return logits
