"""The published methods' steps, values in and values out: preprocessing, crops, the decision threshold, measures."""

from .centres import Border, FieldOfView, Search, Seen, conclude, eye_rules, look
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
from .smoothgrad import Noise, Noisy

__all__ = [
    "Border",
    "Extremes",
    "FieldOfView",
    "Noise",
    "Noisy",
    "Normalised",
    "Search",
    "Seen",
    "Subtracted",
    "Threshold",
    "average_image",
    "conclude",
    "crop_region",
    "cut",
    "extremes",
    "eye_rules",
    "fit_threshold",
    "log_odds",
    "look",
    "normalise_crop",
    "normalise_square",
    "random_centre",
    "resize_square",
    "unhealthy",
]
