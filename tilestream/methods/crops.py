"""Crops of a classifier's size around a centre, and which photographs they are cut from (paper A, section 2.2)."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tilestream.geometry import Extent, Region

from .centres import FieldOfView, eye_rules
from .preprocessing import Extremes, Floats, Normalised, Pixels

UNHEALTHY_FROM = 2
"""Grades 0 and 1 are healthy, 2 to 4 unhealthy."""
HIGHEST_GRADE = 4


def unhealthy(grades: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Two-class labels of grades 0..4: 1 from grade 2 on. ValueError for another grade: -1 is not healthy."""
    values = np.asarray(grades)
    if (stray := values[(values < 0) | (values > HIGHEST_GRADE)]).size:
        raise ValueError(f"grade={stray[0]} must be in [0, {HIGHEST_GRADE}]; leave the label empty where it is unknown")
    return (values >= UNHEALTHY_FROM).astype(np.int64)


def crop_region(extent: Extent, centre: tuple[int, int], size_px: int) -> Region:
    """The crop of size_px around a centre, shifted inside where it would overflow.

    On an axis shorter than the crop it starts at 0 and reaches beyond the photograph; `cut` fills that with zeros.
    """
    (y0, x0) = (max(0, min(c - size_px // 2, n - size_px)) for c, n in zip(centre, extent, strict=True))
    return Region(y0, y0 + size_px, x0, x0 + size_px)


def cut(source: Pixels, region: Region) -> npt.NDArray[np.uint8]:
    """The pixels of a crop, (3, h, w) uint8, raw; what lies beyond the photograph is 0."""
    block = np.asarray(source[:, region.y0 : region.y1, region.x0 : region.x1])
    missing = [(0, 0), (0, region.height - block.shape[1]), (0, region.width - block.shape[2])]
    return np.pad(block, missing) if any(after for _, after in missing) else block


def normalise_crop(
    crop: npt.NDArray[np.uint8], region: Region, extent: Extent, average: Floats, extremes: Extremes
) -> Floats:
    """A raw crop as the network takes it: normalised as its photograph is, with that one's average and extremes."""
    placed = Normalised(_Placed(crop, region, extent), average, extremes)
    inside = region.intersect(Region.whole(extent))
    values = placed[:, inside.y0 : inside.y1, inside.x0 : inside.x1]
    missing = [(0, 0), (0, region.height - inside.height), (0, region.width - inside.width)]
    return np.pad(values, missing) if any(after for _, after in missing) else values


def random_centre(
    extent: Extent,
    border: float,
    seed: int,
    id: str,
    field: FieldOfView | None = None,
    rule: Literal["frame", "circle"] = "frame",
) -> tuple[int, int]:
    """A centre drawn evenly where the rule and the field of view let it be (`eye_rules`), by seed and id alone.

    Elsewhere the rim, or black, would tell healthy crops. ValueError where hardly a point of the rule's box is inside.
    """
    rules = eye_rules(extent, border, field, rule)
    inside = rules[0].box
    digest = hashlib.sha256(f"{seed}:{id}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    for _ in range(1000):
        y, x = int(rng.integers(inside.y0, inside.y1)), int(rng.integers(inside.x0, inside.x1))
        if all(each.mask(Region(y, y + 1, x, x + 1)).all() for each in rules):
            return y, x
    raise ValueError(f"border={border} leaves next to no pixel of id={id!r}, whose field of view is {field}")


class _Placed:
    """A crop, read by the coordinates of its photograph."""

    def __init__(self, crop: npt.NDArray[np.uint8], region: Region, extent: Extent) -> None:
        self.crop, self.region, self.shape = crop, region, (crop.shape[0], *extent)

    def __getitem__(self, index: Any) -> npt.NDArray[np.uint8]:
        channels, ys, xs = index
        region = Region(ys.start, ys.stop, xs.start, xs.stop)
        return self.crop[(channels, *region.within(self.region))]
