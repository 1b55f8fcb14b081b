"""Arteries and veins: grown step by step from the disc, then drawn as antialiased ribbons.

Calibres at the disc, the diameter exponent of a branching (2.1) and the distance between branchings (20-30 diameters)
are anatomy's; points are complex mm x + iy from the centre of the field of view.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from tilestream.synthesis.anatomy import Eye
from tilestream.synthesis.camera import FIELD_UM, Camera

STEP_MM = 0.07
EXPONENT = 2.1
THINNEST_UM = 14.0
REACH_MM = FIELD_UM / 2000 + 0.4


@dataclass
class _Sprout:
    """A vessel about to grow; `route` holds waypoints that it steers for, or nothing."""

    start: complex
    heading: float
    calibre_um: float
    artery: bool
    route: list[complex] = field(default_factory=list)
    inward: bool = False


@dataclass(frozen=True)
class Vessel:
    """A grown vessel: points (n,) complex mm, calibre (n,) um, `swell` (n,) the share of it that disease leaves."""

    points: NDArray[np.complex128]
    calibre_um: NDArray[np.float64]
    artery: bool
    swell: NDArray[np.float64]


def grow(rng: np.random.Generator, eye: Eye) -> list[Vessel]:
    """Grow the whole tree of one eye, in the order to draw it: the darkest vessels last."""
    queue = deque(_trunks(rng, eye))
    taken: dict[tuple[int, int, bool], int] = {}
    vessels: list[Vessel] = []
    while queue:
        sprout = queue.popleft()
        vessel, children = _walk(rng, eye, sprout, taken, len(vessels))
        queue.extend(children)
        if len(vessel.points) > 4:
            vessels.append(vessel)
    return sorted(vessels, key=lambda v: float(_depth(v).max()))


def bead(vessels: list[Vessel], place: complex, reach_mm: float) -> list[Vessel]:
    """The same vessels, the vein through `place` beaded within `reach_mm` of it: bulges of 45 %, three calibres apart.

    `place` is a point of a vein, and the vessels' order stays.
    """
    return [v if v.artery or place not in v.points else _beaded(v, place, reach_mm) for v in vessels]


def _beaded(vessel: Vessel, place: complex, reach_mm: float) -> Vessel:
    middle = int(np.argmax(vessel.points == place))
    along = (np.arange(len(vessel.points)) - middle) * STEP_MM
    wave = np.cos(2000 * np.pi * along / (3 * vessel.calibre_um[middle]))
    fade = np.clip(2 - 2 * np.abs(along) / reach_mm, 0, 1)
    return replace(vessel, swell=vessel.swell * (1 + 0.45 * wave * fade))


def _trunks(rng: np.random.Generator, eye: Eye) -> list[_Sprout]:
    """Four arcades, an artery and a vein each, and small vessels straight from the disc."""
    gap = abs(eye.fovea - eye.disc)
    axis = (eye.fovea - eye.disc) / gap
    temporal = [(0.1, 0.75), (0.9, 1.9), (2.6, 2.9), (4.6, 3.1), (6.6, 2.6), (8.6, 1.6), (11.0, 0.8)]
    nasal = [(-0.25, 0.8), (-1.4, 2.2), (-3.0, 3.6), (-5.5, 5.5)]
    straight = [(-1.2, 0.15), (-3.0, 0.5), (-6.0, 1.0)]
    macular = [(0.9, 0.5), (2.2, 0.75), (3.4, 0.5)]
    sprouts = []
    for artery in (False, True):
        mean, spread = (135, 16) if artery else (151, 15)
        for side in (-1, 1):
            for shape, share in ((temporal, 1.0), (nasal, 0.72), (straight, 0.4), (macular, 0.3)):
                if share < 0.5 and rng.random() < 0.4:
                    continue
                bulge = rng.uniform(0.76, 1.06) * (0.94 if artery else 1.06)
                route = [
                    eye.disc + axis * (a * gap / 4.6 + 1j * side * b * bulge) + complex(*rng.normal(0, 0.2, 2))
                    for a, b in shape
                ]
                start = eye.disc - axis * 0.12 + complex(*rng.normal(0, 0.09, 2))
                heading = float(np.angle((route[0] - start) * np.exp(1j * rng.normal(0, 0.25))))
                calibre = float(np.clip(rng.normal(mean, spread), mean - 2 * spread, mean + 2 * spread)) * share
                sprouts.append(_Sprout(start, heading, calibre, artery, route))
    return sorted(sprouts, key=lambda s: -s.calibre_um)


def _walk(
    rng: np.random.Generator, eye: Eye, sprout: _Sprout, taken: dict[tuple[int, int, bool], int], label: int
) -> tuple[Vessel, list[_Sprout]]:
    """Grow one vessel to its end and collect the branches it throws off."""
    z, heading, calibre = sprout.start, sprout.heading, sprout.calibre_um
    route, bend, along = list(sprout.route), 0.0, 0.0
    next_branch = rng.uniform(0.6, 1.0) * 25 * calibre / 1000
    side = int(rng.choice([-1, 1]))
    points, calibres, children = [z], [calibre], []
    centre = 0.45 * eye.disc + 0.55 * eye.fovea
    wander = rng.uniform(0.018, 0.05)
    while abs(z) < REACH_MM and calibre > THINNEST_UM and len(points) < 260:
        while route and abs(route[0] - z) < 0.45:
            route.pop(0)
        aim = route[0] - z if route else (eye.fovea - z if sprout.inward else z - centre)
        pull = 0.16 if route else 0.035
        bend = 0.8 * bend + rng.normal(0, wander)
        heading += bend + pull * float(np.angle(aim * np.exp(-1j * heading)))
        z += STEP_MM * np.exp(1j * heading)
        along += STEP_MM
        calibre *= 1 - 0.004
        points.append(z)
        calibres.append(calibre)
        if abs(z - eye.fovea) < 0.35 + 0.01 * calibre:  # the avascular zone
            break
        cell = (int(np.floor(z.imag / 0.14)), int(np.floor(z.real / 0.14)), sprout.artery)
        owner = taken.setdefault(cell, label)
        if owner != label and len(points) > 9 and abs(z - eye.disc) > 1.3:  # its own kind is never crossed
            break
        if along > next_branch and abs(z - eye.disc) > 1.1:
            ratio = rng.uniform(0.3, 0.85) if route else rng.uniform(0.5, 1.0)
            thick = calibre / (1 + ratio**EXPONENT) ** (1 / EXPONENT)
            turn = side * rng.uniform(0.45, 1.05)
            way = np.exp(1j * (heading + turn))
            to_fovea = eye.fovea - z
            inward = bool(abs(to_fovea) < 4.2 and (way * np.conj(to_fovea)).real > 0)
            children.append(_Sprout(z, heading + turn, thick * ratio, sprout.artery, [], inward))
            heading -= 0.25 * turn * ratio
            calibre, side = thick, -side if rng.random() < 0.75 else side
            next_branch = along + rng.uniform(20, 30) * calibre / 1000
    widths = np.convolve(np.pad(calibres, 6, mode="edge"), np.full(13, 1 / 13), "valid")
    tail = min(len(points), 12)
    widths[-tail:] *= np.linspace(1, 0.45, tail)
    widths[:6] *= np.linspace(0.5, 1, 6)[: len(widths)]
    return Vessel(np.array(points), widths, sprout.artery, np.ones(len(points))), children


def absorbance(vessels: list[Vessel], camera: Camera) -> NDArray[np.uint8]:
    """(H, W) uint8: how much light blood takes away, 0 none, 255 the darkest vein. Thin over thick never lightens."""
    layer = np.zeros((camera.height, camera.width), np.uint8)
    middle = complex((camera.width - 1) / 2, (camera.height - 1) / 2)
    for vessel in vessels:
        points = _smooth(vessel.points) * (1000 / camera.um_per_px) + middle
        places = np.linspace(0, len(vessel.points) - 1, len(points))
        calibres = vessel.calibre_um * vessel.swell / camera.um_per_px
        widths = np.interp(places, np.arange(len(vessel.points)), calibres)
        values = np.interp(places, np.arange(len(vessel.points)), _depth(vessel))
        _band(layer, points, np.maximum(widths, 1.0), values * np.minimum(widths, 1.0))
        wide = widths > 6
        if wide.sum() > 1:  # the light streak along the middle
            _band(layer, points[wide], widths[wide] * 0.3, values[wide] * (0.66 if vessel.artery else 0.86))
    soft: NDArray[np.uint8] = cv2.GaussianBlur(layer, (0, 0), max(0.6, (7 + camera.blur_um) / camera.um_per_px))
    return soft


def _depth(vessel: Vessel) -> NDArray[np.float64]:
    """(n,) light taken away by the vessel's middle, 0..255 (a longer way through blood is darker)."""
    return (1 - np.exp(-vessel.calibre_um / 75)) * (199.0 if vessel.artery else 255.0)


def _smooth(points: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """Points smoothed and doubled, so that ribbons show no corners."""
    t = np.linspace(0, len(points) - 1, 2 * len(points) - 1)
    dense = np.interp(t, np.arange(len(points)), points)
    inner = (dense[:-2] + 2 * dense[1:-1] + dense[2:]) / 4
    return np.concatenate([dense[:1], inner, dense[-1:]])


def _band(
    layer: NDArray[np.uint8], points: NDArray[np.complex128], widths: NDArray[np.float64], values: NDArray[np.float64]
) -> None:
    """Draw a vessel in short ribbons, each of one value, overlapping so that no seam shows."""
    for first in range(0, len(points) - 1, 24):
        part = slice(first, first + 26)
        ribbon(layer, points[part], widths[part], float(values[part].mean()))


def ribbon(layer: NDArray[np.uint8], points: NDArray[np.complex128], widths: NDArray[np.float64], value: float) -> None:
    """Fill the band of the given widths (px) along points (px) with a value."""
    tangent = np.gradient(points)
    normal = 1j * tangent / np.maximum(np.abs(tangent), 1e-9) * widths / 2
    outline = np.concatenate([points + normal, (points - normal)[::-1]])
    corners = np.round(np.stack([outline.real, outline.imag], axis=1) * 16).astype(np.int32)
    cv2.fillPoly(layer, [corners], round(min(value, 255)), cv2.LINE_AA, 4)
