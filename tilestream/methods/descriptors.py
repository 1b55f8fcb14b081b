"""Local descriptors of a photograph, tile by tile: SIFT and SURF at keypoints, SIFT on a dense grid (paper B, 3.3).

Each keypoint belongs to the tile whose core holds it, half-open; a tile's window is its core and a halo as wide as the
largest kept keypoint needs. SIFT halves the image by taking every second pixel, SURF looks for maxima in blocks, so
windows start at multiples of `align_px`, and end there, mirrored beyond the photograph. Then dense descriptors and SURF
are those of the whole image, bit for bit; SIFT's places differ by their rounding, some 1e-4 px, and a keypoint nearer
to a core's edge than that may be found twice, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from tilestream.engine import Source
from tilestream.geometry import Extent, Region

from .centres import Border

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Channel = Literal["green", "grey"]
_SIFT: Any = cv2.SIFT_create  # type: ignore[attr-defined]
_PATCH = 6.0
"""Side of SIFT's 4 x 4 cells in a keypoint's sizes: a cell is 3 sigma wide, and a size is 2 sigma."""


class Bag(NamedTuple):
    """Descriptors of one photograph, or of a part of it.

    keypoints: (n, 4) float32, y_px, x_px (centres of pixels are integers), size_px (twice the sigma of its scale) and
    angle_deg. strength: (n,) float32, by which the first ones are kept. descriptors: (n, d) float32.
    """

    keypoints: Floats
    strength: Floats
    descriptors: Floats

    @classmethod
    def empty(cls, dim: int) -> Bag:
        return cls(np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty((0, dim), np.float32))

    def take(self, chosen: npt.NDArray[Any]) -> Bag:
        """The rows chosen, by a mask or by indices."""
        return Bag(*(part[chosen] for part in self))


class Method(Protocol):
    """A way to describe a window: keypoints whose centre is in `core` (both in px of the image), and maybe others."""

    @property
    def dim(self) -> int: ...

    @property
    def align_px(self) -> int:
        """Divides the corners of windows."""

    @property
    def halo_px(self) -> int:
        """What a window needs beyond its core, a multiple of align_px."""

    @property
    def bytes_a_pixel(self) -> int:
        """Memory that `describe` takes, a pixel of the window."""

    def describe(self, window: Pixels, corner: Extent, core: Region) -> Bag: ...


@dataclass(frozen=True)
class Sift:
    """OpenCV's SIFT (Lowe 2004), as RootSIFT (Arandjelovic and Zisserman 2012): d = 128.

    `contrast` is OpenCV's contrastThreshold; keypoints of other sizes are left out.
    """

    contrast: float = 0.01
    min_size_px: float = 4.0
    max_size_px: float = 64.0

    dim = 128
    align_px = 64  # 2 to the number of halvings up to the largest keypoints
    bytes_a_pixel = 280

    @property
    def halo_px(self) -> int:
        return _aligned(
            6 * self.max_size_px, self.align_px
        )  # 5.3 sizes the descriptor reaches, at 45 degrees; the rest is blur

    def describe(self, window: Pixels, corner: Extent, core: Region) -> Bag:
        """Keypoints of a grey window (h, w) uint8 whose first pixel is `corner` of the image."""
        sift = _SIFT(contrastThreshold=self.contrast, enable_precise_upscale=True)
        places, histograms = sift.detectAndCompute(window, None)
        if not places:
            return Bag.empty(self.dim)
        bag = Bag(_placed(places, corner), np.array([p.response for p in places], np.float32), root(histograms))
        return bag.take(_kept(bag, core, self.min_size_px, self.max_size_px))


@dataclass(frozen=True)
class Dense:
    """RootSIFT on a grid: squares of `patch_px`, upright, in the image halved to 1 / scale, for each scale: d = 128.

    So a square covers patch_px * scale of the image. Grids have steps of step_px * scale and start at half of that.
    Strength is drawn by place, uniform in [0, 1): the first ones of many are a random choice that no tiling changes.
    """

    patch_px: tuple[int, ...] = (32,)
    scales: tuple[int, ...] = (1, 2, 4)
    step_px: int = 32

    dim = 128
    align_px = 64
    bytes_a_pixel = 64

    def __post_init__(self) -> None:
        for scale in self.scales:
            if scale not in (1, 2, 4, 8, 16, 32):
                raise ValueError(f"scales={list(self.scales)} must be powers of two in [1, 32], got {scale}")
        if not self.scales or not self.patch_px:
            raise ValueError(f"patch_px={list(self.patch_px)}, scales={list(self.scales)}: give one of each at least")

    @property
    def halo_px(self) -> int:
        return _aligned(max(self.scales) * (max(self.patch_px) + 16), 64)  # 0.9 of a patch, and the blur of its scale

    def describe(self, window: Pixels, corner: Extent, core: Region) -> Bag:
        """Squares of a grey window (h, w) uint8 whose first pixel is `corner` of the image, with centres in `core`."""
        places, strength = [], list[Floats]()
        for scale in self.scales:
            step = self.step_px * scale
            ys, xs = (
                np.arange(-((step // 2 - lo) // step), -((step // 2 - hi) // step)) * step + step // 2
                for lo, hi in ((core.y0, core.y1), (core.x0, core.x1))
            )
            y, x = (grid.ravel() for grid in np.meshgrid(ys, xs, indexing="ij"))
            for side in self.patch_px:
                size, octave = side * scale / _PATCH, scale.bit_length() - 1
                places += [cv2.KeyPoint(px - corner[1], py - corner[0], size, 0.0, 0.0, octave)
                           for py, px in zip(y.tolist(), x.tolist(), strict=True)]  # fmt: skip
                strength.append(_drawn(y, x, scale, side))
        if not places:
            return Bag.empty(self.dim)
        places, histograms = _SIFT().compute(window, places)
        return Bag(_placed(places, corner), np.concatenate(strength), root(histograms))


@dataclass(frozen=True)
class Surf:
    """Mahotas' SURF (Bay et al. 2008), d = 64, at keypoints of four octaves; it needs the package mahotas."""

    threshold: float = 0.1
    min_size_px: float = 0.0
    max_size_px: float = 64.0

    dim = 64
    align_px = 192  # maxima are looked for in blocks of 3 of every octave's steps, up to 8 px; and 64
    bytes_a_pixel = 64

    @property
    def halo_px(self) -> int:
        # the descriptor's square of 20 sigma at 45 degrees, and its filters; the largest octave's filters
        return _aligned(max(8 * self.max_size_px, 256), self.align_px)

    def describe(self, window: Pixels, corner: Extent, core: Region) -> Bag:
        """Keypoints of a grey window (h, w) uint8 whose first pixel is `corner` of the image."""
        try:
            from mahotas.features import surf  # type: ignore[import-untyped]
        except ImportError:
            raise ValueError("method='surf' needs the package mahotas; pip install 'tilestream[surf]'") from None
        rows = surf.surf(window, threshold=self.threshold, max_points=window.size)
        y, x, sigma, score, _, angle = rows[:, :6].T
        places = np.stack([y + corner[0], x + corner[1], 2 * sigma, np.rad2deg(angle) % 360], axis=1)
        bag = Bag(places.astype(np.float32), score.astype(np.float32), rows[:, 6:].astype(np.float32))
        return bag.take(_kept(bag, core, self.min_size_px, self.max_size_px))


def cores(extent: Extent, tile_px: int) -> Iterator[Region]:
    """The tiles' cores, row by row; their side is `tile_px`, less at the right and below."""
    for y in range(0, extent[0], tile_px):
        for x in range(0, extent[1], tile_px):
            yield Region(y, min(extent[0], y + tile_px), x, min(extent[1], x + tile_px))


def tile_bytes(method: Method, tile_px: int) -> int:
    """Peak memory of one tile."""
    return method.bytes_a_pixel * (tile_px + 2 * (method.halo_px + method.align_px)) ** 2


def describe(
    method: Method, image: Source, core: Region, border: Border | None = None, channel: Channel = "green"
) -> Bag:
    """Descriptors of an image (3, H, W) uint8 whose keypoints lie in `core` and, if given, inside the border."""
    extent = (image.shape[1], image.shape[2])
    allowed = None if border is None else border.mask(core)
    if allowed is not None and not allowed.any():
        return Bag.empty(method.dim)
    window, corner = _window(image, core, method, extent, channel)
    bag = method.describe(window, corner, core)
    if allowed is None:
        return bag
    y, x = np.floor(bag.keypoints[:, :2]).astype(np.int64).T
    return bag.take(allowed[y - core.y0, x - core.x0])


def strongest(bags: Iterable[Bag], dim: int, most: int) -> Bag:
    """The `most` strongest of several bags, in order of strength, ties by place: mergeable, whatever the tiles."""
    kept = Bag.empty(dim)
    for bag in bags:
        kept = Bag(*(np.concatenate(parts) for parts in zip(kept, bag, strict=True)))
        order = np.lexsort([*kept.keypoints.T[::-1], -kept.strength])
        kept = kept.take(order[:most])
    return kept


def root(histograms: npt.NDArray[Any]) -> Floats:
    """RootSIFT: square roots of shares, (n, 128) float32 of Euclidean norm 1; a flat patch's stays zero."""
    total = histograms.sum(axis=1, keepdims=True, dtype=np.float32)
    shares: Floats = np.sqrt(histograms / np.maximum(total, 1e-12), dtype=np.float32)
    return shares


def _placed(places: list[Any], corner: Extent) -> Floats:
    """OpenCV's keypoints of a window as rows of `Bag.keypoints`."""
    return np.array([(p.pt[1] + corner[0], p.pt[0] + corner[1], p.size, p.angle) for p in places], np.float32)


def _kept(bag: Bag, core: Region, least_px: float, most_px: float) -> npt.NDArray[np.bool_]:
    """Which keypoints lie in a core, half-open, and are of a size in [least_px, most_px]."""
    y, x, size, _ = bag.keypoints.T
    inside = (core.y0 <= y) & (y < core.y1) & (core.x0 <= x) & (x < core.x1)
    kept: npt.NDArray[np.bool_] = inside & (least_px <= size) & (size <= most_px)
    return kept


def _window(image: Source, core: Region, method: Method, extent: Extent, channel: Channel) -> tuple[Pixels, Extent]:
    """The grey window around a core, between multiples of align_px, mirrored beyond the image; and its corner."""
    halo, align = method.halo_px, method.align_px
    y0, x0 = (max(0, start - halo) // align * align for start in (core.y0, core.x0))
    y1, x1 = (
        min(_aligned(side, align), _aligned(stop + halo, align))
        for side, stop in zip(extent, (core.y1, core.x1), strict=True)
    )
    y2, x2 = min(y1, extent[0]), min(x1, extent[1])
    if channel == "green":
        grey = np.asarray(image[1:2, y0:y2, x0:x2])[0]
    else:
        grey = cv2.cvtColor(
            np.ascontiguousarray(np.moveaxis(np.asarray(image[:, y0:y2, x0:x2]), 0, 2)), cv2.COLOR_RGB2GRAY
        )
    grey = cv2.copyMakeBorder(np.ascontiguousarray(grey), 0, y1 - y2, 0, x1 - x2, cv2.BORDER_REFLECT_101)
    return grey, (y0, x0)


def _aligned(length: float, align: int) -> int:
    return int(-(-length // align)) * align


def _drawn(y: npt.NDArray[np.int64], x: npt.NDArray[np.int64], scale: int, side: int) -> Floats:
    """Uniform in [0, 1), by place: the finaliser of splitmix64 (Steele et al. 2014)."""
    bits = (y.astype(np.uint64) << np.uint64(32)) ^ x.astype(np.uint64) ^ np.uint64((scale << 56) ^ (side << 26))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
