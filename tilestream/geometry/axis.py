"""What outputs read and what inputs influence, along one axis of a map.

Every operation on maps that the engine streams is one of these along each axis. Intervals are half-open, never empty,
and cut at the ends of the map; an output that reads nothing but padding counts as a reader of the nearest pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

Interval = tuple[int, int]


class Axis(Protocol):
    """Along one axis: `length` of the output for an input of n px, and intervals either way."""

    def length(self, n: int) -> int: ...

    def need(self, lo: int, hi: int, n: int) -> Interval:
        """Inputs, of n, that the outputs [lo, hi) read."""
        ...

    def influence(self, lo: int, hi: int, n: int) -> Interval:
        """An interval that holds every output which reads one of the inputs [lo, hi) of n."""
        ...


@dataclass(frozen=True, slots=True)
class Pixel:
    """Output o reads input o."""

    def length(self, n: int) -> int:
        return n

    def need(self, lo: int, hi: int, n: int) -> Interval:
        return lo, hi

    def influence(self, lo: int, hi: int, n: int) -> Interval:
        return lo, hi


@dataclass(frozen=True, slots=True)
class Sliding:
    """A window: output o reads the inputs o * stride - before + dilation * k for k in [0, kernel).

    >>> Sliding(7, 2, 3, 3).length(2848)
    1424
    >>> Sliding(3, 2, 1, 1).need(3, 5, 9)
    (5, 9)
    >>> Sliding(3, 2, 1, 1).influence(3, 5, 9)
    (1, 3)
    """

    kernel: int
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1
    ceil: bool = False

    def __post_init__(self) -> None:
        if min(self.kernel, self.stride, self.dilation) < 1 or min(self.before, self.after) < 0:
            raise ValueError(f"{self} must have positive kernel, stride and dilation, and no negative padding")

    @property
    def reach(self) -> int:
        """Inputs that one output spans."""
        return self.dilation * (self.kernel - 1) + 1

    def length(self, n: int) -> int:
        room = n + self.before + self.after - self.reach
        steps = -(-room // self.stride) if self.ceil else room // self.stride
        if self.ceil and steps * self.stride >= n + self.before:  # the last window must start inside
            steps -= 1
        if steps < 0 or (room < 0 and not self.ceil):
            raise ValueError(
                f"a window that spans {self.reach} px does not fit a map of {n} px with padding "
                f"{self.before} + {self.after}"
            )
        return steps + 1

    def span(self, lo: int, hi: int) -> Interval:
        """Inputs that the outputs [lo, hi) read, padding included."""
        return lo * self.stride - self.before, (hi - 1) * self.stride - self.before + self.reach

    def need(self, lo: int, hi: int, n: int) -> Interval:
        return _inside(*self.span(lo, hi), n)

    def influence(self, lo: int, hi: int, n: int) -> Interval:
        first = -((self.reach - 1 - self.before - lo) // self.stride)
        return _inside(first, (hi - 1 + self.before) // self.stride + 1, self.length(n))


@dataclass(frozen=True, slots=True)
class Transposed:
    """The window of a transposed convolution: input i adds to the outputs i * stride - before + dilation * k."""

    kernel: int
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1

    def length(self, n: int) -> int:
        length = (n - 1) * self.stride + self.dilation * (self.kernel - 1) + 1 - self.before - self.after
        if length < 1:
            raise ValueError(f"a transposed window {self} leaves nothing of a map of {n} px")
        return length

    def need(self, lo: int, hi: int, n: int) -> Interval:
        first = -((self.dilation * (self.kernel - 1) - self.before - lo) // self.stride)
        return _inside(first, (hi - 1 + self.before) // self.stride + 1, n)

    def influence(self, lo: int, hi: int, n: int) -> Interval:
        start, stop = lo * self.stride - self.before, (hi - 1) * self.stride - self.before
        return _inside(start, stop + self.dilation * (self.kernel - 1) + 1, self.length(n))


@dataclass(frozen=True)
class Table:
    """Output o reads the inputs first[o] and second[o] (and, for need's sake, what lies between); -1 is padding."""

    n: int
    first: tuple[int, ...]
    second: tuple[int, ...]

    def length(self, n: int) -> int:
        assert n == self.n
        return len(self.first)

    def need(self, lo: int, hi: int, n: int) -> Interval:
        read = [i for i in self.first[lo:hi] + self.second[lo:hi] if i >= 0]
        nearest = 0 if lo < len(self.first) // 2 else n - 1
        return (min(read), max(read) + 1) if read else (nearest, nearest + 1)

    def influence(self, lo: int, hi: int, n: int) -> Interval:
        pairs = zip(self.first, self.second, strict=True)
        readers = [o for o, (a, b) in enumerate(pairs) if lo <= a < hi or lo <= b < hi]
        return (readers[0], readers[-1] + 1) if readers else (0, 1)


def _inside(lo: int, hi: int, n: int) -> Interval:
    """[lo, hi) cut to [0, n); the nearest pixel where they do not meet."""
    lo = min(max(lo, 0), n - 1)
    return lo, max(min(hi, n), lo + 1)
