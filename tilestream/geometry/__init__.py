"""Boxes, sliding windows and tile plans: the arithmetic of exact tiling, in the standard library alone.

Order is (y, x), boxes are half-open, nothing is clamped or rounded without being asked for.
"""

from .plan import Tile, TilePlan, tile_regions
from .region import Extent, Region, interior
from .window import Window

__all__ = ["Extent", "Region", "Tile", "TilePlan", "Window", "interior", "tile_regions"]
