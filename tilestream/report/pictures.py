"""A report's photographs, with lesions, maps or a crop's frame on them, as JPEG bytes.

Pictures are (H, W, 3) uint8, RGB. Boxes are half-open (y0, x0, y1, x1), points (y, x).
"""

from collections.abc import Sequence
from typing import Any

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Box = tuple[float, float, float, float]
Point = tuple[float, float]

CROP_RGB, BORDER_RGB, LESION_RGB, CASING_RGB = (64, 224, 255), (255, 255, 255), (255, 230, 60), (0, 0, 0)
FRACTION_BITS = 4  # OpenCV draws at 1/16 px
_FULL_COLOUR = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444


def photograph(picture: Pixels, quality: int = 85, *, fine: bool = False) -> bytes:
    """`picture` as JPEG bytes; `quality` in 1..100; `fine` keeps colour at full resolution, for thin coloured lines."""
    _check(picture)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, _FULL_COLOUR] if fine else []
    written, data = cv2.imencode(".jpg", picture[..., ::-1], options)
    if not written:
        raise ValueError(f"picture of shape {picture.shape} could not be encoded as JPEG with quality={quality}")
    return bytes(data)


def outlined(picture: Pixels, lesions: Mask) -> Pixels:
    """A copy of `picture` with a line around, not on, what `lesions` (H, W) marks.

    The line keeps off by a few pixels, so that a lesion of one pixel can be seen in it.
    """
    _check(picture)
    _same_size("lesions", lesions.shape, picture)
    line_px = _line_px(picture, 400)
    around = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * line_px + 5, 2 * line_px + 5))
    grown = cv2.dilate(lesions.astype(np.uint8), around)
    edges, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    drawn = picture.copy()
    cv2.drawContours(drawn, edges, -1, LESION_RGB, line_px)
    return drawn


def overlay(
    picture: Pixels,
    values: NDArray[np.floating[Any]],
    *,
    highest: float | None = None,
    percentile: float = 99.5,
    opacity: float = 0.9,
    colormap: str = "viridis",
) -> bytes:
    """JPEG of `picture`, dimmed towards grey, under a map of its size (H, W), such as its saliency.

    Only the positive part is shown: from 0, transparent, to `highest` (default: the given percentile of the positive
    values), the colormap's far end at `opacity`. A map without a positive value leaves the dimmed picture.

    Raises ValueError where the sizes differ or the map is not finite.
    """
    _check(picture)
    _same_size("map", values.shape, picture)
    if not np.isfinite(values).all():
        raise ValueError(f"the map holds {np.count_nonzero(~np.isfinite(values))} values that are not finite")
    strength = np.maximum(values, 0).astype(np.float64)
    if (positive := strength[strength > 0]).size:
        strength = np.minimum(strength / (highest or np.percentile(positive, percentile)), 1)
    colour = matplotlib.colormaps[colormap](strength)[..., :3] * 255
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None]
    ground = 0.65 * (0.35 * picture + 0.65 * grey)
    alpha = opacity * np.sqrt(strength)[..., None]  # the square root keeps weak regions visible
    return photograph(np.rint((1 - alpha) * ground + alpha * colour).astype(np.uint8))


def frame(
    picture: Pixels,
    crop: Box | None = None,
    *,
    allowed: Mask | None = None,
    centre: Point | None = None,
    others: Sequence[Point] = (),
    photograph_px: tuple[int, int] | None = None,
) -> Pixels:
    """A copy of `picture` with the frame of `crop` in cyan, a cross at `centre`, and small ones at the `others`.

    What the border rule excludes, where `allowed` (H, W) of the picture's size is False, is dimmed behind a white
    line. Coordinates are pixels of the full photograph, whose (height, width) is `photograph_px` (default: the
    picture's own).
    """
    _check(picture)
    full = photograph_px or picture.shape[:2]
    scale = np.array(picture.shape[:2]) / full
    line_px = _line_px(picture, 220)
    drawn = picture.copy()
    if allowed is not None:
        _same_size("allowed", allowed.shape, picture)
        drawn[~allowed] //= 2
        kernel = np.ones((2 * line_px + 1, 2 * line_px + 1), np.uint8)
        inner = cv2.erode(allowed.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        drawn[allowed & (inner == 0)] = BORDER_RGB
    crosses = [(point, 2) for point in others] + ([] if centre is None else [(centre, 5)])
    for colour, thickness_px in ((CASING_RGB, line_px + 2), (CROP_RGB, line_px)):
        if crop is not None:
            y0, x0 = _fixed_point(np.array(crop[:2]) * scale)
            y1, x1 = _fixed_point(np.array(crop[2:]) * scale - 1)  # on the outermost pixels inside
            cv2.rectangle(drawn, (x0, y0), (x1, y1), colour, thickness_px, cv2.LINE_8, FRACTION_BITS)
        for point, arm_px in crosses:
            y, x = _fixed_point(np.array(point) * scale + scale / 2 - 0.5)  # a point is the middle of its pixel
            arm = arm_px * line_px << FRACTION_BITS
            for dy, dx in ((arm, 0), (0, arm)):
                cv2.line(drawn, (x - dx, y - dy), (x + dx, y + dy), colour, thickness_px, cv2.LINE_8, FRACTION_BITS)
    return drawn


def _line_px(picture: Pixels, share: int) -> int:
    return max(1, round(int(max(picture.shape)) / share))


def _fixed_point(values: NDArray[np.float64]) -> tuple[int, int]:
    """Two coordinates as OpenCV's fixed-point integers."""
    first, second = np.rint(values * (1 << FRACTION_BITS)).astype(int).tolist()
    return first, second


def _check(picture: Pixels) -> None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture is {picture.dtype} of shape {picture.shape}; it must be uint8 (H, W, 3)")


def _same_size(name: str, shape: tuple[int, ...], picture: Pixels) -> None:
    if shape != picture.shape[:2]:
        raise ValueError(f"{name} has shape {shape}, the picture {picture.shape[:2]}; reduce both alike")
