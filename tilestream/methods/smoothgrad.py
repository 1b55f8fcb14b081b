"""SmoothGrad (Smilkov et al. 2017): the mean gradient over noisy copies of an image.

The noise of a pixel follows from the seed, the sample and the pixel alone, so that tiles agree wherever they overlap,
however the image is cut: a counter-based generator, evaluated at each pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_BLOCK = 1 << 16
"""Pixels at a time: what Philox needs in between stays in the processor's cache, and small."""


@dataclass(frozen=True)
class Noise:
    """How many noisy copies, the noise's standard deviation in the input's units, and the seed."""

    samples: int
    sigma: float
    seed: int = 0


class Source(Protocol):
    """An image that is read in windows, (C, H, W)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> Any: ...


class Noisy:
    """One noisy copy of an image, (C, H, W) float32, computed window by window; `sample` is its number."""

    def __init__(self, source: Source, noise: Noise, sample: int) -> None:
        self.source, self.noise, self.sample, self.shape = source, noise, sample, tuple(source.shape)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Floats:
        channels, ys, xs = (range(*each.indices(n)) for each, n in zip(index, self.shape, strict=True))
        block = np.array(self.source[index], np.float32)
        rows = max(1, _BLOCK // max(1, len(xs)))
        for start in range(0, len(ys), rows):
            part = ys[start : start + rows]
            drawn = normal(self.noise.seed, self.sample, channels, part, xs)
            block[:, start : start + rows] += np.float32(self.noise.sigma) * drawn
        return block


def normal(seed: int, sample: int, channels: range, ys: range, xs: range) -> Floats:
    """Standard normal noise at pixels of an image, (c, h, w) float32; the same for a pixel whatever else is asked for.

    16 random bits choose one of 65,536 quantiles, so no value is beyond 4.33, and no bit depends on how a processor
    computes logarithms.
    """
    values = np.empty((len(channels), len(ys), len(xs)), np.float32)
    y, x = np.asarray(ys, np.uint64)[:, None], np.asarray(xs, np.uint64)
    words: tuple[Words, ...] = ()
    for number, channel in enumerate(channels):  # 128 bits serve eight channels
        if number == 0 or channel % 8 == 0:
            words = philox((x, y, np.uint64(sample), np.uint64(channel // 8)), (seed & 0xFFFFFFFF, seed >> 32))
        bits = words[channel % 8 // 2] >> np.uint64(16 * (channel % 2)) & np.uint64(0xFFFF)
        values[number] = _quantiles()[bits]
    return values


@lru_cache(maxsize=1)
def _quantiles() -> Floats:
    quantiles: Floats = ndtri((np.arange(65536) + 0.5) / 65536).astype(np.float32)
    return quantiles


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 (Salmon et al. 2011): four random words of 32 bits for each counter of four, which broadcast.

    Words are held in uint64.
    """
    a, b, c, d = (np.asarray(each, np.uint64) for each in counter)
    low, high = key
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (
            second >> _HALF ^ b ^ np.uint64(low),
            second & _LOW,
            first >> _HALF ^ d ^ np.uint64(high),
            first & _LOW,
        )
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d
