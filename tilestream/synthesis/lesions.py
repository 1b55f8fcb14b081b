"""Where lesions lie: how many of each kind a grade has, how large they are, how dark or bright, and where they sit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tilestream.synthesis.anatomy import Eye
from tilestream.synthesis.camera import FIELD_UM, Camera

LESION_KINDS: tuple[str, ...] = (
    "microaneurysm",
    "haemorrhage",
    "exudate",
    "cotton_wool",
    "neovessels",
    "irma",
    "preretinal_haemorrhage",
)
"""Kinds in the order of a lesion map's values: 1 + index."""

COUNTS: tuple[dict[str, tuple[int, int]], ...] = (
    {},
    {"microaneurysm": (1, 5)},
    {"microaneurysm": (5, 25), "haemorrhage": (1, 30), "exudate": (0, 40), "cotton_wool": (0, 3)},
    {"microaneurysm": (20, 60), "haemorrhage": (84, 160), "exudate": (0, 80), "cotton_wool": (0, 8), "irma": (0, 6)},
    {
        "microaneurysm": (10, 60),
        "haemorrhage": (10, 120),
        "exudate": (0, 80),
        "cotton_wool": (0, 8),
        "neovessels": (1, 3),
        "preretinal_haemorrhage": (0, 1),
    },
)
"""Smallest and largest number of each kind, by grade 0..4; grade 3 has 21-40 haemorrhages in each quadrant."""

MICROANEURYSM_UM = {"realistic": (25.0, 20.0, 60.0), "stress": (16.0, 12.0, 20.0)}
"""Median and clipping limits of the log-normal diameter, by tier."""


@dataclass(frozen=True)
class Spot:
    """A lesion on the retina: complex mm x + iy from the field's centre, `contrast` a share of the green background."""

    kind: str
    shape: str
    place: complex
    radius_mm: float
    contrast: float


def scatter(rng: np.random.Generator, grade: int, tier: str, eye: Eye, camera: Camera) -> list[Spot]:
    """Draw the lesions of one photograph: inside the field of view and the frame, off the disc, none over another."""
    spots: list[Spot] = []
    for kind in sorted(COUNTS[grade], key=lambda k: -LESION_KINDS.index(k)):  # the large ones find room first
        low, high = COUNTS[grade][kind]
        quadrants: list[int | None] = [None] * int(rng.integers(low, high + 1))
        if kind == "haemorrhage" and grade == 3:
            quadrants = [q for q in range(4) for _ in range(int(rng.integers(21, 41)))]
        forms = [_form(rng, kind, tier) for _ in quadrants]
        places = _places(rng, kind, eye)
        for (shape, radius, contrast), quadrant in zip(forms, quadrants, strict=True):
            place = _find(rng, places, radius, quadrant, eye, camera, spots)
            spots.append(Spot(kind, shape, place, radius, contrast))
    return spots


def _form(rng: np.random.Generator, kind: str, tier: str) -> tuple[str, float, float]:
    """Shape, radius in mm and contrast of one lesion, from the table of sizes and contrasts."""
    if kind == "microaneurysm":
        median, low, high = MICROANEURYSM_UM[tier]
        diameter = float(np.clip(rng.lognormal(np.log(median), 0.4), low, high))
        return "disc", diameter / 2000, -float(rng.uniform(0.10, 0.25))
    if kind == "haemorrhage":
        shape = str(rng.choice(["dot", "blot", "flame"], p=[0.62, 0.23, 0.15]))
        if shape == "flame":
            return shape, 0.3 * float(rng.uniform(0.8, 1.2)), -float(rng.uniform(0.20, 0.40))
        low, high = (80, 200) if shape == "dot" else (200, 700)
        return shape, float(np.exp(rng.uniform(np.log(low), np.log(high)))) / 2000, -float(rng.uniform(0.20, 0.45))
    if kind == "exudate":
        return "cluster", float(np.exp(rng.uniform(np.log(30), np.log(300)))) / 2000, float(rng.uniform(0.20, 0.60))
    if kind == "cotton_wool":
        return "wool", float(rng.uniform(0.15, 0.40)), float(rng.uniform(0.10, 0.30))
    if kind == "preretinal_haemorrhage":
        return "boat", float(rng.uniform(0.5, 1.1)), -float(rng.uniform(0.35, 0.45))
    area = rng.uniform(0.2, 2.0) if kind == "neovessels" else rng.uniform(0.05, 0.2)  # mm2
    return "net", float(np.sqrt(area / np.pi)), -float(rng.uniform(0.10, 0.25))


def _places(rng: np.random.Generator, kind: str, eye: Eye) -> Iterator[complex]:
    """Endless candidates: exudates in clusters and rings by the macula, cotton wool by the disc, others anywhere."""
    clusters = [
        (
            eye.fovea + rng.uniform(0.3, 2.6) * np.exp(1j * rng.uniform(-np.pi, np.pi)),
            rng.uniform(0.25, 0.9),
            rng.random() < 0.5,
        )
        for _ in range(int(rng.integers(1, 5)))
    ]
    tries = 0
    while True:
        tries += 1
        turn = np.exp(1j * rng.uniform(-np.pi, np.pi))
        if kind == "exudate" and tries % 8:
            centre, reach, ring = clusters[int(rng.integers(len(clusters)))]
            yield centre + turn * (rng.normal(reach, 0.1) if ring else abs(rng.normal(0, 0.6 * reach)))
        elif kind in ("cotton_wool", "neovessels", "irma") and tries % 8:
            yield eye.disc + turn * rng.uniform(1.2, 4.5)
        else:
            yield turn * np.sqrt(rng.random()) * FIELD_UM / 2000


def _find(
    rng: np.random.Generator,
    places: Iterator[complex],
    radius: float,
    quadrant: int | None,
    eye: Eye,
    camera: Camera,
    spots: list[Spot],
) -> complex:
    """The first candidate that is seen whole, off the disc, in its quadrant and clear of the other lesions."""
    apart = 1.5 * camera.um_per_px / 1000  # no two lesions share a pixel, however small the photograph
    for _ in range(20_000):
        place = next(places)
        if quadrant is not None:
            place = complex(abs(place.real) * (1, -1)[quadrant % 2], abs(place.imag) * (1, -1)[quadrant // 2])
        if (
            camera.sees(place.imag, place.real, radius + 0.1)
            and abs(place - eye.disc) > 1.15 * eye.disc_radius + radius
            and all(abs(place - s.place) > max(apart, radius + s.radius_mm) for s in spots)
        ):
            return place
    raise RuntimeError(f"no room for a lesion of radius_mm={radius:.2f} among {len(spots)}; use another seed")
