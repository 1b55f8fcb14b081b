"""How lesions look: each is drawn in a patch of its own, as a share of light added or taken away."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tilestream.synthesis.lesions import Scene, Spot
from tilestream.synthesis.texture import Field, step
from tilestream.synthesis.vessels import ribbon

TINTS = {
    "exudate": (0.55, 1.0, 0.6),
    "cotton_wool": (0.30, 1.0, 1.5),
}
BLOOD = (0.32, 1.0, 0.6)
"""Contrast in R, G, B as a share of the contrast in green."""


@dataclass(frozen=True)
class Patch:
    """`alpha` (h, w) float32 0..1 with its top left corner at (y, x); `gain` multiplies R, G, B by 1 + gain * alpha."""

    y: int
    x: int
    alpha: Field
    gain: tuple[float, float, float]
    mask: NDArray[np.bool_]


def paint(rng: np.random.Generator, spot: Spot, scene: Scene) -> Patch:
    """Draw one lesion, blurred by the optics, cut to the frame. The mask is where it has half its strength."""
    camera = scene.camera
    centre_y, centre_x = camera.to_px(spot.place.imag, spot.place.real)
    radius = spot.radius_mm * 1000 / camera.um_per_px
    # small lesions keep nearly all of the table's contrast: how far they show is what the tiers are made to test
    sharp = spot.shape == "disc" or spot.kind == "exudate"
    sigma = max(0.5, (0.2 * camera.blur_um if sharp else 3 + 0.6 * camera.blur_um) / camera.um_per_px)
    half = int(np.ceil(1.4 * radius + 3 * sigma)) + 1
    y, x = round(centre_y) - half, round(centre_x) - half
    fine = 1 if radius > 8 else 4  # small lesions are drawn on a finer grid, so that a pixel holds its exact share
    side = (2 * half + 1) * fine
    at = (np.arange(side) + 0.5) / fine - 0.5
    dy = ((at + y - centre_y) / radius).astype(np.float32)[:, None]
    dx = ((at + x - centre_x) / radius).astype(np.float32)[None, :]
    alpha = _shape(rng, spot, scene, dy, dx, radius * fine, camera.um_per_px / fine)
    if fine > 1:
        alpha = cv2.resize(alpha, (2 * half + 1, 2 * half + 1), interpolation=cv2.INTER_AREA)
    alpha = np.asarray(cv2.GaussianBlur(alpha, (0, 0), sigma))
    mask = alpha > 0.5 * float(alpha.max())
    if spot.shape == "net":  # the whole tangle, as a grader would outline it
        at_px = np.arange(2 * half + 1)
        mask = np.hypot(at_px[:, None] + y - centre_y, at_px + x - centre_x) < radius
    mask[half, half] = True
    tint = TINTS.get(spot.kind, BLOOD)
    rows = slice(max(0, -y), camera.height - y)
    cols = slice(max(0, -x), camera.width - x)
    gain = (spot.contrast * tint[0], spot.contrast * tint[1], spot.contrast * tint[2])
    return Patch(max(0, y), max(0, x), alpha[rows, cols], gain, mask[rows, cols])


def _shape(
    rng: np.random.Generator, spot: Spot, scene: Scene, dy: Field, dx: Field, radius: float, um_per_px: float
) -> Field:
    """(h, w) strength 0..1 in coordinates where the lesion has radius 1."""
    if spot.shape == "disc":
        return (dy * dy + dx * dx < 1).astype(np.float32)
    if spot.shape == "dot":
        return _blob(rng, dy, dx, 5, 0.15, 0.4)
    if spot.shape == "blot":
        return _blob(rng, dy, dx * np.float32(rng.uniform(1, 1.5)), 7, 0.25, 0.45)
    if spot.shape == "flame":
        ray = (spot.place - scene.eye.disc) / abs(spot.place - scene.eye.disc) * np.exp(1j * rng.normal(0, 0.15))
        along, across = dx * ray.real + dy * ray.imag, (dy * ray.real - dx * ray.imag) * 4
        comb = np.interp(across.ravel(), np.linspace(-1.5, 1.5, 13), rng.uniform(-0.35, 0.25, 13)).reshape(across.shape)
        return _level((1 - np.hypot(along * (1 - comb), across)) / 0.5)
    if spot.shape == "cluster":
        return _blob(rng, dy, dx, 5 if spot.radius_mm < 0.04 else 9, 0.28, 0.35)
    if spot.shape == "wool":
        return _blob(rng, dy * np.float32(rng.uniform(1, 1.3)), dx, 8, 0.28, 0.6)
    if spot.shape == "boat":  # blood settles: a level top, a round bottom
        return _blob(rng, dy, dx, 6, 0.12, 0.2) * _level((dy + 0.15) / 0.12)
    if spot.shape == "net":
        return _net(rng, dy, dx, radius, um_per_px)
    if spot.shape == "beads":
        return _vein(spot, scene, dy, dx, um_per_px)
    raise ValueError(f"shape={spot.shape!r} has no drawing; add one here")


def _blob(rng: np.random.Generator, dy: Field, dx: Field, cells: int, rough: float, soft: float) -> Field:
    """An uneven spot: a cone broken up by noise of `cells` cells a side, `rough` of its height, soft over `soft`."""
    lattice = rng.standard_normal((cells, cells)).astype(np.float32)
    lattice[cells // 2, cells // 2] = 0.5  # never a hole in the middle
    height = 1 - np.hypot(dy, dx)
    uneven = height + rough * (cv2.resize(lattice, (dx.size, dy.size), interpolation=cv2.INTER_CUBIC) - 0.2)
    return step(np.minimum(uneven, height * 3), 0, soft)


def _level(value: NDArray[np.floating]) -> Field:
    """Clipped to 0..1."""
    level: Field = np.clip(value, 0, 1).astype(np.float32)
    return level


def _net(rng: np.random.Generator, dy: Field, dx: Field, radius: float, um_per_px: float) -> Field:
    """A tangle of new vessels, calibre 10-30 um, winding out from the middle, with a faint blush around it."""
    layer, origin = _layer(dy, dx)
    for _ in range(int(8 + 16 * min(1.0, radius * um_per_px / 800))):
        bends = np.cumsum(rng.normal(0, 0.05, 60)) + rng.normal(0, 0.12, 60)
        path = np.cumsum(np.exp(1j * (rng.uniform(-np.pi, np.pi) + np.cumsum(bends)))) * radius / 38
        path += radius * 0.3 * np.sqrt(rng.random()) * np.exp(1j * rng.uniform(-np.pi, np.pi))
        path *= np.tanh(np.abs(path) / radius) * radius / np.maximum(np.abs(path), 1e-9)
        width = rng.uniform(10, 30) / um_per_px
        line = np.asarray(origin + path, np.complex128)
        ribbon(layer, line, np.full(60, max(width, 1.0)), 255 * min(width, 1.0) * rng.uniform(0.5, 1))
    blush = _level((1 - dy * dy - dx * dx) * 1.5) * 0.2
    tangle: Field = np.maximum(layer.astype(np.float32) / 255, blush)
    return tangle


def _vein(spot: Spot, scene: Scene, dy: Field, dx: Field, um_per_px: float) -> Field:
    """The stretch of the beaded vein through the spot: the lesion's mark; `bead` draws the swollen vein itself."""
    layer, origin = _layer(dy, dx)
    for vessel in scene.vessels:
        if not vessel.artery and spot.place in vessel.points:
            near = np.abs(vessel.points - spot.place) < spot.radius_mm
            path = origin + (vessel.points[near] - spot.place) * 1000 / um_per_px
            ribbon(layer, path, np.maximum(vessel.calibre_um[near] / um_per_px, 1.5), 255)
    vein: Field = layer.astype(np.float32) / np.float32(255)
    return vein


def _layer(dy: Field, dx: Field) -> tuple[NDArray[np.uint8], complex]:
    """An empty (h, w) layer to draw on and the lesion's centre x + iy in its px."""
    centre = complex(np.interp(0, dx[0], np.arange(dx.size)), np.interp(0, dy[:, 0], np.arange(dy.size)))
    return np.zeros((dy.size, dx.size), np.uint8), centre
