"""The sliding window (paper A, Listing 1, lines 20-23): a probability for each window, and their histogram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tilestream.engine import Source, Streamed
from tilestream.geometry import Region
from tilestream.nets import SlidingWindow

from .centres import Border

BINS = 20


@dataclass(frozen=True)
class Window:
    """A window by its centre in px of the photograph, and its probability."""

    y_px: int
    x_px: int
    probability: float


def probability_map(streamed: Streamed, image: Source, target: int = 1) -> npt.NDArray[np.float64]:
    """Probability of class `target` in each window of a photograph, (h, w) float64.

    `streamed` is `ts.stream(fully_convolutional(net))`, `image` (C, H, W) as the network takes it. A side shorter than
    the window is filled up with zeros, as crops are.
    """
    net = streamed.net
    if not isinstance(net, SlidingWindow):
        raise ValueError(f"{type(net).__name__} gives no map of windows; stream fully_convolutional(net) instead")
    with torch.no_grad():
        logits: Tensor = streamed(Padded(image, net.window_px))
    if not 0 <= target < logits.shape[1]:
        raise ValueError(f"target={target} must be in [0, {logits.shape[1]}), the classes of the network")
    return torch.softmax(logits[0].double(), dim=0)[target].cpu().numpy()


def histogram(probabilities: npt.ArrayLike, bins: int = BINS) -> npt.NDArray[np.float64]:
    """Shares of windows in equal bins over [0, 1], (bins,), summing to 1; the last bin holds 1 itself.

    ValueError for no window, NaN, or what is no probability.
    """
    values = np.asarray(probabilities, np.float64).ravel()
    if not values.size or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"probabilities must be at least one number in [0, 1], got {values.size}, {values[:3]}")
    counts, _ = np.histogram(values, bins, (0.0, 1.0))
    return counts / values.size


def highest_window(
    probabilities: npt.NDArray[np.floating[Any]], net: SlidingWindow, rules: Sequence[Border] = ()
) -> Window:
    """The window of the highest probability whose centre all rules allow; of equals that of the smallest (y, x).

    Without rules, or where they leave no window (a photograph about as small as a window), it is the highest of all.
    """

    def window(at: int) -> Window:
        places = divmod(at, probabilities.shape[1])
        y_px, x_px = (place * net.stride_px + net.window_px // 2 for place in places)
        return Window(y_px, x_px, float(probabilities.flat[at]))

    order = np.argsort(-probabilities, axis=None, kind="stable").tolist()
    for found in map(window, order):
        here = Region(found.y_px, found.y_px + 1, found.x_px, found.x_px + 1)
        if all(rule.mask(here).all() for rule in rules):
            return found
    return window(order[0])


class Padded:
    """A photograph filled up with zeros, below and to the right, to at least `side_px` each way; read in windows."""

    def __init__(self, source: Source, side_px: int) -> None:
        self.source = source
        channels, height, width = source.shape
        self.shape = (channels, max(height, side_px), max(width, side_px))

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Any:
        channels, ys, xs = index
        boxes = [range(*s.indices(n)) for s, n in zip((ys, xs), self.shape[1:], strict=True)]
        inside = [slice(min(b.start, n), min(b.stop, n)) for b, n in zip(boxes, self.source.shape[1:], strict=True)]
        missing = [len(b) - (s.stop - s.start) for b, s in zip(boxes, inside, strict=True)]
        block = np.asarray(self.source[(channels, *inside)])
        return np.pad(block, [(0, 0), (0, missing[0]), (0, missing[1])]) if any(missing) else block
