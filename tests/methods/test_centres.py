"""Border rules, centres and candidates: against plain numpy on the whole map, however the map is cut."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilestream.engine import Peak
from tilestream.geometry import Region, interior, tile_regions
from tilestream.methods import Border, FieldOfView, Search, conclude, look
from tilestream.methods.centres import Points, block_maxima, densest, spread, strongest

EXTENT = (61, 90)
CIRCLE = FieldOfView(y_px=29.3, x_px=44.8, radius_px=36.0, first_row_px=4.0, last_row_px=57.0)
WHOLE = Region.whole(EXTENT)


def allowed(rule: Border) -> np.ndarray:
    """The rule, pixel by pixel."""
    (h, w), (height, width), kappa = rule.extent, rule.photograph or rule.extent, rule.kappa
    inside = np.zeros((h, w), bool)
    for i in range(h):
        for j in range(w):
            if rule.field is None:
                inside[i, j] = kappa * h < i < h - kappa * h and kappa * w < j < w - kappa * w
                continue
            y, x, cut = (i + 0.5) * height / h - 0.5, (j + 0.5) * width / w - 0.5, rule.field
            share = kappa * (cut.last_row_px - cut.first_row_px)
            near = math.hypot(y - cut.y_px, x - cut.x_px) < (1 - 2 * kappa) * cut.radius_px
            inside[i, j] = near and cut.first_row_px + share < y < cut.last_row_px - share
    return inside


@pytest.mark.parametrize("kappa", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("circle", [None, CIRCLE, FieldOfView(10, 100, 60, 3, 58)])
@pytest.mark.parametrize("photograph", [None, (183, 450)])
def test_rules_pixel_by_pixel(kappa, circle, photograph):
    if circle is not None and photograph is not None:
        circle = FieldOfView(*(3 * v if i != 1 else 5 * v for i, v in enumerate(vars(circle).values())))
    rule = Border(EXTENT, kappa, circle, photograph)
    expected = allowed(rule)
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(rule.mask(WHOLE), expected)
    part = Region(7, 40, 11, 71)
    np.testing.assert_array_equal(rule.mask(part), expected[part.within(WHOLE)])
    outside = expected.copy()
    outside[rule.box.within(WHOLE)] = False
    assert not outside.any()


def test_the_frame_is_formula_1_and_the_circle_shrinks_by_the_same_share_of_its_diameter():
    assert Border(EXTENT, 0.1).box == interior(EXTENT, 0.1)
    whole = FieldOfView(50, 50, 50, 0, 100)  # a circle that nothing cuts off: rows say nothing of their own
    mask = Border((101, 101), 0.1, whole).mask(Region(0, 101, 0, 101))
    assert mask[50].sum() == 2 * 40 - 1
    assert mask[:, 50].sum() == 2 * 40 - 1


def test_a_circle_that_leaves_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"border=0\.1 leaves no pixel of the field of view"):
        _ = Border(EXTENT, 0.1, FieldOfView(30, 500, 20, 10, 50)).box
    with pytest.raises(ValueError, match="no cell of the image is inside"):
        conclude(
            [look(np.zeros((4, 4)), Region(0, 4, 0, 4), Border(EXTENT, 0.1), Search())], Border(EXTENT, 0.1), Search()
        )


def cut(draw, region: Region, depth: int = 4) -> list[Region]:
    """Boxes that make up a region, at random: what tasks see depends on tiles, halos and grouping."""
    if depth == 0 or region.height < 2 or region.width < 2 or draw(st.booleans()):
        return [region]
    y, x = draw(st.integers(region.y0 + 1, region.y1 - 1)), draw(st.integers(region.x0 + 1, region.x1 - 1))
    rows = draw(st.booleans())
    first = Region(region.y0, y, region.x0, region.x1) if rows else Region(region.y0, region.y1, region.x0, x)
    (second,) = region.minus(first)
    return cut(draw, first, depth - 1) + cut(draw, second, depth - 1)


@st.composite
def boxes(draw) -> list[Region]:
    return draw(st.permutations(cut(draw, WHOLE)))


@given(
    parts=boxes(), seed=st.integers(0, 5), levels=st.sampled_from([3, 1000]), circle=st.sampled_from([None, CIRCLE]),
    search=st.sampled_from([
        Search(candidates=6, distance_px=12), Search("density", 6, 12, "mean_shift", 9, 40),
        Search("density", 6, 12, "dbscan", 9, 40),
    ]),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_centres_do_not_depend_on_how_the_map_is_cut(parts, seed, levels, circle, search):
    values = np.random.default_rng(seed).integers(-1, levels, EXTENT).astype(np.float32)  # ties everywhere
    rule = Border(EXTENT, 0.1, circle)
    whole = conclude([look(values, WHOLE, rule, search)], rule, search)
    assert conclude([look(values[p.within(WHOLE)], p, rule, search) for p in parts], rule, search) == whole
    assert len(whole) > 1
    for each in whole:
        assert rule.mask(WHOLE)[each.y_px, each.x_px]
        assert values[each.y_px, each.x_px] == each.value


@pytest.mark.parametrize("circle", [None, CIRCLE])
def test_the_highest_point_is_numpy_s(circle):
    values = np.random.default_rng(1).normal(size=EXTENT).astype(np.float32)
    values[0, 0], values[30, 2] = 99, 98  # outside either rule
    rule = Border(EXTENT, 0.1, circle)
    (centre,) = conclude([look(values, p, rule, Search()) for p in [WHOLE]], rule, Search())
    masked = np.where(allowed(rule), values, -np.inf)
    assert (centre.y_px, centre.x_px) == np.unravel_index(masked.argmax(), EXTENT)


def test_nan_outside_the_rule_s_box_alone_is_allowed():
    values, rule = np.zeros(EXTENT, np.float32), Border(EXTENT, 0.1)
    values[0, 0] = np.nan
    look(values, WHOLE, rule, Search(candidates=3))
    values[30, 30] = np.nan
    with pytest.raises(ValueError, match="saliency is NaN"):
        look(values, WHOLE, rule, Search(candidates=3))


@given(seed=st.integers(0, 20), count=st.integers(1, 200), levels=st.sampled_from([2, 50]))
def test_the_strongest_points_are_the_first_of_all_sorted(seed, count, levels):
    values = np.random.default_rng(seed).integers(0, levels, (11, 13)).astype(float)
    values[3:5] = -np.inf  # outside
    points = sorted(((-v, y + 5, x + 7) for (y, x), v in np.ndenumerate(values) if np.isfinite(v)))[:count]
    found = strongest(values, Region(5, 16, 7, 20), count)
    assert list(zip(-found.value, found.y_px, found.x_px, strict=True)) == points


def test_block_maxima_lie_on_the_map_s_grid_whatever_the_box():
    values = np.random.default_rng(0).integers(0, 5, EXTENT).astype(float)
    box = Region(5, 60, 3, 77)
    found = block_maxima(values[box.within(WHOLE)], box)
    expected = {}
    for y in range(box.y0, box.y1):
        for x in range(box.x0, box.x1):
            best = expected.setdefault((y // 8, x // 8), (-values[y, x], y, x))
            expected[y // 8, x // 8] = min(best, (-values[y, x], y, x))
    assert sorted(zip(-found.value, found.y_px, found.x_px, strict=True)) == sorted(expected.values())


def bumps(places: list[tuple[int, int, float]], extent=(200, 300)) -> np.ndarray:
    ys, xs = np.mgrid[: extent[0], : extent[1]]
    return sum(h * np.exp(-((ys - y) ** 2 + (xs - x) ** 2) / 50) for y, x, h in places)


def test_candidates_are_local_maxima_apart_from_each_other():
    places = [(60, 60, 9.0), (60, 90, 8.0), (120, 200, 7.0), (150, 60, 6.0), (5, 5, 50.0)]
    rule, whole = Border((200, 300), 0.1), Region(0, 200, 0, 300)
    search = Search(candidates=8, distance_px=40)
    values = bumps(places)
    found = conclude(
        [look(values[p.within(whole)], p, rule, search) for p in tile_regions((200, 300), (64, 48))], rule, search
    )
    # (60, 90) is too near to the first; (5, 5) is outside, and its slope, cut off by the border, has no maximum inside
    assert [(p.y_px, p.x_px) for p in found[:3]] == [(60, 60), (120, 200), (150, 60)]
    assert [p.value for p in found] == sorted((p.value for p in found), reverse=True)
    near = conclude(
        [look(values, whole, rule, Search(candidates=2, distance_px=20))], rule, Search(candidates=2, distance_px=20)
    )
    assert [(p.y_px, p.x_px) for p in near] == [(60, 60), (60, 90)]


@given(seed=st.integers(0, 50), count=st.integers(1, 12), distance=st.sampled_from([1, 5, 20.5]))
def test_suppression_is_the_plain_loop_s(seed, count, distance):
    rng = np.random.default_rng(seed)
    points = Points(*rng.integers(0, 50, (2, 60)), rng.integers(0, 9, 60).astype(float)).first(60)
    taken = [Peak(25, 25, 0.5)]
    for y, x, value in zip(*points, strict=True):
        if len(taken) < count and all(math.hypot(y - t.y_px, x - t.x_px) >= distance for t in taken):
            taken.append(Peak(int(y), int(x), float(value)))
    assert spread([Peak(25, 25, 0.5)], points, count, distance) == taken[: max(1, count)]


def cloud(y: float, x: float, count: int, value: float) -> list[tuple[int, int, float]]:
    rng = np.random.default_rng(count)
    return [(round(y + dy), round(x + dx), value) for dy, dx in rng.normal(0, 8, (count, 2))]


@pytest.mark.parametrize("algorithm", ["mean_shift", "dbscan"])
def test_density_prefers_the_crowd_to_the_highest_point(algorithm):
    crowd, few, lone = cloud(100, 100, 60, 5.0), cloud(300, 400, 15, 5.0), [(500, 50, 9.0)]
    points = Points(*(np.asarray(v) for v in zip(*(crowd + few + lone), strict=True))).first(1000)
    found = densest(points, Search("density", algorithm=algorithm, bandwidth_px=40))
    assert math.hypot(found.y_px - 100, found.x_px - 100) < 8
    assert (found.y_px, found.x_px, found.value) in crowd


def test_only_dbscan_weighs_points_by_their_saliency():
    many, heavy = cloud(100, 100, 40, 1.0), cloud(300, 400, 30, 4.0)
    points = Points(*(np.asarray(v) for v in zip(*(many + heavy), strict=True))).first(1000)
    by = {a: densest(points, Search("density", algorithm=a, bandwidth_px=40)) for a in ("mean_shift", "dbscan")}
    assert by["mean_shift"].value == 1.0
    assert by["dbscan"].value == 4.0


@pytest.mark.parametrize("algorithm", ["mean_shift", "dbscan"])
def test_density_of_one_point_and_of_a_map_of_nothing(algorithm):
    search = Search("density", algorithm=algorithm, bandwidth_px=40, strongest=5)
    assert densest(Points(np.array([3]), np.array([4]), np.array([-1.0])), search) == Peak(3, 4, -1.0)
    rule = Border(EXTENT, 0.1)
    (flat,) = conclude([look(np.zeros(EXTENT, np.float32), WHOLE, rule, search)], rule, search)
    assert flat.value == 0


def test_positions_and_distances_are_those_of_the_photograph():
    """A square of 40 px of a photograph of 400 x 800: pixel i means (i + 1/2) H / 40 - 1/2."""
    values = np.zeros((40, 40))
    values[10, 10], values[10, 24], values[26, 10] = 3, 2, 1
    rule, search = Border((40, 40), 0.1, None, (400, 800)), Search(candidates=3, distance_px=200)
    found = conclude([look(values, Region(0, 40, 0, 40), rule, search)], rule, search)
    assert found[0] == Peak(104, 210, 3.0)
    assert found[1] == Peak(104, 490, 2.0)  # 14 px to the right are 280, 16 px below are only 160
    assert found[2].value == 0
