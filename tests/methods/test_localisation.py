"""Localisation against brute force over all centres, scipy's labels, draws, and cases done by hand."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tilestream.geometry import interior
from tilestream.methods import crop_region
from tilestream.methods import localisation as loc
from tilestream.methods.centres import FieldOfView

IDRID = Path(__file__).parents[3] / "shared" / "data" / "idrid" / "segmentation"


def spots(seed: int, extent=(57, 83), count=9) -> np.ndarray:
    """A mask with blobs of any form, some at the rim."""
    rng = np.random.default_rng(seed)
    mask = ndimage.gaussian_filter(rng.random(extent), 2)
    return mask > np.sort(mask.ravel())[-count * 12]


def two_kinds(seed: int) -> loc.Lesions:
    masks = {"MA": spots(seed), "HE": spots(seed + 1)}
    return loc.find_lesions(masks, (57, 83))


def everywhere(extent) -> np.ndarray:
    return np.stack(np.indices(extent), axis=-1).reshape(-1, 2)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_lesions_are_the_connected_pixels_of_each_kind(seed):
    masks = {"MA": spots(seed), "none": np.zeros((57, 83), np.uint8), "HE": 255 * spots(seed + 1).astype(np.uint8)}
    lesions = loc.find_lesions(masks, (57, 83))
    np.testing.assert_array_equal(lesions.mask, spots(seed) | spots(seed + 1))
    y, x, lesion = lesions.pixels()
    start = 0
    for kind in ("MA", "HE"):
        labels, count = ndimage.label(masks[kind], np.ones((3, 3)))
        assert lesions.kinds[start : start + count] == (kind,) * count
        ours = np.zeros((57, 83), int)
        mine = (lesion >= start) & (lesion < start + count)
        ours[y[mine], x[mine]] = lesion[mine] + 1 - start
        assert mine.sum() == (labels > 0).sum()
        pairs = set(zip(ours.ravel().tolist(), labels.ravel().tolist(), strict=True))
        assert len(pairs) == count + 1  # the same sets of pixels, numbered in some order
        start += count
    assert len(lesions) == start


def test_touching_lesions_of_two_kinds_are_two_and_bad_masks_are_refused():
    mask = np.zeros((20, 30), np.uint8)
    mask[3:6, 4:8] = 1
    mask[6:9, 4:8] = 2
    lesions = loc.find_lesions({"MA": mask == 1, "HE": mask == 2}, (20, 30))
    assert lesions.kinds == ("MA", "HE")
    assert lesions.distances_px([(5, 5), (6, 5), (2, 3), (12, 9)]).round(3).tolist() == [
        [0, 1], [1, 0], [1.414, 4.123], [7.280, 4.472],
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"the mask of MA has shape \(20, 30\), its photograph \(30, 20\)"):
        loc.find_lesions({"MA": mask}, (30, 20))


def test_a_photograph_without_lesions():
    lesions = loc.find_lesions({"MA": np.zeros((20, 30))}, (20, 30))
    allowed = np.ones((20, 30), bool)
    assert len(lesions) == 0
    assert lesions.distances_px([(1, 2), (3, 4)]).shape == (2, 0)
    assert lesions.held([(1, 2)], 8).shape == (1, 0)
    assert loc.pointing_chance(lesions, allowed) == loc.pointing_chance(lesions, allowed, 3) == 0
    assert loc.holding_chance(lesions, allowed, 8) == 0
    assert loc.hit_shares(lesions, allowed, 2).shape == (0,)
    found = loc.mark(lesions, [(1, 2), (3, 4)], [0.5, 0.7], allowed)
    assert found.false.tolist() == [0.5, 0.7]
    covered, held = loc.coverage_chance(lesions, allowed, 8, 3, np.random.default_rng(0))
    assert covered.shape == (3, 0)
    assert held.tolist() == [0, 0, 0]


@pytest.mark.parametrize("size_px", [1, 8, 15, 57, 70, 100])
@pytest.mark.parametrize("border", [0.0, 0.1])
def test_chances_of_one_centre_are_exact(size_px, border):
    lesions = two_kinds(size_px)
    field = FieldOfView(28.0, 40.0, 33.0, 4.0, 51.0)
    allowed = loc.allowed_centres((57, 83), border, field)
    inside, (y, x) = interior((57, 83), border), np.indices((57, 83))
    expected = (np.hypot(y - 28, x - 40) < 33) & (y > 4) & (y < 51)
    expected &= (y >= inside.y0) & (y < inside.y1) & (x >= inside.x0) & (x < inside.x1)
    np.testing.assert_array_equal(allowed, expected)
    places = np.argwhere(allowed)
    held = np.zeros((len(places), len(lesions)), bool)
    ys, xs, lesion = lesions.pixels()
    for index, (cy, cx) in enumerate(places.tolist()):
        r = crop_region((57, 83), (cy, cx), size_px)
        held[index, lesion[(ys >= r.y0) & (ys < r.y1) & (xs >= r.x0) & (xs < r.x1)]] = True
    np.testing.assert_array_equal(lesions.held(places, size_px), held)
    assert loc.holding_chance(lesions, allowed, size_px) == pytest.approx(held.any(axis=1).mean(), abs=1e-12)
    for tolerance in (0, 1, 2.5, 7):
        away = np.array([np.hypot(ys - cy, xs - cx) for cy, cx in places])
        hits = np.stack([(away[:, lesion == i] <= tolerance).any(axis=1) for i in range(len(lesions))], axis=1)
        np.testing.assert_array_equal(lesions.distances_px(places) <= tolerance, hits)
        assert loc.pointing_chance(lesions, allowed, tolerance) == pytest.approx(hits.any(axis=1).mean(), abs=1e-12)
        assert loc.hit_shares(lesions, allowed, tolerance) == pytest.approx(hits.mean(axis=0), abs=1e-12)


def test_chance_of_several_crops_is_what_exact_chances_say():
    lesions = two_kinds(3)
    allowed = loc.allowed_centres((57, 83), 0.1, None)
    covered, held = loc.coverage_chance(lesions, allowed, 12, 3, np.random.default_rng(1), draws=20_000)
    one = lesions.held(np.argwhere(allowed), 12)
    # independent draws: a lesion stays uncovered by k crops with the k-th power of its chance
    expected = 1 - (1 - one.mean(axis=0)) ** np.arange(1, 4)[:, None]
    assert covered == pytest.approx(expected, abs=0.015)
    assert held[0] == pytest.approx(loc.holding_chance(lesions, allowed, 12), abs=0.015)
    apart, _ = loc.coverage_chance(lesions, allowed, 12, 3, np.random.default_rng(1), draws=20_000, distance_px=20)
    assert apart[2].mean() > covered[2].mean() + 0.005  # crops that keep away from each other cover more


def test_random_centres_keep_their_distance_or_are_missing():
    allowed = np.zeros((40, 60), bool)
    allowed[5:35, 10:50] = True
    centres, exist = loc.random_centres(allowed, 50, 6, np.random.default_rng(0), 18)
    assert allowed[centres[exist][:, 0], centres[exist][:, 1]].all()
    for each, there in zip(centres, exist, strict=True):
        kept = each[there]
        away = np.hypot(*np.moveaxis(kept[:, None] - kept, -1, 0))[np.triu_indices(len(kept), 1)]
        assert away.min() >= 18
    assert exist[:, 0].all()
    assert not exist[:, 5].all()  # there is no room for six everywhere


def test_coverage_adds_crop_by_crop():
    mask = np.zeros((50, 50), bool)
    mask[[10, 12, 40], [10, 30, 40]] = True
    lesions = loc.find_lesions({"MA": mask}, (50, 50))
    order = np.lexsort(np.argwhere(mask).T[::-1])
    assert len(lesions) == 3
    assert loc.coverage(lesions, [(10, 10), (11, 12), (39, 39)], 6)[:, order].tolist() == [
        [True, False, False], [True, False, False], [True, False, True],
    ]  # fmt: skip


def test_border_rules_of_chance():
    field = FieldOfView(50.0, 60.0, 40.0, 15.0, 85.0)
    frame = loc.allowed_centres((100, 120), 0.1, field)
    circle = loc.allowed_centres((100, 120), 0.1, field, "circle")
    y, x = np.indices((100, 120))
    np.testing.assert_array_equal(circle, (np.hypot(y - 50, x - 60) < 32) & (y > 22) & (y < 78))
    assert frame.sum() > circle.sum()
    with pytest.raises(ValueError, match=r"border=0.45 leaves no pixel of the field of view"):
        loc.allowed_centres((100, 120), 0.45, FieldOfView(20.0, 20.0, 12.0, 0.0, 99.0))


def by_hand() -> list[loc.Marks]:
    """Two photographs: lesions found at 0.9 and 0.4, one not at all; false positives at 0.8, 0.6, 0.5; one without."""
    none, inf = np.zeros(0), -np.inf
    return [
        loc.Marks(np.array([0.8]), np.array([0.9, inf]), np.array([0.01, 0.02]), 0.03),
        loc.Marks(np.array([0.6, 0.5]), np.array([0.4]), np.array([0.05]), 0.05),
        loc.Marks(none, none, none, 0.0),
        loc.Marks(none, none, none, 0.0),
    ]


def test_froc_by_hand():
    result = loc.froc(by_hand(), range(4), (1 / 8, 1 / 4, 1 / 2, 3 / 4, 8))
    # with 4 photographs the levels allow 0, 1, 2, 3, 32 false positives
    assert result["sensitivity"] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert result["mean"] == pytest.approx(np.mean(result["sensitivity"]))
    assert result["curve"] == [
        [0, 0], [0, pytest.approx(1 / 3)], [0.25, pytest.approx(1 / 3)], [0.5, pytest.approx(1 / 3)],
        [0.75, pytest.approx(1 / 3)], [0.75, pytest.approx(2 / 3)],
    ]  # fmt: skip
    shares = np.array([0.01, 0.02, 0.05])
    for level, chance in zip((0.125, 0.25, 0.5, 0.75, 0.75), result["chance"], strict=True):  # there are no more than 3
        assert chance == pytest.approx(np.mean(1 - np.exp(-level / 0.98 * shares)))
    assert result["most"] == 0.75
    assert result["ratio"] == pytest.approx(result["mean"] / result["mean_chance"])
    for level in range(5):
        low, high = result["low"][level], result["high"][level]
        assert low is None or 0 <= low < high <= 1
    json.dumps(result, allow_nan=False)


def test_ties_of_froc_are_one_step():
    tied = [loc.Marks(np.array([0.5]), np.array([0.5]), np.array([0.1]), 0.1)]
    assert loc.froc(tied, [0], (0.5, 1))["sensitivity"] == [0, 1]
    with pytest.raises(ValueError, match="no photograph has a lesion"):
        loc.froc([loc.Marks(np.ones(2), np.zeros(0), np.zeros(0), 0.0)], [0])


def test_froc_of_points_at_random_is_its_chance():
    rng = np.random.default_rng(0)
    marks = []
    for seed in range(150):
        lesions = two_kinds(seed) if seed % 3 else loc.find_lesions({}, (57, 83))
        allowed = loc.allowed_centres((57, 83), 0.1, None)
        points = np.argwhere(allowed)[rng.integers(0, allowed.sum(), rng.poisson(25))]
        marks.append(loc.mark(lesions, points, rng.random(len(points)), allowed, 5))
    result = loc.froc(marks, range(150))
    assert result["sensitivity"] == pytest.approx(result["chance"], abs=0.03)
    assert result["ratio_low"] < 1 < result["ratio_high"]
    assert result["sensitivity"][-1] > 0.1


def test_further_hits_of_a_lesion_are_neither_right_nor_wrong():
    mask = np.zeros((20, 30), bool)
    mask[5:8, 5:8] = True
    lesions = loc.find_lesions({"MA": mask}, (20, 30))
    found = loc.mark(lesions, [(5, 5), (7, 7), (15, 15)], [0.2, 0.6, 0.4], np.ones((20, 30), bool))
    assert found.found.tolist() == [0.6]
    assert found.false.tolist() == [0.4]
    assert found.shares.tolist() == [9 / 600]
    none = loc.mark(lesions, np.zeros((0, 2)), [], np.ones((20, 30), bool))
    assert none.found.tolist() == [-np.inf]


def test_rates_beside_chance():
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.05, 0.2, 400)
    hits = rng.random(400) < 5 * chance
    result = loc.beside_chance(hits, np.ones(400), chance, np.arange(400) // 2)
    assert result["value"] == hits.mean()
    assert result["chance"] == pytest.approx(chance.mean())
    assert result["ratio"] == pytest.approx(hits.mean() / chance.mean())
    assert (result["low"], result["high"]) == pytest.approx((0.577, 0.672), abs=0.06)
    assert result["ratio_low"] < 5 < result["ratio_high"]
    pooled = loc.beside_chance([3, 1], [4, 2], [1.5, 0.5], ["a", "b"])
    assert (pooled["value"], pooled["chance"], pooled["ratio"]) == pytest.approx((4 / 6, 2 / 6, 2))
    assert (pooled["low"], pooled["high"]) == pytest.approx((0.5, 0.75))
    nothing = loc.beside_chance([0, 0], [1, 1], [0, 0], ["a", "b"])
    assert (nothing["value"], nothing["ratio"], nothing["ratio_low"], nothing["low"]) == (0, None, None, 0)
    assert loc.beside_chance([], [], [], [])["value"] is None


@pytest.mark.skipif(not IDRID.exists(), reason="IDRiD is not on this machine")
def test_real_masks_have_the_pixels_that_their_table_says():
    masks = {
        kind: cv2.imread(str(IDRID / "masks" / f"IDRiD_03_{kind}.png"), cv2.IMREAD_GRAYSCALE)
        for kind in ("MA", "HE", "EX", "SE")
    }
    lesions = loc.find_lesions(masks, (2848, 4288))
    _, _, lesion = lesions.pixels()
    kinds = np.array(lesions.kinds)[lesion]
    assert {kind: int((kinds == kind).sum()) for kind in masks} == {"MA": 11288, "HE": 162605, "EX": 301586, "SE": 3318}
    field = FieldOfView(1412.2, 1995.3, 1708.9, 3.5, 2843.5)
    allowed = loc.allowed_centres((2848, 4288), 0.1, field)
    chance = loc.holding_chance(lesions, allowed, 512)
    drawn, held = loc.coverage_chance(lesions, allowed, 512, 1, np.random.default_rng(0), draws=2000)
    assert held[0] == pytest.approx(chance, abs=0.03)
    assert drawn[0].mean() < chance
