"""A whole photograph: draw camera, eye and lesions from separate streams, then compose them at full size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tilestream.synthesis.anatomy import background, draw_eye
from tilestream.synthesis.camera import Camera, draw_camera, field_mask, sensor_noise
from tilestream.synthesis.lesions import LESION_KINDS, TIERS, Scene, scatter
from tilestream.synthesis.painting import Patch, paint
from tilestream.synthesis.texture import Field, coarse_grid
from tilestream.synthesis.vessels import absorbance, bead, grow

EYEPACS_SHARES: tuple[float, ...] = (25810 / 35126, 2443 / 35126, 5292 / 35126, 873 / 35126, 708 / 35126)
"""Shares of grades 0..4 among the training photographs of EyePACS."""

BALANCED_SHARES: tuple[float, ...] = (0.2, 0.2, 0.2, 0.2, 0.2)
"""Equal shares of grades 0..4."""

BLOOD_TAKES = (0.17, 0.48, 0.32)
"""Share of R, G, B that the darkest vein takes away in a camera of clarity 1."""


@dataclass(frozen=True)
class Lesion:
    """One lesion: `kind` from LESION_KINDS, centre (y, x) and the radius of the circle around it, in px."""

    kind: str
    y_px: float
    x_px: float
    radius_px: float


@dataclass(frozen=True)
class Photograph:
    """A synthetic photograph and what is known of it.

    `image` (H, W, 3) uint8 RGB; `lesion_map` (H, W) uint8, 0 = none, else 1 + index into LESION_KINDS;
    `um_per_px` on the retina; `grade` 0..4.
    """

    image: NDArray[np.uint8]
    lesions: tuple[Lesion, ...]
    lesion_map: NDArray[np.uint8]
    um_per_px: float
    grade: int


def photograph(grade: int, *, size: tuple[int, int] | None = None, seed: int, tier: str = "realistic") -> Photograph:
    """A colour fundus photograph of a 45 degree field with the lesions that `grade` (0..4) calls for.

    `size` is (height, width) in px, 256 or more on a side; None draws a camera's frame. Camera, eye and lesions have
    random streams of their own, so only lesions depend on the grade; the same arguments give the same bytes. `tier`:
    "realistic" has all lesions, microaneurysms of 20-60 um; "stress" has lesions of 12-20 um alone (see `lesions`).
    Raises ValueError on any other value.
    """
    if grade not in range(5):
        raise ValueError(f"grade={grade} is not one of 0, 1, 2, 3, 4; use a grade of diabetic retinopathy")
    if tier not in TIERS:
        raise ValueError(f"tier={tier!r} is not one of {', '.join(TIERS)}; use one of these")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; use 0 or more")
    camera = draw_camera(np.random.default_rng([seed, 0]), size)
    eye_rng, lesion_rng = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2, grade])
    eye = draw_eye(eye_rng)
    vessels = grow(eye_rng, eye)
    scene = Scene(tier, eye, vessels, camera)
    spots = scatter(lesion_rng, grade, scene)
    patches = [paint(lesion_rng, spot, scene) for spot in spots]
    for spot in spots:
        if spot.kind == "venous_beading":
            vessels = bead(vessels, spot.place, spot.radius_mm)
    lesions = tuple(
        Lesion(s.kind, *camera.to_px(s.place.imag, s.place.real), s.radius_mm * 1000 / camera.um_per_px) for s in spots
    )
    lesion_map = np.zeros((camera.height, camera.width), np.uint8)
    for spot, patch in zip(spots, patches, strict=True):
        h, w = patch.mask.shape
        lesion_map[patch.y : patch.y + h, patch.x : patch.x + w][patch.mask] = 1 + LESION_KINDS.index(spot.kind)
    coarse = background(eye_rng, eye, camera, coarse_grid(camera))
    image = _compose(camera, coarse, absorbance(vessels, camera), np.random.default_rng([seed, 3]), patches)
    return Photograph(image, lesions, lesion_map, camera.um_per_px, grade)


def _compose(
    camera: Camera, coarse: Field, blood: NDArray[np.uint8], noise_rng: np.random.Generator, patches: list[Patch]
) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: the background enlarged, blood taken away, lesions put in, the field cut out, noise added."""
    field = field_mask(camera)
    inside = field.astype(np.float32) * np.float32(1 / 255)
    noise = sensor_noise(noise_rng, camera)
    planes = []
    for channel, takes in enumerate(BLOOD_TAKES):
        plane = cv2.resize(coarse[channel], (camera.width, camera.height), interpolation=cv2.INTER_LINEAR)
        through = (1 - camera.clarity[channel] * takes * np.arange(256) / 255).astype(np.float32)
        cv2.multiply(plane, cv2.LUT(blood, through), dst=plane)
        for patch in patches:
            h, w = patch.alpha.shape
            plane[patch.y : patch.y + h, patch.x : patch.x + w] *= 1 + np.float32(patch.gain[channel]) * patch.alpha
        cv2.add(plane, noise, dst=plane)
        cv2.multiply(plane, inside, dst=plane)
        planes.append(cv2.convertScaleAbs(cv2.max(plane, 0)))
    image: NDArray[np.uint8] = cv2.merge(planes)
    return image


def grades(n: int, seed: int, shares: Sequence[float] = EYEPACS_SHARES) -> list[int]:
    """`n` grades in the given shares of 0..4 (largest remainder), shuffled by `seed`; ValueError on bad shares."""
    if len(shares) != 5 or min(shares) < 0 or not np.isclose(sum(shares), 1):
        raise ValueError(
            f"shares={tuple(shares)} must be five numbers of 0 or more that add up to 1; use BALANCED_SHARES"
        )
    if n < 0:
        raise ValueError(f"n={n} is negative; use 0 or more")
    exact = np.asarray(shares) * n
    counts = np.floor(exact).astype(int)
    for grade in np.argsort(counts - exact, kind="stable")[: n - counts.sum()]:
        counts[grade] += 1
    drawn = np.repeat(np.arange(5), counts)
    return [int(g) for g in np.random.default_rng([seed, 9]).permutation(drawn)]
