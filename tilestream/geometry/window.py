"""Sliding windows: which inputs an output needs, which outputs an input influences."""

from __future__ import annotations

from dataclasses import dataclass

from .region import Extent, Region

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Window:
    """Kernel, stride, padding and dilation of a convolution or pooling, each (y, x).

    Padding is ((top, bottom), (left, right)). Along one axis output o reads the inputs
    o * stride - before + dilation * k for k in [0, kernel).
    """

    kernel: Pair
    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 on both axes")
        if min(*self.padding[0], *self.padding[1]) < 0:
            raise ValueError(f"padding={self.padding} must not be negative")

    @property
    def reach(self) -> Pair:
        """Inputs that one output spans, (y, x)."""
        return self.dilation[0] * (self.kernel[0] - 1) + 1, self.dilation[1] * (self.kernel[1] - 1) + 1

    def extent(self, extent: Extent) -> Extent:
        """Extent of the output map; ValueError when not one window fits.

        >>> Window((7, 7), (2, 2), ((3, 3), (3, 3))).extent((2848, 4288))
        (1424, 2144)
        """
        out = tuple(
            (n + sum(pad) - reach) // stride + 1
            for n, pad, reach, stride in zip(extent, self.padding, self.reach, self.stride, strict=True)
        )
        if min(out) < 1:
            raise ValueError(
                f"a window that spans {self.reach} does not fit a map of {extent} with padding {self.padding}"
            )
        return out[0], out[1]

    def span(self, region: Region) -> Region:
        """Inputs that the outputs in `region` read, padding included, so it may reach outside the input map."""
        (y0, y1), (x0, x1) = (
            (lo * stride - pad[0], (hi - 1) * stride - pad[0] + reach)
            for lo, hi, stride, pad, reach in self._axes(region)
        )
        return Region(y0, y1, x0, x1)

    def need(self, region: Region, extent: Extent) -> Region:
        """`span`, cut at the borders of an input map of this extent.

        >>> Window((3, 3), (2, 2), ((1, 1), (1, 1))).need(Region(0, 2, 3, 5), (9, 9))
        Region(y0=0, y1=4, x0=5, x1=9)
        """
        return self.span(region).intersect(Region.whole(extent))

    def influence(self, region: Region, extent: Extent) -> Region:
        """A box that holds every output which reads an input of `region`; `extent` is the input map's.

        >>> Window((3, 3), (2, 2), ((1, 1), (1, 1))).influence(Region(3, 5, 0, 1), (9, 9))
        Region(y0=1, y1=3, x0=0, x1=1)
        """
        (y0, y1), (x0, x1) = (
            (-((reach - 1 - pad[0] - lo) // stride), (hi - 1 + pad[0]) // stride + 1)
            for lo, hi, stride, pad, reach in self._axes(region)
        )
        return Region(y0, y1, x0, x1).intersect(Region.whole(self.extent(extent)))

    def _axes(self, region: Region) -> tuple[tuple[int, int, int, Pair, int], ...]:
        return (
            (region.y0, region.y1, self.stride[0], self.padding[0], self.reach[0]),
            (region.x0, region.x1, self.stride[1], self.padding[1], self.reach[1]),
        )
