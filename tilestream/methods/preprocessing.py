"""Paper A's preprocessing (section 2.2): the training set's average image subtracted, then a joint stretch to [0, 1].

The average is kept as a small square. At full resolution it is read bilinearly, and the extremes of the stretch, one
minimum and one maximum over all three channels, come from an exact pass over the whole photograph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Pixels(Protocol):
    """A photograph that is read in windows, (3, H, W) uint8."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> Any: ...


@dataclass(frozen=True)
class Extremes:
    """Smallest and largest grey level of a photograph after subtraction, over all channels."""

    low: float
    high: float

    def stretch(self, values: Floats) -> Floats:
        """Maps [low, high] to [0, 1]; a photograph of one colour becomes 0."""
        return (values - np.float32(self.low)) / np.float32(self.high - self.low or np.inf)


def resize_square(square: npt.NDArray[np.uint8], size_px: int) -> npt.NDArray[np.uint8]:
    """(3, S, S) -> (3, size_px, size_px), each pixel the mean of the area it covers; size_px must not exceed S."""
    side = square.shape[-1]
    if size_px > side:
        raise ValueError(f"size_px={size_px} must be at most {side}, the side of the stored squares")
    if size_px == side:
        return square
    resized = cv2.resize(square.transpose(1, 2, 0), (size_px, size_px), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(resized.transpose(2, 0, 1))


def average_image(squares: Iterable[npt.NDArray[np.uint8]]) -> Floats:
    """The mean of squares, (3, S, S) in grey levels, summed in integers: exact, whatever the order."""
    total, count = None, 0
    for square in squares:
        total = square.astype(np.int64) if total is None else total + square
        count += 1
    if total is None:
        raise ValueError("the average image needs at least one photograph in the training split")
    return (total / count).astype(np.float32)


def normalise_square(square: npt.NDArray[np.uint8], average: Floats) -> Floats:
    """A squashed photograph, (3, S, S), as the network takes it: average subtracted, stretched to [0, 1]."""
    values = square.astype(np.float32) - average
    return Extremes(float(values.min()), float(values.max())).stretch(values)


class Subtracted:
    """A photograph minus the average image, (3, H, W) float32, computed window by window.

    Pixel i of an axis of n pixels lies at (i + 1/2) S / n - 1/2 on the average image, which is read bilinearly. Every
    pixel's value is the same whatever window it is read in.
    """

    def __init__(self, source: Pixels, average: Floats) -> None:
        if source.shape[0] != average.shape[0]:
            raise ValueError(f"the photograph has {source.shape[0]} channels, the average image {average.shape[0]}")
        self.source, self.average, self.shape = source, average, tuple(source.shape)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Floats:
        channels, ys, xs = index
        block = np.asarray(self.source[index]).astype(np.float32)
        block -= self._average(channels, range(*ys.indices(self.shape[1])), range(*xs.indices(self.shape[2])))
        return block

    def _average(self, channels: slice, ys: range, xs: range) -> Floats:
        top, bottom, wy = _bilinear(ys, self.shape[1], self.average.shape[1])
        left, right, wx = _bilinear(xs, self.shape[2], self.average.shape[2])
        first, last = top.min(initial=self.average.shape[1]), bottom.max(initial=0)
        average = self.average[channels, first : last + 1]
        columns: Floats = average[:, :, left] * (1 - wx) + average[:, :, right] * wx
        values: Floats = columns[:, top - first] * (1 - wy)[:, None] + columns[:, bottom - first] * wy[:, None]
        return values


class Normalised(Subtracted):
    """A photograph as the network takes it: average subtracted, stretched with its own extremes."""

    def __init__(self, source: Pixels, average: Floats, extremes: Extremes) -> None:
        super().__init__(source, average)
        self.extremes = extremes

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Floats:
        return self.extremes.stretch(super().__getitem__(index))


def extremes(source: Pixels, average: Floats, block_px: int = 1024) -> Extremes:
    """The exact extremes of a photograph after subtraction, read in square blocks, so in memory of no image's size."""
    subtracted = Subtracted(source, average)
    low, high = np.inf, -np.inf
    for y, x in product(range(0, source.shape[1], block_px), range(0, source.shape[2], block_px)):
        block = subtracted[:, y : y + block_px, x : x + block_px]
        low, high = min(low, float(block.min())), max(high, float(block.max()))
    return Extremes(low, high)


def _bilinear(positions: range, length: int, size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Floats]:
    """Both neighbours on the average image, and the weight of the second, for pixels of an axis of `length`."""
    at = (np.asarray(positions, np.float64) + 0.5) * size / length - 0.5
    at = np.clip(at, 0, size - 1)
    first = np.minimum(at.astype(np.intp), max(size - 2, 0))
    return first, np.minimum(first + 1, size - 1), (at - first).astype(np.float32)
