"""The published methods' steps, values in and values out: preprocessing, crops, the decision threshold, measures."""

from .crops import crop_region, cut, normalise_crop, random_centre, unhealthy
from .decision import Threshold, fit_threshold, log_odds
from .preprocessing import (
    Extremes,
    Normalised,
    Subtracted,
    average_image,
    extremes,
    normalise_square,
    resize_square,
)

__all__ = [
    "Extremes",
    "Normalised",
    "Subtracted",
    "Threshold",
    "average_image",
    "crop_region",
    "cut",
    "extremes",
    "fit_threshold",
    "log_odds",
    "normalise_crop",
    "normalise_square",
    "random_centre",
    "resize_square",
    "unhealthy",
]
