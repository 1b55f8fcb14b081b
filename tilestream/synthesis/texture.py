"""Smooth random fields on a coarse grid in retinal millimetres, so that a seed gives the same eye at any size."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tilestream.synthesis.camera import FIELD_UM, Camera

Field = NDArray[np.float32]
GRID_UM = 16.0


@dataclass(frozen=True)
class Grid:
    """Coarse pixel centres over the whole frame, mm from the centre of the field of view: y (h, 1), x (1, w)."""

    y: Field
    x: Field

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        return self.y.size, self.x.size

    def distance(self, y_mm: float, x_mm: float) -> Field:
        """(h, w) distance in mm from a point."""
        dy, dx = np.broadcast_arrays(self.y - np.float32(y_mm), self.x - np.float32(x_mm))
        length: Field = cv2.magnitude(np.ascontiguousarray(dy), np.ascontiguousarray(dx))
        return length

    def angle(self, y_mm: float, x_mm: float) -> Field:
        """(h, w) angle in radians about a point, 0..2 pi, growing from x to y."""
        dy, dx = np.broadcast_arrays(self.y - np.float32(y_mm), self.x - np.float32(x_mm))
        turn: Field = cv2.phase(np.ascontiguousarray(dx), np.ascontiguousarray(dy))
        return turn


def coarse_grid(camera: Camera) -> Grid:
    """The grid on which the background is computed before cv2.resize carries it to full size."""

    def axis(length: int) -> Field:
        n = max(2, round(length / max(1.0, GRID_UM / camera.um_per_px)))
        px = (np.arange(n) + 0.5) * (length / n) - length / 2
        return (px * camera.um_per_px / 1000).astype(np.float32)

    return Grid(axis(camera.height)[:, None], axis(camera.width)[None, :])


def noise(rng: np.random.Generator, grid: Grid, scale_mm: float) -> Field:
    """(h, w) smooth noise of mean 0 and standard deviation about 1; details are about `scale_mm` wide."""
    reach = FIELD_UM / 2000 + 0.5
    n = int(np.ceil(2 * reach / scale_mm)) + 2
    lattice = rng.standard_normal((n, n), np.float32)
    map_y, map_x = np.broadcast_arrays((grid.y + reach) / scale_mm, (grid.x + reach) / scale_mm)
    return sample(lattice, map_y, map_x) * np.float32(1.4)


def streaks(rng: np.random.Generator, radius: Field, angle: Field, around: int, along_mm: float) -> Field:
    """(h, w) noise drawn out along the radius: `around` details a turn, each `along_mm` long."""
    lattice = rng.standard_normal((int(16 / along_mm) + 2, around), np.float32)
    return sample(
        np.hstack([lattice, lattice[:, :1]]), radius / np.float32(along_mm), angle * np.float32(around / (2 * np.pi))
    )


def sample(lattice: Field, map_y: Field, map_x: Field) -> Field:
    """Cubic samples of a lattice at float positions."""
    samples: Field = cv2.remap(
        lattice,
        np.ascontiguousarray(map_x, np.float32),
        np.ascontiguousarray(map_y, np.float32),
        cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REFLECT,
    )
    return samples


def step(value: Field, low: float, high: float) -> Field:
    """Smooth step from 0 at `low` to 1 at `high` (either order)."""
    t: Field = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)
