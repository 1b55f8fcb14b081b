import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilestream.geometry import Region, Tile, TilePlan, Window, interior, plan, region, tile_regions, window

small = st.integers(1, 5)
pads = st.tuples(st.integers(0, 3), st.integers(0, 3))


@st.composite
def windows(draw):
    return Window(
        (draw(small), draw(small)), (draw(small), draw(small)), (draw(pads), draw(pads)), (draw(small), draw(small))
    )


@st.composite
def cases(draw):
    """A window, a map it fits, and a region of its output."""
    w = draw(windows())
    extent = tuple(draw(st.integers(max(1, r - sum(p)), r + 20)) for r, p in zip(w.reach, w.padding, strict=True))
    h, v = w.extent(extent)
    y0, x0 = draw(st.integers(0, h - 1)), draw(st.integers(0, v - 1))
    return w, extent, Region(y0, draw(st.integers(y0 + 1, h)), x0, draw(st.integers(x0 + 1, v)))


def taps(w: Window, axis: int, output: int) -> set[int]:
    """The inputs that one output reads along one axis, by definition."""
    return {output * w.stride[axis] - w.padding[axis][0] + w.dilation[axis] * k for k in range(w.kernel[axis])}


@given(cases())
def test_span_is_the_hull_of_all_taps(case):
    w, extent, out = case
    ys = set().union(*(taps(w, 0, y) for y in range(out.y0, out.y1)))
    xs = set().union(*(taps(w, 1, x) for x in range(out.x0, out.x1)))
    assert w.span(out) == Region(min(ys), max(ys) + 1, min(xs), max(xs) + 1)
    inside = [y for y in range(extent[0]) if min(ys) <= y <= max(ys)]
    need = w.need(out, extent)
    assert (need.y0, need.y1) == (inside[0], inside[-1] + 1) if inside else need.empty


@given(cases())
def test_extent_counts_the_windows_that_fit(case):
    w, extent, _ = case
    for axis in (0, 1):
        fits = [
            o
            for o in range(60)
            if max(taps(w, axis, o)) < extent[axis] + w.padding[axis][1]
        ]  # fmt: skip
        assert w.extent(extent)[axis] == len(fits)


@given(cases())
def test_influence_holds_every_reader(case):
    w, extent, out = case
    source = w.need(out, extent)
    if source.empty:
        return
    found = w.influence(source, extent)
    for axis, (lo, hi), (a, b) in (
        (0, (source.y0, source.y1), (found.y0, found.y1)),
        (1, (source.x0, source.x1), (found.x0, found.x1)),
    ):
        readers = {o for o in range(w.extent(extent)[axis]) if taps(w, axis, o) & set(range(lo, hi))}
        assert readers <= set(range(a, b))
        if w.dilation[axis] == 1 and w.stride[axis] <= w.kernel[axis] and readers:
            assert (a, b) == (min(readers), max(readers) + 1)


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
    with pytest.raises(ValueError, match=r"stride=\(0, 1\)"):
        Window((3, 3), (0, 1))
    with pytest.raises(ValueError, match="padding"):
        Window((3, 3), padding=((-1, 0), (0, 0)))
    with pytest.raises(ValueError, match="does not fit"):
        Window((3, 3)).extent((2, 9))
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


@pytest.mark.parametrize("module", [region, window, plan], ids=lambda m: m.__name__)
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
