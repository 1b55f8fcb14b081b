"""Whether a saliency map says what the network does: deletion, insertion, and the check by randomised weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata
from torch import nn

from tilestream.engine import Reduce, Streamed, stream

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Curve:
    """The target's probability, (s,), by the share of the photograph's pixels that was exchanged, (s,) from 0 to 1."""

    shares: Floats
    probabilities: Floats

    @property
    def auc(self) -> float:
        """Area under it, in [0, 1]: of deletion the smaller the better, of insertion the larger."""
        return float(np.trapezoid(self.probabilities, self.shares))


def deletion_insertion(
    net: nn.Module,
    image: Floats,
    saliency: Floats,
    *,
    target: int = 1,
    blocks: int = 32,
    steps: int = 32,
    blurred: Floats | None = None,
) -> tuple[Curve, Curve]:
    """Deletion and insertion (Petsiuk et al. 2018) of an input (C, H, W) by its map (H, W), streamed.

    Blocks of 1 / `blocks` of the longer side go in order of their mean saliency, the highest first, in `steps` equal
    parts: deletion puts the `blurred` image (by default, without what is smaller than a block) in their place,
    insertion starts from the blurred image and puts the image's blocks into it. Compare with the areas of a noise map.
    Raises ValueError when the map is not of the image's size or not finite.
    """
    image = np.asarray(image)
    if saliency.shape != image.shape[1:] or not np.isfinite(saliency).all():
        raise ValueError(f"saliency of shape {saliency.shape} must be finite and of the image's size {image.shape[1:]}")
    streamed = net if isinstance(net, Streamed) else stream(net)
    side_px = -(-max(saliency.shape) // blocks)
    places = _in_order(saliency, side_px)
    other = blurred_image(image, side_px) if blurred is None else np.asarray(blurred)
    ends = np.unique(np.linspace(0, len(places), min(steps, len(places)) + 1).astype(int))

    def curve(start: Floats, to: Floats) -> Curve:
        current, taken, shares, probabilities = start.copy(), 0, [], []
        for before, end in zip([0, *ends[:-1]], ends, strict=True):
            for ys, xs in places[before:end]:
                current[:, ys, xs] = to[:, ys, xs]
                taken += to[0, ys, xs].size
            shares.append(taken / saliency.size)
            with torch.no_grad():
                probabilities.append(float(streamed(current).softmax(1)[0, target]))
        return Curve(np.array(shares), np.array(probabilities))

    return curve(image, other), curve(other, image)


def _in_order(saliency: Floats, side_px: int) -> list[tuple[slice, slice]]:
    """The blocks of a map, that of the highest mean first; ties go to the smallest (y, x)."""
    starts = [np.arange(0, n, side_px) for n in saliency.shape]
    sums = np.add.reduceat(np.add.reduceat(saliency, starts[0], axis=0, dtype=np.float64), starts[1], axis=1)
    sizes = np.outer(*(np.diff(np.append(s, n)) for s, n in zip(starts, saliency.shape, strict=True)))
    order = np.argsort(-(sums / sizes).ravel(), kind="stable")
    rows, columns = np.unravel_index(order, sums.shape)
    return [
        (slice(y * side_px, (y + 1) * side_px), slice(x * side_px, (x + 1) * side_px))
        for y, x in zip(rows.tolist(), columns.tolist(), strict=True)
    ]


def blurred_image(image: Floats, side_px: int) -> Floats:
    """(C, H, W) without what is smaller than `side_px`: means over blocks of it, read bilinearly."""
    height, width = image.shape[1:]
    grid = (-(-width // side_px), -(-height // side_px))
    small = [cv2.resize(channel, grid, interpolation=cv2.INTER_AREA) for channel in image]
    return np.stack([cv2.resize(channel, (width, height), interpolation=cv2.INTER_LINEAR) for channel in small])


def randomised_correlations(
    net: nn.Module | Streamed,
    image: Floats,
    *,
    target: int = 1,
    method: str = "gradient",
    reduce: Reduce = "mean",
    cascade: bool = True,
    seed: int = 0,
    memory: int | str | None = None,
) -> dict[str, float | None]:
    """The check of Adebayo et al. (2018): how alike the map stays when the network forgets what it has learnt.

    Spearman's correlation of |map| before with |map| after blocks of the network got fresh weights: one after the other
    from the logits down, by the name of the last (`cascade`), or all at once under "all". Near 1, the map does not
    depend on what was learnt; None where a map is constant. Blocks are the network's children, those of nn.Sequential
    singly. `net` stays as it is. Raises ValueError for a module whose weights cannot be drawn anew.
    """
    streamed = net if isinstance(net, Streamed) else stream(net, memory=memory)
    fresh = copy.deepcopy(streamed.net)
    forgetful = stream(fresh, memory=memory)  # once: it sees that weights change
    parts = list(_blocks(fresh))[::-1]
    for name, part in parts:
        for inner, module in part.named_modules(prefix=name):
            if next(module.parameters(recurse=False), None) is not None and not hasattr(module, "reset_parameters"):
                raise ValueError(f"{inner} has weights but no reset_parameters(), so they cannot be drawn anew; add it")

    def ranks(of: Streamed) -> Floats:
        values = of.saliency(image, target, method, reduce).numpy()
        return np.asarray(rankdata(np.abs(values).ravel()))

    before = ranks(streamed)
    result: dict[str, float | None] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, part in parts:
            for module in part.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
            if cascade:
                result[name] = _correlation(before, ranks(forgetful))
    return result if cascade else {"all": _correlation(before, ranks(forgetful))}


def _blocks(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children that have weights, in order, with their names; a network without children is one itself."""
    if not prefix and next(net.children(), None) is None:
        yield type(net).__name__, net
    for name, child in net.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _blocks(child, f"{prefix}{name}.")
        elif next(child.parameters(), None) is not None:
            yield f"{prefix}{name}", child


def _correlation(first: Floats, second: Floats) -> float | None:
    """Pearson's correlation; None where one of them is constant."""
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / scale if scale else None
