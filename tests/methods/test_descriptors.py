"""Descriptors: the whole image's whatever the tiles, OpenCV's where it can say, inside borders, in bounded memory."""

import subprocess
import sys
from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from tilestream.geometry import Region
from tilestream.methods import Border, FieldOfView
from tilestream.methods.descriptors import Bag, Dense, Sift, Surf, cores, describe, root, strongest

EXTENT = (317, 441)
METHODS = [Sift(0.04, 2, 16), Dense((16, 32), (1, 2, 4), 13), Surf(10.0, 0, 8)]


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """(3, 317, 441) uint8, spots of many sizes; no side is a power of two's multiple."""
    rng = np.random.default_rng(0)
    grey = sum(gaussian_filter(rng.normal(size=EXTENT), sigma) * sigma for sigma in (2, 4, 10))
    grey = (grey - grey.min()) / np.ptp(grey)
    return np.stack([grey * 200, grey * 255, grey[::-1] * 120]).astype(np.uint8)


def tiled(method, image, tile_px, border=None, channel="green") -> Bag:
    every = (describe(method, image, core, border, channel) for core in cores(image.shape[1:], tile_px))
    return strongest(every, method.dim, 10**6)


def places(bag: Bag) -> np.ndarray:
    """Points that are near where y, x, size and direction are."""
    angle = np.deg2rad(bag.keypoints[:, 3])
    return np.c_[bag.keypoints[:, :3], 5 * np.cos(angle), 5 * np.sin(angle)]


@pytest.mark.parametrize("tile_px", [150, 256])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_tiles_find_what_the_whole_image_shows(picture, method, tile_px):
    whole, cut = tiled(method, picture, 1024), tiled(method, picture, tile_px)
    assert len(whole.strength) == len(cut.strength) > 100
    if not isinstance(method, Sift):
        for mine, theirs in zip(cut, whole, strict=True):
            assert np.array_equal(mine, theirs)
        return
    distance, which = cKDTree(places(cut)).query(places(whole))
    assert distance.max() < 1e-3  # px: a place in a window and in the image are rounded differently
    assert len(set(which)) == len(which)
    assert (cut.descriptors[which] == whole.descriptors).all(axis=1).mean() > 0.999
    assert np.abs(cut.descriptors[which] - whole.descriptors).max() < 0.05


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2]], ids=lambda m: type(m).__name__)
def test_windows_of_another_parity_find_others(picture, method, monkeypatch):
    """The control: corners that are not aligned."""
    whole = tiled(method, picture, 1024)
    monkeypatch.setattr(type(method), "align_px", 1)
    distance, _ = cKDTree(places(tiled(method, picture, 149))).query(places(whole))
    assert (distance > 1e-3).mean() > 0.05


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_without_a_halo_borders_lose_keypoints(picture, method, monkeypatch):
    whole = tiled(method, picture, 1024)
    monkeypatch.setattr(type(method), "halo_px", 0)
    cut = tiled(method, picture, 192)
    assert not np.array_equal(cut.descriptors, whole.descriptors)
    if not isinstance(method, Dense):
        assert len(cut.strength) < len(whole.strength)


def test_one_tile_is_opencvs_sift(picture):
    image = picture[:, :256, :384]  # multiples of 64: nothing is mirrored
    bag = describe(Sift(0.04, 0, 64), image, Region.whole(image.shape[1:]))
    sift = cv2.SIFT_create(contrastThreshold=0.04, enable_precise_upscale=True)
    found, histograms = sift.detectAndCompute(np.ascontiguousarray(image[1]), None)
    kept = np.array([p.size <= 64 for p in found])
    expected = np.array([(p.pt[1], p.pt[0], p.size, p.angle) for p in found], np.float32)[kept]
    assert np.array_equal(bag.keypoints, expected)
    shares = histograms / histograms.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(bag.descriptors, np.sqrt(shares)[kept], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.square(bag.descriptors).sum(axis=1), 1, atol=1e-5)


def test_a_blob_is_found_where_and_as_large_as_it_is():
    y, x = np.mgrid[:256, :256]
    blob = 40 + 180 * np.exp(-((y - 100.0) ** 2 + (x - 171.0) ** 2) / (2 * 8.0**2))
    image = np.broadcast_to(blob.astype(np.uint8), (3, 256, 256))
    for method, off_px in ((Sift(0.01, 2, 64), 0.5), (Surf(1.0, 2, 64), 2.5)):
        bag = tiled(method, image, 128)
        y_px, x_px, size_px, _ = bag.keypoints[0]
        assert np.hypot(y_px - 100, x_px - 171) < off_px
        assert 9 < size_px < 24  # twice a sigma of 8, which each detector measures in its way


def test_sizes_and_channels_are_those_asked_for(picture):
    found = tiled(Sift(0.04, 5, 20), picture, 256).keypoints[:, 2]
    assert found.min() >= 5
    assert found.max() <= 20
    grey = cv2.cvtColor(np.ascontiguousarray(np.moveaxis(picture, 0, 2)), cv2.COLOR_RGB2GRAY)
    same = tiled(METHODS[0], np.stack([grey] * 3), 256)
    for mine, theirs in zip(tiled(METHODS[0], picture, 256, channel="grey"), same, strict=True):
        assert np.array_equal(mine, theirs)
    assert not np.array_equal(same.keypoints, tiled(METHODS[0], picture, 256).keypoints)


def test_a_grid_has_every_point_once(picture):
    bag = tiled(Dense((16, 32), (1, 2), 20), picture, 200)
    expected = {
        (y, x, np.float32(side * scale / 6))
        for scale in (1, 2)
        for side in (16, 32)
        for y in range(10 * scale, 317, 20 * scale)
        for x in range(10 * scale, 441, 20 * scale)
    }
    assert len(bag.keypoints) == len(expected)
    assert {(y, x, size) for y, x, size, _ in bag.keypoints.tolist()} == {(y, x, float(s)) for y, x, s in expected}
    assert (bag.keypoints[:, 3] == 0).all()


def test_a_grids_choice_is_even_and_does_not_depend_on_tiles(picture):
    method = Dense((16,), (1,), 4)
    some = [
        strongest((describe(method, picture, c) for c in cores(EXTENT, px)), 128, 2000).keypoints for px in (100, 1024)
    ]
    assert np.array_equal(*some)
    quarters = np.histogram2d(some[0][:, 0], some[0][:, 1], bins=2, range=[[0, 317], [0, 441]])[0]
    assert (np.abs(quarters - 500) < 100).all()


def test_patches_of_one_scale_look_alike_in_the_next():
    """The same picture twice as large, described at scale 2, is about what it is at scale 1."""
    rng = np.random.default_rng(1)
    small = gaussian_filter(rng.normal(size=(256, 256)), 4)
    small = np.uint8(255 * (small - small.min()) / np.ptp(small))
    large = cv2.resize(small, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
    inner = Region(64, 192, 64, 192)
    one = describe(Dense((32,), (1,), 32), np.stack([small] * 3), inner)
    two = describe(Dense((32,), (2,), 32), np.stack([large] * 3), Region(128, 384, 128, 384))
    other = describe(Dense((32,), (1,), 32), np.stack([large] * 3), Region(128, 384, 128, 384))
    near = cKDTree(one.keypoints[:, :2] * 2).query(two.keypoints[:, :2])[1]
    alike = np.linalg.norm(two.descriptors - one.descriptors[near], axis=1).mean()
    unlike = cKDTree(other.keypoints[:, :2]).query(two.keypoints[:, :2])[1]
    assert alike < 0.25 < 0.4 < np.linalg.norm(two.descriptors - other.descriptors[unlike], axis=1).mean()


def test_flat_patches_are_zero_not_nan():
    bag = describe(Dense((16,), (1,), 16), np.full((3, 64, 64), 7, np.uint8), Region(0, 64, 0, 64))
    assert bag.descriptors.shape == (16, 128)
    assert not bag.descriptors.any()
    assert not root(np.zeros((2, 128), np.float32)).any()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_the_rim_of_the_field_of_view_is_left_out(method):
    y, x = np.mgrid[:400, :600]
    eye = FieldOfView(y_px=200.0, x_px=310.0, radius_px=220.0, first_row_px=20.0, last_row_px=380.0)
    inside = (np.hypot(y - 200, x - 310) < 220) & (y >= 20) & (y <= 380)
    rng = np.random.default_rng(0)
    image = np.where(inside, 100 + rng.integers(0, 60, (400, 600)), 0).astype(np.uint8)
    image = np.stack([image] * 3)
    everywhere, bag = tiled(method, image, 150), tiled(method, image, 150, Border((400, 600), 0.05, eye))
    away = np.hypot(bag.keypoints[:, 0] - 200, bag.keypoints[:, 1] - 310)
    assert away.max() < 0.9 * 220 + 1
    assert bag.keypoints[:, 0].min() > 20 + 0.05 * 360 - 1
    assert 0 < len(bag.strength) < len(everywhere.strength)


def test_nothing_is_read_where_no_keypoint_may_be():
    class Unread:
        shape = (3, 400, 600)

        def __getitem__(self, _):
            raise AssertionError

    eye = FieldOfView(200.0, 310.0, 100.0, 100.0, 300.0)
    bag = describe(METHODS[0], Unread(), Region(0, 64, 0, 64), Border((400, 600), 0.05, eye))
    assert bag.descriptors.shape == (0, 128)


@given(st.integers(1, 40), st.lists(st.integers(0, 39), max_size=3), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_the_strongest_do_not_depend_on_how_bags_were_cut(n, cuts, most):
    rng = np.random.default_rng(n)
    bag = Bag(
        rng.integers(0, 3, (n, 4)).astype(np.float32), rng.integers(0, 4, n).astype(np.float32),
        np.arange(n, dtype=np.float32)[:, None],
    )  # fmt: skip
    bag.descriptors[:] = bag.keypoints @ np.array([[1], [10], [100], [1000]], np.float32)  # equal rows are equal
    ends = [0, *sorted(min(c, n) for c in cuts), n]
    parts = [bag.take(np.arange(lo, hi)) for lo, hi in pairwise(ends)]
    once = strongest([bag], 1, most)
    for mine, theirs in zip(strongest(reversed(parts), 1, most), once, strict=True):
        assert np.array_equal(mine, theirs)
    assert len(once.strength) == min(n, most)
    assert sorted(once.strength, reverse=True) == list(once.strength)


def test_surf_without_mahotas_names_the_extra(picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "mahotas.features", None)
    with pytest.raises(ValueError, match=r"pip install 'tilestream\[surf\]'"):
        describe(METHODS[2], picture, Region(0, 64, 0, 64))


@pytest.mark.parametrize("scales", [(3,), (0,), (64,), ()])
def test_scales_that_are_no_halvings_are_refused(scales):
    with pytest.raises(ValueError, match="scales="):
        Dense((32,), scales)


@pytest.mark.parametrize("method", ["Sift(0.02, 4, 32)", "Dense((16,), (1, 2), 16)", "Surf(0.01, 0, 16)"])
def test_memory_is_that_of_a_tile_whatever_the_image(method):
    """In a fresh process, in the middle of an image of 2,500 megapixels that is drawn where it is read."""
    code = f"""
import re, numpy as np
from tilestream.methods.descriptors import *
class Drawn:
    shape = (3, 50_000, 50_000)
    def __getitem__(self, key):
        c, y, x = (np.arange(s.start, s.stop) for s in key)
        v = 128 + 60 * np.sin(y[:, None] / 4.1) * np.cos(x / 3.7 + y[:, None] / 31)
        return np.broadcast_to(v.astype(np.uint8), (len(c), *v.shape))
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
method = {method}
describe(method, np.zeros((3, 64, 64), np.uint8), Region(0, 64, 0, 64))
before = peak()
bag = describe(method, Drawn(), Region(25_600, 26_112, 25_600, 26_112))
print(len(bag.strength), peak() - before, tile_bytes(method, 512))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=True)
    found, used, allowed = map(int, said.stdout.split())
    assert found > 20
    assert 0.1 * allowed < used < allowed
