"""Where lesions lie: how many of each kind a grade has, how large they are, how dark or bright, and where they sit.

Tier `realistic` follows the tables of sizes, contrasts and counts. Tier `stress` keeps the counts of microaneurysms,
haemorrhages and exudates, but each of them is a disc of 12-20 um and a contrast of 20-25 %, about the least that a
network can find at full resolution and too little once the frame is squashed to 1024 px; lesions that are large by
nature (cotton wool, vessels, preretinal blood) are left out. So small lesions alone, by their number, tell grades 2-4
from 0-1; grades 2, 3 and 4 differ from each other by number only. They gather in foci, one to three a
photograph (grade 3: one in each quadrant), because one crop decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tilestream.synthesis.anatomy import Eye
from tilestream.synthesis.camera import FIELD_UM, Camera
from tilestream.synthesis.vessels import Vessel

LESION_KINDS: tuple[str, ...] = (
    "microaneurysm",
    "haemorrhage",
    "exudate",
    "cotton_wool",
    "neovessels",
    "irma",
    "preretinal_haemorrhage",
    "venous_beading",
)
"""Kinds in the order of a lesion map's values: 1 + index."""

COUNTS: tuple[dict[str, tuple[int, int]], ...] = (
    {},
    {"microaneurysm": (1, 5)},
    {"microaneurysm": (5, 25), "haemorrhage": (1, 30), "exudate": (0, 40), "cotton_wool": (0, 3)},
    {"microaneurysm": (20, 60), "haemorrhage": (20, 160), "exudate": (0, 80), "cotton_wool": (0, 8)},
    {
        "microaneurysm": (10, 60),
        "haemorrhage": (10, 120),
        "exudate": (0, 80),
        "cotton_wool": (0, 8),
        "neovessels": (1, 3),
        "preretinal_haemorrhage": (0, 1),
    },
)
"""Smallest and largest number of each kind, by grade 0..4. What makes grade 3 is in SEVERE."""

SEVERE: dict[str, float] = {"haemorrhage": 0.6, "venous_beading": 0.2, "irma": 0.2}
"""What makes a photograph grade 3, with shares: 21-40 haemorrhages in each quadrant (84-160 in all); or veins beaded in
two quadrants or more; or 1-6 intraretinal microvascular abnormalities. The latter two have 5-20 haemorrhages in each
quadrant. In tier `stress` it is always the first."""

TIERS: dict[str, tuple[float, float, float]] = {"realistic": (25.0, 20.0, 60.0), "stress": (16.0, 12.0, 20.0)}
"""Median and clipping limits of the log-normal diameter of a microaneurysm in um, by tier."""

SMALL: frozenset[str] = frozenset({"microaneurysm", "haemorrhage", "exudate"})
"""The kinds that tier `stress` has."""


@dataclass(frozen=True)
class Spot:
    """A lesion on the retina: complex mm x + iy from the field's centre, `contrast` a share of the green background.

    Venous beading has no contrast of its own: it is the swell of the vein through `place`.
    """

    kind: str
    shape: str
    place: complex
    radius_mm: float
    contrast: float


@dataclass(frozen=True)
class Scene:
    """What lesions must keep to: the tier, the eye with its vessels, what the camera sees."""

    tier: str
    eye: Eye
    vessels: Sequence[Vessel]
    camera: Camera


def scatter(rng: np.random.Generator, grade: int, scene: Scene) -> list[Spot]:
    """Draw the lesions of one photograph: inside the field of view and the frame, off the disc, none over another."""
    spots: list[Spot] = []
    stress = scene.tier == "stress"
    severe = str(rng.choice(list(SEVERE), p=list(SEVERE.values()))) if grade == 3 and not stress else "haemorrhage"
    counts = COUNTS[grade] | ({"irma": (1, 6)} if severe == "irma" else {})
    if severe == "venous_beading":
        spots += _beads(rng, scene)
    foci = [_anywhere(rng) * 0.75 for _ in range(int(rng.integers(1, 4)) if grade in (2, 4) else 1)] if stress else []
    for kind in sorted(counts, key=lambda k: -LESION_KINDS.index(k)):  # the large ones find room first
        low, high = counts[kind]
        quadrants: list[int | None] = [None] * int(rng.integers(low, high + 1))
        if kind == "haemorrhage" and grade == 3:
            few, many = (21, 40) if severe == "haemorrhage" else (5, 20)
            quadrants = [q for q in range(4) for _ in range(int(rng.integers(few, many + 1)))]
        if stress and kind not in SMALL:
            continue
        forms = [_form(rng, kind, scene.tier) for _ in quadrants]
        places = _foci(rng, foci) if stress else _places(rng, kind, scene.eye)
        for (shape, radius, contrast), quadrant in zip(forms, quadrants, strict=True):
            place = _find(rng, places, radius, quadrant, scene, spots)
            spots.append(Spot(kind, shape, place, radius, contrast))
    return spots


def _form(rng: np.random.Generator, kind: str, tier: str) -> tuple[str, float, float]:
    """Shape, radius in mm and contrast of one lesion, from the table of sizes and contrasts."""
    if kind == "microaneurysm" or tier == "stress":
        median, low, high = TIERS[tier]
        diameter = float(np.clip(rng.lognormal(np.log(median), 0.4), low, high))
        contrast = float(rng.uniform(0.20 if tier == "stress" else 0.10, 0.25))
        return "disc", diameter / 2000, contrast if kind == "exudate" else -contrast
    if kind == "haemorrhage":
        shape = str(rng.choice(["dot", "blot", "flame"], p=[0.75, 0.12, 0.13]))
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


def _anywhere(rng: np.random.Generator) -> complex:
    """A point of the field of view, every one as likely."""
    return complex(np.exp(1j * rng.uniform(-np.pi, np.pi)) * np.sqrt(rng.random()) * FIELD_UM / 2000)


def _foci(rng: np.random.Generator, foci: Sequence[complex]) -> Iterator[complex]:
    """Endless candidates about the foci, within half a millimetre mostly, further out the longer none fits."""
    reach = 0.3
    while True:
        yield foci[int(rng.integers(len(foci)))] + reach * complex(*rng.normal(size=2))
        reach *= 1.001


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
            yield _anywhere(rng)


def _find(
    rng: np.random.Generator,
    places: Iterator[complex],
    radius: float,
    quadrant: int | None,
    scene: Scene,
    spots: list[Spot],
) -> complex:
    """The first candidate that is seen whole, off the disc, in its quadrant and clear of the other lesions."""
    apart = 1.5 * scene.camera.um_per_px / 1000  # no two lesions share a pixel, however small the photograph
    for _ in range(20_000):
        place = next(places)
        if quadrant is not None:
            place = complex(abs(place.real) * (1, -1)[quadrant % 2], abs(place.imag) * (1, -1)[quadrant // 2])
        clear = all(abs(place - s.place) > max(apart, radius + s.radius_mm) for s in spots)
        if clear and _fits(place, radius, scene):
            return place
    raise RuntimeError(f"no room for a lesion of radius_mm={radius:.2f} among {len(spots)}; use another seed")


def _fits(place: complex, radius: float, scene: Scene) -> bool:
    """Whether a lesion there is seen whole and lies off the disc."""
    seen = scene.camera.sees(place.imag, place.real, radius + 0.1)
    return seen and abs(place - scene.eye.disc) > 1.15 * scene.eye.disc_radius + radius


def _beads(rng: np.random.Generator, scene: Scene) -> list[Spot]:
    """Stretches of beaded veins, 1-1.6 mm long, in two to four quadrants, if that many have veins."""
    radius = float(rng.uniform(0.5, 0.8))
    veins = [v.points[v.calibre_um > 60] for v in scene.vessels if not v.artery]
    points = [complex(z) for z in np.concatenate(veins) if _fits(z, radius, scene)]
    spots: list[Spot] = []
    wanted = int(rng.integers(2, 5))
    for quadrant in rng.permutation(4):
        here = [z for z in points if (z.real < 0) + 2 * (z.imag < 0) == quadrant]
        clear = [z for z in here if all(abs(z - s.place) > 2 * radius for s in spots)]
        if clear and len(spots) < wanted:
            spots.append(Spot("venous_beading", "beads", clear[int(rng.integers(len(clear)))], radius, 0.0))
    return spots
