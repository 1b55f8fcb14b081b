"""Half-open boxes on a pixel grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

Extent = tuple[int, int]
"""Height and width of a whole map, in its own pixels."""


@dataclass(frozen=True, slots=True)
class Region:
    """The box [y0, y1) x [x0, x1). It may be empty, and it may reach outside a map.

    >>> Region(0, 4, 2, 6).intersect(Region(1, 9, 0, 3))
    Region(y0=1, y1=4, x0=2, x1=3)
    """

    y0: int
    y1: int
    x0: int
    x1: int

    @classmethod
    def whole(cls, extent: Extent) -> Region:
        """The box that covers a map of this extent."""
        return cls(0, extent[0], 0, extent[1])

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def shape(self) -> Extent:
        return self.height, self.width

    @property
    def area(self) -> int:
        """Pixels inside, 0 for an empty box."""
        return max(0, self.height) * max(0, self.width)

    @property
    def empty(self) -> bool:
        return self.y0 >= self.y1 or self.x0 >= self.x1

    def intersect(self, other: Region) -> Region:
        """What both cover; empty (area 0) when they do not meet."""
        return Region(max(self.y0, other.y0), min(self.y1, other.y1), max(self.x0, other.x0), min(self.x1, other.x1))

    def hull(self, other: Region) -> Region:
        """The smallest box that holds both.

        >>> Region(0, 1, 0, 1).hull(Region(3, 4, 2, 3))
        Region(y0=0, y1=4, x0=0, x1=3)
        """
        if self.empty or other.empty:
            return other if self.empty else self
        return Region(min(self.y0, other.y0), max(self.y1, other.y1), min(self.x0, other.x0), max(self.x1, other.x1))

    def minus(self, other: Region) -> list[Region]:
        """What is left of this box without the other, as boxes that do not meet: above, below, left, right.

        >>> [str(box) for box in Region(0, 4, 0, 4).minus(Region(1, 3, 0, 2))]
        ['y [0, 1) x [0, 4)', 'y [3, 4) x [0, 4)', 'y [1, 3) x [2, 4)']
        """
        hole = self.intersect(other)
        if hole.empty:
            return [] if self.empty else [self]
        boxes = (
            Region(self.y0, hole.y0, self.x0, self.x1),
            Region(hole.y1, self.y1, self.x0, self.x1),
            Region(hole.y0, hole.y1, self.x0, hole.x0),
            Region(hole.y0, hole.y1, hole.x1, self.x1),
        )
        return [box for box in boxes if not box.empty]

    def contains(self, other: Region) -> bool:
        """Whether every pixel of `other` is in this box."""
        return other.empty or self.hull(other) == self

    def within(self, origin: Region) -> tuple[slice, slice]:
        """Slices that cut this box out of an array that covers `origin`.

        >>> Region(5, 7, 3, 4).within(Region(4, 9, 3, 9))
        (slice(1, 3, None), slice(0, 1, None))
        """
        if not origin.contains(self):
            raise ValueError(f"region={self} is not inside {origin}")
        return (
            slice(self.y0 - origin.y0, self.y1 - origin.y0),
            slice(self.x0 - origin.x0, self.x1 - origin.x0),
        )

    def __str__(self) -> str:
        return f"y [{self.y0}, {self.y1}) x [{self.x0}, {self.x1})"


def interior(extent: Extent, border: float) -> Region:
    """Pixels with border * h < y < h - border * h, likewise x: Formula 1 of paper A. A border of 0 excludes nothing.

    >>> interior((100, 55), 0.1)
    Region(y0=11, y1=90, x0=6, x1=50)
    """
    if not 0 <= border < 0.5:
        raise ValueError(f"border={border} must be in [0, 0.5): it is the share cut off at each side")
    if border == 0:
        return Region.whole(extent)
    share = Fraction(str(border))  # 0.1 is meant as a tenth, not as its nearest double
    (y0, y1), (x0, x1) = ((math.floor(share * n) + 1, math.ceil(n - share * n)) for n in extent)
    if y0 >= y1 or x0 >= x1:
        raise ValueError(f"border={border} leaves no pixel of a map of {extent[0]} x {extent[1]}")
    return Region(y0, y1, x0, x1)
