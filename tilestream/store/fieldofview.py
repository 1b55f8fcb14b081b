"""The field of view: the circle, cut off above and below by many cameras, in which a photograph shows the eye."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


def field_of_view(top: Pixels, scale: float) -> dict[str, float] | None:
    """Circle and cuts, in px of the photograph, from its smallest level (height, width, 3), each pixel `scale` px wide.

    {"y_px", "x_px", "radius_px", "first_row_px", "last_row_px"}; None where no circle fits, as in a photograph without
    a dark margin. The foreground is what Otsu's threshold on the brightest channel leaves, at most a tenth of the
    scale; the circle is fitted by least squares (Kasa 1976) to the ends of its rows, those off it left out.
    """
    grey = cv2.medianBlur(np.ascontiguousarray(top.max(axis=2)), 5) if min(top.shape[:2]) > 5 else top.max(axis=2)
    threshold = min(cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0], 25.0)
    count, labels, facts, _ = cv2.connectedComponentsWithStats((grey > threshold).astype(np.uint8))
    if count < 2:
        return None
    inside = labels == 1 + int(facts[1:, cv2.CC_STAT_AREA].argmax())
    rows = np.flatnonzero(inside.any(axis=1))
    left, right = inside.argmax(axis=1)[rows], inside.shape[1] - 1 - inside[:, ::-1].argmax(axis=1)[rows]
    margin = (left > 0) & (right < inside.shape[1] - 1)  # ends that the frame cuts off lie on no circle
    y = np.concatenate([rows[margin], rows[margin]]).astype(float)
    x = np.concatenate([left[margin] - 0.5, right[margin] + 0.5])
    if len(y) < 32:
        return None
    for _ in range(5):
        centre_y, centre_x, radius = _circle(y, x)
        off = np.abs(np.hypot(y - centre_y, x - centre_x) - radius)
        near = off <= max(2.0, 3 * float(np.median(off)))
        y, x = y[near], x[near]
    off = np.abs(np.hypot(y - centre_y, x - centre_x) - radius)
    if len(y) < 32 or float(np.median(off)) > 0.02 * radius or not 0.2 < radius / max(inside.shape) < 2:
        return None
    ends = (max(0.0, float(rows[0])), float(rows[-1]))
    values = {"y_px": centre_y, "x_px": centre_x, "first_row_px": ends[0], "last_row_px": ends[1]}
    found = {name: round((value + 0.5) * scale - 0.5, 1) for name, value in values.items()}
    return {**found, "radius_px": round(radius * scale, 1)}


def _circle(y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Least squares of y^2 + x^2 = 2 a y + 2 b x + c."""
    matrix = np.stack([2 * y, 2 * x, np.ones_like(y)], axis=1)
    a, b, c = np.linalg.lstsq(matrix, y**2 + x**2, rcond=None)[0]
    return float(a), float(b), float(np.sqrt(max(0.0, c + a**2 + b**2)))
