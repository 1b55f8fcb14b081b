"""Boxes, windows along an axis and tile plans: the arithmetic of exact tiling, in the standard library alone.

Order is (y, x), boxes are half-open, nothing is clamped or rounded without being asked for.
"""

from .axis import Axis, Interval, Pixel, Sliding, Table, Transposed
from .plan import GRANULARITIES, Granularity, Plan, SegmentPlan, Tile, TilePlan, tile_regions
from .region import Extent, Region, interior

__all__ = [
    "GRANULARITIES", "Axis", "Extent", "Granularity", "Interval", "Pixel", "Plan", "Region", "SegmentPlan", "Sliding",
    "Table", "Tile", "TilePlan", "Transposed", "interior", "tile_regions",
]  # fmt: skip
