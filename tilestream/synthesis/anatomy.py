"""The eye without disease: disc, macula, choroid, nerve fibres, drusen, lit through the camera."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilestream.synthesis.camera import FIELD_UM, Camera
from tilestream.synthesis.texture import Field, Grid, noise, step, streaks

Points = NDArray[np.complex128]
Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Eye:
    """Landmarks in mm from the centre of the field of view, as complex numbers x + iy (y downwards)."""

    disc: complex
    fovea: complex
    disc_radius: float
    cup: float  # cup to disc ratio
    macula_radius: float


def draw_eye(rng: np.random.Generator) -> Eye:
    """Draw the landmarks: disc 1.5-1.9 mm, disc to fovea 3.5-5.5 mm, macula radius 1250 +- 200 um."""
    side = rng.choice([-1, 1])  # which eye
    gap = float(np.clip(rng.normal(4.5, 0.35), 3.5, 5.5))
    tilt = np.deg2rad(rng.normal(7, 3))  # the fovea lies a little below the disc
    axis = side * np.cos(tilt) + 1j * np.sin(tilt)
    centre = rng.uniform(0.0, 0.4) * gap  # fields centre on the macula or between it and the disc
    fovea = centre * axis + complex(rng.normal(0, 0.25), rng.normal(0, 0.3))
    return Eye(
        disc=fovea - gap * axis,
        fovea=fovea,
        disc_radius=float(rng.uniform(0.75, 0.95)),
        cup=float(rng.uniform(0.3, 0.6)),
        macula_radius=float(np.clip(rng.normal(1.25, 0.2), 0.8, 1.7)),
    )


def background(rng: np.random.Generator, eye: Eye, camera: Camera, grid: Grid) -> NDArray[np.float32]:
    """(3, h, w) float32 grey levels R, G, B of the lit fundus on the coarse grid, vessels and lesions left out."""
    retina = _retina(rng, eye, grid)
    colour = np.array(camera.colour, np.float32)[:, None, None]
    image = np.exp(retina) * colour
    _paint_disc(rng, eye, grid, image, colour)
    image *= _light(camera, grid)
    return _camera_marks(camera, grid, image)


def _retina(rng: np.random.Generator, eye: Eye, grid: Grid) -> Field:
    """(3, h, w) log reflectance: choroid, pigment, macula, nerve fibres, drusen."""
    to_fovea = grid.distance(eye.fovea.imag, eye.fovea.real)
    to_disc = grid.distance(eye.disc.imag, eye.disc.real)
    around_disc = grid.angle(eye.disc.imag, eye.disc.real)
    wide = np.float32(rng.uniform(0.03, 0.12))
    clouds = noise(rng, grid, 3.0) * wide + noise(rng, grid, 1.1) * 0.022 + noise(rng, grid, 0.4) * 0.010
    grain = (noise(rng, grid, 0.12) + noise(rng, grid, 0.05)) * np.float32(rng.uniform(0.008, 0.018))
    warm = noise(rng, grid, 2.2) * 0.05
    warped = grid.angle(eye.fovea.imag, eye.fovea.real) + noise(rng, grid, 0.7) * np.float32(0.03)
    tigroid = streaks(rng, to_fovea + noise(rng, grid, 0.6) * 0.25, warped, 130, 1.1) * (
        1 + 0.6 * noise(rng, grid, 1.5)
    )
    tigroid = np.tanh(tigroid) * step(to_fovea, 1.5, 6.0) * max(0.0, rng.normal(0.01, 0.03))
    fibres = streaks(rng, to_disc, around_disc, 220, 2.5) + 0.7 * streaks(rng, to_disc, around_disc, 420, 1.5)
    sheen = step(to_disc, 4.5, 0.9) * np.abs(np.sin(around_disc)) * rng.uniform(0.2, 1.0)
    macula = np.exp(-((to_fovea / eye.macula_radius) ** 2)) * rng.uniform(0.16, 0.32)
    pit = np.exp(-((to_fovea / 0.3) ** 2)) * rng.uniform(0.08, 0.22)
    reflex = np.exp(-((to_fovea / 0.06) ** 2)) * max(0.0, rng.normal(0.0, 0.08))
    halo = np.exp(-((to_disc / 1.6) ** 2)) * rng.uniform(0.02, 0.12)
    drusen = _drusen(rng, eye, grid)
    pigment = _pigment(rng, grid)
    clumps = _clumps(rng, grid)
    shared = clouds + grain + fibres * sheen * 0.022 + sheen * 0.05 + halo + reflex
    dark = macula + pit + pigment
    deep = np.float32(rng.uniform(0.6, 1.0))  # how much of it red light shows
    return np.stack(
        [
            shared * deep + tigroid * 0.7 - dark * (deep - 0.35) + drusen * 0.3 - clumps * 0.8,
            shared * 1.2 + tigroid * 1.3 - dark + warm + drusen - clumps,
            shared * 1.3 + tigroid - dark + warm + drusen * 0.8 - clumps * 0.9,
        ]
    ).astype(np.float32)


def _drusen(rng: np.random.Generator, eye: Eye, grid: Grid) -> Field:
    """(h, w) pale yellow spots about the macula in four eyes of ten, whatever the grade: they tell nothing."""
    count = int(np.exp(rng.uniform(np.log(5), np.log(120)))) if rng.random() < 0.4 else 0
    places = eye.fovea + rng.normal(0, 1.3, count) + 1j * rng.normal(0, 1.3, count)
    return _spots(grid, places, rng.uniform(0.03, 0.09, count), rng.uniform(0.05, 0.25, count), 1)


def _clumps(rng: np.random.Generator, grid: Grid) -> Field:
    """(h, w) clumps of pigment in six eyes of ten, whatever the grade: the number, size, darkness and edges of
    haemorrhages, but brown, so that neither how much is dark nor how sharp tells the grade."""
    count = int(np.exp(rng.uniform(np.log(3), np.log(140)))) if rng.random() < 0.6 else 0
    radii = np.exp(rng.uniform(np.log(0.04), np.log(0.24), count))
    places = rng.uniform(-6.5, 6.5, count) + 1j * rng.uniform(-6.5, 6.5, count)
    return _spots(grid, places, radii, rng.uniform(0.15, 0.5, count), 3)


def _spots(grid: Grid, places: Points, radii: Reals, strengths: Reals, power: int) -> Field:
    """(h, w) spots of those strengths, Gaussian for power 1, flat with an edge for more."""
    field = np.zeros(grid.shape, np.float32)
    for place, radius, strength in zip(places, radii, strengths, strict=True):
        rows = slice(*np.searchsorted(grid.y[:, 0], [place.imag - 3 * radius, place.imag + 3 * radius]))
        cols = slice(*np.searchsorted(grid.x[0], [place.real - 3 * radius, place.real + 3 * radius]))
        square = ((grid.y[rows] - place.imag) ** 2 + (grid.x[:, cols] - place.real) ** 2) / radius**2
        np.maximum(field[rows, cols], strength * np.exp(-(square**power)), out=field[rows, cols])
    return field


def _pigment(rng: np.random.Generator, grid: Grid) -> Field:
    """(h, w) soft mottling, strong, weak or none, whatever the grade: how much is dark tells nothing."""
    patches: Field = step(noise(rng, grid, 1.0), 0.3, 3.3) * np.float32(max(0.0, rng.uniform(-0.1, 0.3)))
    return patches


def _paint_disc(rng: np.random.Generator, eye: Eye, grid: Grid, image: Field, colour: Field) -> None:
    """Blend the disc, its cup and a crescent of atrophy into `image` (3, h, w), in place."""
    reach = 2.2 * eye.disc_radius
    rows = slice(*np.searchsorted(grid.y[:, 0], [eye.disc.imag - reach, eye.disc.imag + reach]))
    cols = slice(*np.searchsorted(grid.x[0], [eye.disc.real - reach, eye.disc.real + reach]))
    near = Grid(grid.y[rows], grid.x[:, cols])
    axis = (eye.fovea - eye.disc) / abs(eye.fovea - eye.disc)
    angle = near.angle(eye.disc.imag, eye.disc.real) - np.float32(np.angle(axis))  # 0 is temporal
    distance = near.distance(eye.disc.imag, eye.disc.real) / np.float32(eye.disc_radius)
    wobble = (
        1
        + 0.05 * np.cos(2 * angle - np.pi)
        + 0.025 * np.cos(3 * angle + rng.uniform(0, 6))
        + noise(rng, near, 0.4) * 0.012
    )
    distance = distance / wobble
    mottle = 1 + noise(rng, near, 0.15) * 0.02 + noise(rng, near, 0.6) * 0.03
    crescent = step(distance, 1.5, 1.1) * step(np.cos(angle), 0.2, 0.9) * max(0.0, rng.normal(-0.05, 0.15))
    edge = rng.uniform(0.07, 0.16)
    disc = step(distance, 1 + edge, 1 - edge)
    cup_centre = eye.disc + 0.08 * eye.disc_radius * axis
    cup = step(near.distance(cup_centre.imag, cup_centre.real) / np.float32(eye.disc_radius * eye.cup), 1.9, 0.2)
    pale = 0.25 * (1 + np.cos(angle)) * step(distance, 0.2, 0.9)  # the temporal rim is paler than the nasal one
    rim_gain, cup_gain, pale_gain = (1.36, 1.75, 1.9), (0.12, 0.45, 1.3), (0.05, 0.22, 0.3)
    for plane, c, rim, extra, side in zip(image, colour[:, 0, 0], rim_gain, cup_gain, pale_gain, strict=True):
        target = c * (rim + extra * cup + side * pale) * mottle
        part = plane[rows, cols]
        part *= 1 + crescent
        part += disc * (target - part)


def _light(camera: Camera, grid: Grid) -> Field:
    """(3, h, w) illumination: vignette and a tilt across the field."""
    radius = np.minimum(grid.distance(0, 0) / np.float32(FIELD_UM / 2000), 1.05)
    tilt = (camera.tilt[0] * grid.y + camera.tilt[1] * grid.x) / np.float32(FIELD_UM / 2000)
    lost = np.array(camera.vignette, np.float32)[:, None, None]
    light: Field = (1.06 - lost * radius ** np.float32(camera.falloff) + tilt).astype(np.float32)
    return light


def _camera_marks(camera: Camera, grid: Grid, image: Field) -> Field:
    """Add flare at the rim (pale, additive) and dust on the lens (grey, soft) to `image` (3, h, w)."""
    angle, reach, strength = camera.flare
    radius = FIELD_UM / 2000
    from_rim = radius * 1.9 - grid.distance(-np.sin(angle) * radius * 0.9, -np.cos(angle) * radius * 0.9)
    glow = np.exp(-np.maximum(from_rim, 0) / np.float32(reach * radius)) * np.float32(strength * 255)
    for plane, share in zip(image, (0.55, 0.8, 0.6), strict=True):
        plane += glow * np.float32(share)
    for y, x, size, depth in camera.dust:
        image *= 1 - np.float32(depth) * step(grid.distance(y, x), size * 1.3, size * 0.7)
    return np.maximum(image, 0)
