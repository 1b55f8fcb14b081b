"""On a worker: how much each visual word is there at each place of a photograph, and the patches around places.

A place is (y_px, x_px, side_px), px of the photograph: the centre of what a descriptor or a patch describes, and its
side. Words of descriptors are at their keypoints, those of images at every position of U, which runs streamed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from tilestream.engine import Source, Streamed, stream
from tilestream.geometry import Region, tile_regions
from tilestream.methods import Extremes, crop_region, cut
from tilestream.methods.bovw import BagOfVisualWords
from tilestream.nets import Model
from tilestream.store import Store

from .base import digest
from .convbovw_dense import photograph
from .descriptors import Bags
from .models import read_once, steady

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
_ROWS = 4096
"""Descriptors that are coded at a time."""
_BOX = 128
"""Positions of U, each way, that are coded at a time: what bounds memory, however large a photograph is."""
_SIZES = 6
"""Side of what a descriptor describes, in its keypoint's sizes: SIFT's 4 x 4 cells."""


@dataclass(frozen=True)
class Task:
    """One photograph and the words to look for: everything by name, so that it pickles small."""

    store: str
    id: str
    model: str
    sha256: str
    words: int
    bag: Bags | None
    """Its descriptors; None where words are of images."""
    extremes: Extremes | None
    memory: int
    device: str
    threads: int


def activations(task: Task) -> tuple[Floats, Floats]:
    """Of each word how much it is there, (words,), and the place where most, (words, 3); 0 and NaN without any.

    Of equal places the first one wins.
    """
    best, where = np.zeros(task.words, np.float32), np.full((task.words, 3), np.nan, np.float32)
    for codes, places in blocks(task):
        first = codes.argmax(axis=1)
        found = codes[np.arange(task.words), first]
        higher = found > best
        best[higher], where[higher] = found[higher], places[first[higher]]
    return best, where


def winners(task: Task) -> tuple[npt.NDArray[np.uint16], Floats]:
    """The word that is there most at each place, (n,), and the places, (n, 3)."""
    found = [(codes.argmax(axis=0).astype(np.uint16), places) for codes, places in blocks(task)]
    if not found:
        return np.empty(0, np.uint16), np.empty((0, 3), np.float32)
    return np.concatenate([word for word, _ in found]), np.concatenate([places for _, places in found])


def patches(store: str, id: str, places: Sequence[tuple[float, float, float]], shown_px: int) -> Pixels:
    """Squares of a photograph around places, (n, 3, shown_px, shown_px), scaled; black beyond the photograph."""
    image, found = Store(store).image(id), np.empty((len(places), 3, shown_px, shown_px), np.uint8)
    for patch, (y, x, side) in zip(found, places, strict=True):
        side_px = max(2, round(side))
        crop = cut(image, crop_region((image.shape[1], image.shape[2]), (round(y), round(x)), side_px))
        way = cv2.INTER_AREA if side_px > shown_px else cv2.INTER_LINEAR
        patch[:] = cv2.resize(crop.transpose(1, 2, 0), (shown_px, shown_px), interpolation=way).transpose(2, 0, 1)
    return found


def blocks(task: Task) -> Iterator[tuple[Floats, Floats]]:
    """How much words are there, (words, n), at places, (n, 3), part by part.

    p(word | descriptor or patch) by U; by a dictionary the inverse of the distance, as semi-soft coding has it,
    whatever the histograms were coded by.
    """
    steady(task.device, task.threads)
    if task.bag is None:
        yield from _of_image(task)
        return
    bag, keypoints = task.bag[0], task.bag.keypoints(0)
    places = keypoints[:, :3] * np.array([1, 1, _SIZES], np.float32)
    for start in range(0, len(bag), _ROWS):
        part = slice(start, start + _ROWS)
        yield _of_descriptors(task, bag[part]), places[part]


def _of_descriptors(task: Task, rows: Floats) -> Floats:
    if task.model.endswith(".json"):
        return _dictionary(task.model, task.sha256).code(rows).T.astype(np.float32)
    net: Any = read_once(task.model, task.sha256).net
    with torch.no_grad():
        codes: Floats = net.coding(torch.from_numpy(rows)[None])[0, :, :, 0].numpy()
    return codes


def _of_image(task: Task) -> Iterator[tuple[Floats, Floats]]:
    """U pads nowhere, so boxes of its positions have the words of the whole photograph."""
    model, streamed = _streamed(task.model, task.sha256, task.memory, task.device)
    assert task.extremes is not None
    average, side_px = np.asarray(model.preprocessing["average"], np.float32), model.preprocessing["side_px"]
    store = Store(task.store)
    image = photograph(store, task.id, average, task.extremes, side_px)
    scale = np.divide(store.levels(task.id)[0][1:], image.shape[1:])
    patch_px, stride = patch_and_stride(model)
    height, width = ((side - patch_px) // stride + 1 for side in image.shape[1:])
    for box in tile_regions((height, width), (_BOX, _BOX)):
        ends = [(stop - 1) * stride + patch_px for stop in (box.y1, box.x1)]
        window = Region(box.y0 * stride, ends[0], box.x0 * stride, ends[1])
        with torch.no_grad():
            codes = streamed(_Part(image, window))[0].cpu().numpy()
        y, x = np.mgrid[box.y0 : box.y1, box.x0 : box.x1].reshape(2, -1) * stride + (patch_px - 1) / 2
        side = np.full(len(y), patch_px * np.sqrt(scale.prod()))
        places = np.stack([(y + 0.5) * scale[0] - 0.5, (x + 0.5) * scale[1] - 0.5, side], axis=1)
        yield codes.reshape(task.words, -1), places.astype(np.float32)


def patch_and_stride(model: Model) -> tuple[int, int]:
    """Side and step of the patches of U on images, in px of what it runs over."""
    return int(model.parameters["patch_px"]), 2 ** len(model.parameters["widths"])


class _Part:
    """A window of an image, as an image."""

    def __init__(self, source: Source, window: Region) -> None:
        self.source, self.window = source, window
        self.shape = (source.shape[0], *window.shape)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Any:
        channels, ys, xs = index
        y, x = (range(*each.indices(side)) for each, side in zip((ys, xs), self.shape[1:], strict=True))
        y0, x0 = self.window.y0, self.window.x0
        return self.source[channels, y0 + y.start : y0 + y.stop, x0 + x.start : x0 + x.stop]


@lru_cache(maxsize=1)
def _streamed(path: str, sha256: str, memory: int, device: str) -> tuple[Model, Streamed]:
    """U, streamed, once a process."""
    model = read_once(path, sha256)
    net: Any = model.net.to(device)
    return model, stream(net.coding, memory=memory)


@lru_cache(maxsize=1)
def _dictionary(path: str, sha256: str) -> BagOfVisualWords:
    """A dictionary that says how near words are, once a process."""
    if digest(Path(path)) != sha256:
        raise ValueError(f"{path} changed while the run was going on; start the run again")
    words = BagOfVisualWords.from_json(json.loads(Path(path).read_text())["dictionary"])
    near: BagOfVisualWords = words.set_params(coding="semi-soft")
    return near
