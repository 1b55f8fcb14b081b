"""Crops: their place, their pixels, and that a crop alone is normalised as its photograph is, bit for bit."""

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tilestream.geometry import Region, interior
from tilestream.methods import (
    Border,
    FieldOfView,
    Normalised,
    crop_region,
    cut,
    extremes,
    normalise_crop,
    random_centre,
    unhealthy,
)
from tilestream.methods.localisation import allowed_centres

SIDES = st.integers(1, 50)


def photograph(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (3, height, width), dtype=np.uint8)


def average() -> np.ndarray:
    return (np.random.default_rng(1).random((3, 8, 8)) * 255).astype(np.float32)


@pytest.mark.parametrize(
    ("extent", "centre", "size", "region"),
    [
        ((100, 200), (50, 60), 10, Region(45, 55, 55, 65)),
        ((100, 200), (50, 60), 11, Region(45, 56, 55, 66)),
        ((100, 200), (0, 199), 10, Region(0, 10, 190, 200)),
        ((100, 200), (99, 3), 10, Region(90, 100, 0, 10)),
        ((100, 200), (96, 195), 10, Region(90, 100, 190, 200)),
        ((10, 10), (9, 0), 10, Region(0, 10, 0, 10)),
        ((7, 30), (6, 29), 10, Region(0, 10, 20, 30)),
        ((3, 4), (1, 1), 10, Region(0, 10, 0, 10)),
    ],
)
def test_the_crop_is_shifted_inside(extent, centre, size, region):
    assert crop_region(extent, centre, size) == region


@given(height=SIDES, width=SIDES, size=SIDES, place=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_crop_holds_its_centre_and_stays_inside(height, width, size, place):
    centre = (int(place[0] * (height - 1)), int(place[1] * (width - 1)))
    region = crop_region((height, width), centre, size)
    assert region.shape == (size, size)
    assert region.contains(Region(centre[0], centre[0] + 1, centre[1], centre[1] + 1))
    for length, start, stop in ((height, region.y0, region.y1), (width, region.x0, region.x1)):
        assert start == 0 if length <= size else 0 <= start < stop <= length


@given(height=SIDES, width=SIDES, size=SIDES, place=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_crop_alone_is_normalised_as_its_photograph(height, width, size, place):
    source, mean, extent = photograph(height, width), average(), (height, width)
    seen = extremes(source, mean)
    region = crop_region(extent, (int(place[0] * (height - 1)), int(place[1] * (width - 1))), size)
    raw = cut(source, region)
    assert (raw.shape, raw.dtype) == ((3, size, size), np.uint8)
    result = normalise_crop(raw, region, extent, mean, seen)

    expected = np.zeros((3, size, size), np.float32)
    inside = Normalised(source, mean, seen)[:, :, :][:, region.y0 : region.y1, region.x0 : region.x1]
    expected[:, : inside.shape[1], : inside.shape[2]] = inside
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)


def test_a_whole_photograph_s_extremes_not_the_crop_s_own_are_used():
    source, mean = photograph(40, 40), np.zeros((3, 8, 8), np.float32)
    source[:, :20], source[:, 20:] = 100, 200
    region = crop_region((40, 40), (5, 5), 10)
    result = normalise_crop(cut(source, region), region, (40, 40), mean, extremes(source, mean))
    assert (result == 0).all()
    below = crop_region((40, 40), (34, 34), 10)
    assert (normalise_crop(cut(source, below), below, (40, 40), mean, extremes(source, mean)) == 1).all()


def test_cutting_keeps_pixels_and_fills_with_zeros():
    source = photograph(6, 9)
    np.testing.assert_array_equal(cut(source, Region(1, 4, 2, 7)), source[:, 1:4, 2:7])
    stored = zarr.create_array({}, shape=source.shape, chunks=(3, 4, 4), dtype="uint8")
    stored[...] = source
    for array in (source, stored):
        crop = cut(array, crop_region((6, 9), (3, 4), 8))
        np.testing.assert_array_equal(crop[:, :6], source[:, :, 0:8])
        assert (crop[:, 6:] == 0).all()
        assert crop.dtype == np.uint8


@given(st.text(min_size=1), st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.146, 0.3]))
def test_random_centres_obey_the_border_rule(id, seed, border):
    y, x = random_centre((40, 73), border, seed, id)
    assert border * 40 < y + (border == 0)
    assert y < 40 - border * 40
    assert border * 73 < x + (border == 0)
    assert x < 73 - border * 73
    assert random_centre((40, 73), border, seed, id) == (y, x)


def test_random_centres_are_spread_evenly_and_reach_every_pixel():
    extent, border = (12, 15), 0.1
    inside = interior(extent, border)
    counts = np.zeros(extent, int)
    for number in range(6000):
        counts[random_centre(extent, border, 3, f"{number}_left")] += 1
    held = counts[inside.y0 : inside.y1, inside.x0 : inside.x1]
    assert held.sum() == 6000
    mean = 6000 / held.size
    # chi-squared over n cells has mean n - 1 and variance 2 (n - 1): five standard deviations
    assert ((held - mean) ** 2 / mean).sum() < held.size - 1 + 5 * np.sqrt(2 * (held.size - 1))


def test_random_centres_depend_on_seed_and_id_alone():
    ids = [f"{n}_{eye}" for n in range(20) for eye in ("left", "right")]
    forward = {id: random_centre((400, 300), 0.1, 1, id) for id in ids}
    np.random.default_rng(5).random(100)
    assert {id: random_centre((400, 300), 0.1, 1, id) for id in reversed(ids)} == forward
    assert len(set(forward.values())) > 35
    assert sum(random_centre((400, 300), 0.1, 2, id) == forward[id] for id in ids) <= 2


def test_random_centre_is_the_same_on_every_machine():
    assert [random_centre((2848, 4288), 0.1, 0, id) for id in ("10_left", "10_right")] == [(1034, 1715), (1524, 625)]


def test_a_border_that_leaves_nothing_is_an_error():
    with pytest.raises(ValueError, match="leaves no pixel"):
        random_centre((1, 9), 0.1, 0, "a")


@pytest.mark.parametrize("rule", ["frame", "circle"])
def test_random_centres_lie_where_chance_has_them_and_reach_all_of_it(rule):
    """Not in the black beyond the eye: the frame rule's box reaches there, and black would tell healthy crops."""
    extent, field = (30, 40), FieldOfView(y_px=14.5, x_px=19, radius_px=13, first_row_px=3, last_row_px=26)
    counts = np.zeros(extent, int)
    for number in range(6000):
        counts[random_centre(extent, 0.1, 3, f"{number}_left", field, rule)] += 1
    inside = allowed_centres(extent, 0.1, field, rule)
    assert Border(extent, 0.1).mask(Region.whole(extent))[~inside].any()
    assert (counts[~inside] == 0).all()
    held = counts[inside]
    mean = 6000 / held.size
    assert ((held - mean) ** 2 / mean).sum() < held.size - 1 + 5 * np.sqrt(2 * (held.size - 1))


def test_a_circle_that_leaves_next_to_nothing_is_an_error():
    sliver = FieldOfView(y_px=-706.5, x_px=-706.5, radius_px=1250, first_row_px=-2000, last_row_px=2000)
    with pytest.raises(ValueError, match=r"border=0\.1 leaves next to no pixel of id='a'"):
        random_centre((4000, 4000), 0.1, 0, "a", sliver, "circle")


def test_unhealthy_from_grade_2():
    labels = unhealthy([0, 1, 2, 3, 4])
    np.testing.assert_array_equal(labels, [0, 0, 1, 1, 1])
    assert labels.dtype == np.int64
