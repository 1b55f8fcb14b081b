"""The camera: frame, field of view, optics and sensor, all drawn without looking at the grade."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

FIELD_UM = 13_100.0  # 45 degrees on the retina
FILL = 1.055  # the circle's diameter over the frame's short side, as cameras cut it at top and bottom
MIN_SIDE_PX = 256

FRAMES: tuple[tuple[tuple[int, int], float], ...] = (
    ((3168, 4752), 0.20),
    ((2592, 3888), 0.30),
    ((2304, 3456), 0.10),
    ((1944, 2592), 0.25),
    ((1536, 2304), 0.05),
    ((1488, 2240), 0.05),
    ((960, 1440), 0.05),
)
"""Frame sizes (height, width) in px, each with its share."""


@dataclass(frozen=True)
class Camera:
    """One exposure's frame and optics; positions on the retina are mm from the centre of the field of view."""

    height: int
    width: int
    colour: tuple[float, float, float]  # mean background, R G B, 0..255
    vignette: tuple[float, float, float]  # share of R, G, B lost at the rim
    falloff: float  # power of the radius by which it is lost
    tilt: tuple[float, float]  # uneven light across the field, (y, x)
    clarity: tuple[float, float, float]  # how deep vessels show in R, G, B, as a share of BLOOD_TAKES
    blur_um: float
    noise: float  # standard deviation, grey levels
    notch: float | None  # angle of the notch, radians
    flare: tuple[float, float, float]  # angle, reach (share of the radius), strength
    dust: tuple[tuple[float, float, float, float], ...]  # y, x, radius in mm, strength

    @property
    def radius_px(self) -> float:
        """Radius of the field of view."""
        short, long = sorted((self.height, self.width))
        return 0.5 * min(FILL * short, 0.97 * long)

    @property
    def um_per_px(self) -> float:
        """Retina per pixel."""
        return FIELD_UM / (2 * self.radius_px)

    def to_px(self, y_mm: float, x_mm: float) -> tuple[float, float]:
        """Position (y, x) in px of a point on the retina."""
        scale = 1000 / self.um_per_px
        return (self.height - 1) / 2 + y_mm * scale, (self.width - 1) / 2 + x_mm * scale

    def sees(self, y_mm: float, x_mm: float, margin_mm: float) -> bool:
        """Whether a disc of radius `margin_mm` lies inside both the field of view and the frame."""
        half = self.um_per_px / 2000
        return (
            np.hypot(y_mm, x_mm) + margin_mm < FIELD_UM / 2000
            and abs(y_mm) + margin_mm < self.height * half
            and abs(x_mm) + margin_mm < self.width * half
        )


def draw_camera(rng: np.random.Generator, size: tuple[int, int] | None) -> Camera:
    """Draw a camera; `size` (height, width) overrides the frame and nothing else. Raises ValueError on a tiny frame."""
    shares = np.array([share for _, share in FRAMES])
    drawn = FRAMES[rng.choice(len(FRAMES), p=shares / shares.sum())][0]
    height, width = drawn if size is None else size
    if min(height, width) < MIN_SIDE_PX:
        raise ValueError(
            f"size={(height, width)} is under {MIN_SIDE_PX} px on a side; use {MIN_SIDE_PX}x{MIN_SIDE_PX} or more"
        )
    clear, rim = float(rng.uniform(0.55, 1.35)), float(rng.uniform(0.1, 0.65))
    red = float(np.clip(rng.normal(176, 26), 120, 225))
    green = red * float(np.clip(rng.normal(0.48, 0.06), 0.34, 0.64))
    blue = green * min(float(rng.beta(1.6, 3.8)), 0.7)
    dust = tuple(
        (float(y), float(x), float(rng.uniform(0.05, 0.25)), float(rng.uniform(0.02, 0.07)))
        for y, x in rng.uniform(-6, 6, (rng.poisson(1.5), 2))
    )
    return Camera(
        height=height,
        width=width,
        colour=(red, green, blue),
        vignette=(rim * float(rng.uniform(0.6, 1.2)), rim, rim * float(rng.uniform(0.8, 1.2))),
        falloff=float(rng.uniform(2, 7)),
        tilt=(float(rng.normal(0, 0.1)), float(rng.normal(0, 0.1))),
        clarity=(clear * float(rng.uniform(0.4, 1.6)), clear, clear * float(rng.uniform(0.8, 1.2))),
        blur_um=float(rng.gamma(4, 1.6)),
        noise=float(rng.uniform(1.2, 4.2)),
        notch=float(rng.choice([-0.75, 0.75, -2.4])) if rng.random() < 0.5 else None,
        flare=(float(rng.uniform(-np.pi, np.pi)), float(rng.uniform(0.08, 0.25)), float(rng.gamma(1.2, 0.05))),
        dust=dust,
    )


def field_mask(camera: Camera) -> NDArray[np.uint8]:
    """(H, W) uint8: 255 inside the field of view, 0 outside, antialiased at the sharp rim, with the notch cut out."""
    mask = np.zeros((camera.height, camera.width), np.uint8)
    y, x = camera.to_px(0, 0)
    cv2.circle(mask, (round(x * 16), round(y * 16)), round(camera.radius_px * 16), 255, -1, cv2.LINE_AA, 4)
    if camera.notch is not None:
        out = np.array([np.cos(camera.notch), np.sin(camera.notch)]) * camera.radius_px
        side = np.array([-out[1], out[0]])
        teeth = [(1.03, -0.045), (0.975, -0.035), (0.995, 0.0), (0.975, 0.012), (0.99, 0.04), (1.03, 0.05)]
        points = np.array([(x, y) + a * out + b * side for a, b in teeth])
        cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], 0, cv2.LINE_AA, 4)
    soft: NDArray[np.uint8] = cv2.GaussianBlur(mask, (0, 0), max(0.5, 6 / camera.um_per_px))
    return soft


def sensor_noise(rng: np.random.Generator, camera: Camera) -> NDArray[np.float32]:
    """(H, W) float32 grey-level noise, the same for the three channels, as JPEG's subsampled colour leaves it."""
    noise = rng.standard_normal((camera.height, camera.width), np.float32)
    noise *= camera.noise * 1.35  # what the smoothing below takes away
    grain: NDArray[np.float32] = cv2.GaussianBlur(noise, (3, 3), 0.55)
    return grain
