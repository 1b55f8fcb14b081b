import doctest

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tilestream.geometry import (
    Region,
    Sliding,
    Table,
    Tile,
    TilePlan,
    Transposed,
    axis,
    interior,
    plan,
    region,
    tile_regions,
)  # fmt: skip

small, pads = st.integers(1, 5), st.integers(0, 3)


@st.composite
def cases(draw):
    """A window of either kind, the length of a map it fits, and an interval of its outputs."""
    if draw(st.booleans()):
        axis = Sliding(draw(small), draw(small), draw(pads), draw(pads), draw(small), draw(st.booleans()))
        n = draw(st.integers(max(1, axis.reach - axis.before - axis.after), axis.reach + 20))
    else:
        axis, n = Transposed(draw(small), draw(small), draw(pads), draw(pads), draw(small)), draw(st.integers(1, 20))
    try:
        length = axis.length(n)
    except ValueError:
        assume(False)
    lo = draw(st.integers(0, length - 1))
    return axis, n, length, (lo, draw(st.integers(lo + 1, length)))


def taps(axis, output: int) -> set[int]:
    """The inputs that one output reads, by definition, padding included."""
    reach = [axis.dilation * k for k in range(axis.kernel)]
    if isinstance(axis, Sliding):
        return {output * axis.stride - axis.before + k for k in reach}
    return {(output + axis.before - k) // axis.stride for k in reach if (output + axis.before - k) % axis.stride == 0}


@given(cases())
def test_need_is_the_hull_of_all_taps_on_the_map(case):
    axis, n, _, (lo, hi) = case
    read = set().union(*(taps(axis, o) for o in range(lo, hi))) & set(range(n))
    start, stop = axis.need(lo, hi, n)
    assert 0 <= start < stop <= n
    if read:
        assert start <= min(read)
        assert stop >= max(read) + 1
        if isinstance(axis, Sliding):
            span = axis.span(lo, hi)
            assert (start, stop) == (max(span[0], 0), min(span[1], n))


@given(cases())
def test_influence_holds_every_reader(case):
    axis, n, length, _ = case
    for lo in range(n):
        for hi in (lo + 1, min(n, lo + 4)):
            readers = {o for o in range(length) if taps(axis, o) & set(range(lo, hi))}
            start, stop = axis.influence(lo, hi, n)
            assert 0 <= start < stop <= length
            assert readers <= set(range(start, stop))
            if readers and axis.dilation == 1 and axis.stride <= axis.kernel and isinstance(axis, Sliding):
                assert (start, stop) == (min(readers), max(readers) + 1)


@given(cases())
def test_lengths_are_those_of_pytorch(case):
    axis, n, length, _ = case
    x = torch.zeros(1, 1, n + axis.before + axis.after if isinstance(axis, Sliding) else n)
    if isinstance(axis, Transposed):
        weight = torch.zeros(1, 1, axis.kernel)
        whole = torch.conv_transpose1d(x, weight, stride=axis.stride, dilation=axis.dilation).shape[-1]
        assert length == whole - axis.before - axis.after
    elif not axis.ceil:
        assert length == torch.conv1d(x, torch.zeros(1, 1, axis.kernel), None, axis.stride, 0, axis.dilation).shape[-1]
    elif axis.before == axis.after and axis.before <= axis.kernel // 2:
        pool = torch.nn.MaxPool1d(axis.kernel, axis.stride, axis.before, axis.dilation, ceil_mode=True)
        assert length == pool(torch.zeros(1, 1, n)).shape[-1]


def test_tables_know_both_ways():
    reflected = Table(4, (2, 1, 0, 1, 2, 3, 2, 1), (2, 1, 0, 1, 2, 3, 2, 1))
    assert reflected.length(4) == 8
    assert reflected.need(0, 2, 4) == (1, 3)
    assert reflected.influence(3, 4, 4) == (5, 6)
    assert reflected.influence(1, 2, 4) == (1, 8)
    padded = Table(3, (-1, -1, 0, 1, 2, -1), (-1, -1, 0, 1, 2, -1))
    assert padded.need(0, 2, 3) == (0, 1)
    assert padded.need(5, 6, 3) == (2, 3)


@given(st.tuples(st.integers(1, 30), st.integers(1, 30)), st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_tiles_partition(extent, size):
    seen = [(y, x) for r in tile_regions(extent, size) for y in range(r.y0, r.y1) for x in range(r.x0, r.x1)]
    assert sorted(seen) == [(y, x) for y in range(extent[0]) for x in range(extent[1])]


@given(st.tuples(st.integers(4, 300), st.integers(4, 300)), st.sampled_from([0.05, 0.1, 0.146, 0.25, 0.3]))
def test_interior_is_formula_1(extent, border):
    from decimal import Decimal

    kappa = Decimal(str(border))
    ys, xs = ([i for i in range(n) if kappa * n < i < n - kappa * n] for n in extent)
    if ys and xs:
        assert interior(extent, border) == Region(ys[0], ys[-1] + 1, xs[0], xs[-1] + 1)
    else:
        with pytest.raises(ValueError, match="leaves no pixel"):
            interior(extent, border)


def test_region_boxes():
    a, b = Region(0, 4, 0, 4), Region(2, 6, 3, 9)
    assert a.intersect(b) == Region(2, 4, 3, 4)
    assert a.hull(b) == Region(0, 6, 0, 9)
    assert a.hull(Region(9, 9, 0, 0)) == a
    assert a.intersect(Region(5, 6, 0, 1)).empty
    assert Region(5, 4, 0, 9).area == 0
    assert not a.contains(b)
    with pytest.raises(ValueError, match=r"y \[2, 6\) x \[3, 9\) is not inside"):
        b.within(a)


def test_windows_refuse_nonsense():
    with pytest.raises(ValueError, match=r"stride=0"):
        Sliding(3, 0)
    with pytest.raises(ValueError, match="no negative padding"):
        Sliding(3, before=-1)
    with pytest.raises(ValueError, match="does not fit"):
        Sliding(3).length(2)
    with pytest.raises(ValueError, match=r"border=0\.5"):
        interior((10, 10), 0.5)


def two_tiles() -> TilePlan:
    left = Tile(0, Region(0, 1, 0, 1), Region(0, 4, 0, 6), Region(0, 4, 0, 4))
    right = Tile(1, Region(0, 1, 1, 2), Region(0, 4, 2, 8), Region(0, 4, 4, 8))
    return TilePlan((4, 8), (1, 2), (4, 4), (4, 4), (left, right), 10, 20, 30, 20)


def test_plan_survives_json_and_knows_its_routes():
    p = two_tiles()
    assert TilePlan.from_json(p.to_json()) == p
    assert p.routes == {0: (0, 1), 1: (0, 1)}
    assert p.targets == {0: (0, 1), 1: (0, 1)}
    assert p.halo_px == 2
    assert p.overhead == 1.5
    assert "1 x 2 tiles of 4 x 4 px, halo 2 px" in str(p)


interval = st.tuples(st.integers(0, 9), st.integers(0, 4)).map(lambda v: (v[0], sum(v)))


@given(*(st.lists(st.tuples(interval, interval), min_size=1, max_size=5) for _ in range(2)))
def test_routes_are_the_windows_that_touch_a_cell(rows, columns):
    boxes = [((y, x), Region(*rows[y][0], *columns[x][0]), Region(*rows[y][1], *columns[x][1]))
             for y in range(len(rows)) for x in range(len(columns))]  # fmt: skip
    tiles = [Tile(i, Region(y, y + 1, x, x + 1), window, cell) for i, ((y, x), window, cell) in enumerate(boxes)]
    p = TilePlan((20, 20), (len(rows), len(columns)), (1, 1), (1, 1), tuple(tiles), 0, 0, 0, 0)
    touch = {(a.index, b.index) for a in tiles for b in tiles if not a.cell.intersect(b.window).empty}
    assert {(cell, tile) for cell, readers in p.routes.items() for tile in readers} == touch
    assert {(cell, tile) for tile, cells in p.targets.items() for cell in cells} == touch
    assert set(p.routes) == {t.index for t in tiles if not t.cell.empty}
    assert all(list(v) == sorted(v) for v in [*p.routes.values(), *p.targets.values()])


@pytest.mark.parametrize("module", [region, axis, plan], ids=lambda m: m.__name__)
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
