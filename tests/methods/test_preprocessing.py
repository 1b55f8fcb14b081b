"""Preprocessing against torch's bilinear interpolation and whole-image computations in numpy."""

import tracemalloc

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tilestream.methods import (
    Extremes,
    Normalised,
    Subtracted,
    average_image,
    extremes,
    normalise_square,
    resize_square,
)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def average(side: int, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).random((3, side, side)) * 255).astype(np.float32)


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The oracle: torch's interpolation in float64."""
    tensor = torch.from_numpy(image.astype(np.float64))[None]
    return torch.nn.functional.interpolate(tensor, (height, width), mode="bilinear", align_corners=False)[0].numpy()


def area_means(image: np.ndarray, size: int) -> np.ndarray:
    """Means over the areas that pixels of a smaller square cover, as a product with overlap lengths."""
    side = image.shape[-1]
    edges = np.arange(size + 1) * side / size
    overlap = np.minimum(edges[1:, None], np.arange(1, side + 1)) - np.maximum(edges[:-1, None], np.arange(side))
    weights = np.clip(overlap, 0, None) * size / side
    return weights @ image.astype(np.float64) @ weights.T


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(97, 131, 16), (16, 16, 16), (9, 5, 16), (1, 1, 8), (40, 3, 1), (7, 300, 2), (513, 511, 512)],
)
def test_average_is_read_as_torch_interpolates(height, width, side):
    source, mean = photograph(height, width), average(side)
    result = Subtracted(source, mean)[:, 0:height, 0:width]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, source - bilinear(mean, height, width), rtol=0, atol=2e-4)


@given(
    height=st.integers(1, 60), width=st.integers(1, 60), side=st.integers(1, 20), cuts=st.tuples(*[st.floats(0, 1)] * 4)
)
def test_a_window_has_the_bits_of_the_whole(height, width, side, cuts):
    source, mean = photograph(height, width), average(side)
    seen = extremes(source, mean)
    y0, y1 = sorted(round(c * height) for c in cuts[:2])
    x0, x1 = sorted(round(c * width) for c in cuts[2:])
    for view in (Subtracted(source, mean), Normalised(source, mean, seen)):
        assert view.shape == (3, height, width)
        window = view[:, y0:y1, x0:x1]
        assert window.shape == (3, y1 - y0, x1 - x0)
        np.testing.assert_array_equal(window, view[:, :, :][:, y0:y1, x0:x1])


def test_blocks_of_any_size_and_zarr_arrays_give_the_same_bits():
    source, mean = photograph(50, 37), average(8)
    whole = Subtracted(source, mean)[:, :, :]
    stored = zarr.create_array({}, shape=source.shape, chunks=(3, 16, 16), dtype="uint8")
    stored[...] = source
    np.testing.assert_array_equal(Subtracted(stored, mean)[:, 11:50, 3:37], whole[:, 11:50, 3:37])
    np.testing.assert_array_equal(Subtracted(source, mean)[1:2, :, :], whole[1:2])
    expected = Extremes(float(whole.min()), float(whole.max()))
    assert [extremes(stored, mean, block_px) for block_px in (3, 7, 50, 1024)] == [expected] * 4


def test_extremes_equal_those_of_the_whole_photograph():
    source, mean = photograph(83, 61), average(16)
    source[2, 82, 60], source[0, 0, 0] = 255, 0
    mean[2, 15, 15], mean[0, 0, 0] = -300, 900  # the corners, last block and another channel included
    values = source - bilinear(mean, 83, 61)
    seen = extremes(source, mean, block_px=10)
    assert (seen.low, seen.high) == pytest.approx((values.min(), values.max()), abs=2e-4)
    assert (seen.low, seen.high) == pytest.approx((-900, 555))


def test_extremes_of_a_wide_photograph_need_no_more_memory():
    mean, peaks = average(64), []
    for width in (500, 8000):
        source = photograph(200, width)
        tracemalloc.start()
        extremes(source, mean, block_px=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_normalised_is_the_joint_stretch_of_all_channels():
    source, mean = photograph(64, 48), average(16)
    values = source - bilinear(mean, 64, 48)
    expected = (values - values.min()) / (values.max() - values.min())
    result = Normalised(source, mean, extremes(source, mean))[:, :, :]
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)
    assert result.dtype == np.float32


@given(st.integers(0, 2**32 - 1))
def test_the_stretch_ends_at_exactly_0_and_1(seed):
    values = np.random.default_rng(seed).uniform(-255, 255, 50).astype(np.float32)
    result = Extremes(float(values.min()), float(values.max())).stretch(values)
    assert (result.min(), result.max(), result.dtype) == (0, 1, np.float32)


def test_a_photograph_of_one_colour_becomes_0():
    flat, mean = np.full((3, 20, 30), 77, np.uint8), np.full((3, 8, 8), 50, np.float32)
    assert extremes(flat, mean) == Extremes(27, 27)
    result = Normalised(flat, mean, extremes(flat, mean))[:, :, :]
    np.testing.assert_array_equal(result, np.zeros((3, 20, 30), np.float32))
    np.testing.assert_array_equal(normalise_square(flat[:, :8, :8], mean), np.zeros((3, 8, 8), np.float32))


def test_a_square_of_the_average_s_size_is_normalised_alike_both_ways():
    square, mean = photograph(24, 24), average(24)
    full = Normalised(square, mean, extremes(square, mean))[:, :, :]
    np.testing.assert_array_equal(normalise_square(square, mean), full)


def test_channels_must_agree():
    with pytest.raises(ValueError, match="3 channels, the average image 1"):
        Subtracted(photograph(4, 4), average(4)[:1])


@pytest.mark.parametrize(("side", "size"), [(64, 32), (60, 20), (50, 37), (9, 1), (33, 32)])
def test_resizing_takes_the_mean_of_the_covered_area(side, size):
    square = photograph(side, side)
    resized = resize_square(square, size)
    assert (resized.shape, resized.dtype, resized.flags.c_contiguous) == ((3, size, size), np.uint8, True)
    assert np.abs(resized - area_means(square, size)).max() <= 0.5 + 1e-3


def test_resizing_keeps_the_size_and_never_enlarges():
    square = photograph(16, 16)
    np.testing.assert_array_equal(resize_square(square, 16), square)
    with pytest.raises(ValueError, match=r"size_px=17 must be at most 16"):
        resize_square(square, 17)


def test_the_average_is_exact_in_any_order():
    squares = [photograph(8, 8, seed) for seed in range(300)]
    expected = np.mean(np.stack(squares).astype(np.float64), axis=0)
    result = average_image(iter(squares))
    np.testing.assert_allclose(result, expected, rtol=1e-7)
    np.testing.assert_array_equal(average_image(squares[::-1]), result)
    assert result.dtype == np.float32


def test_the_average_does_not_overflow_nor_change_its_input():
    white = np.full((3, 2, 2), 255, np.uint8)
    np.testing.assert_array_equal(average_image([white] * 1000), white.astype(np.float32))
    assert white.max() == white.min() == 255


def test_the_average_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one photograph"):
        average_image([])
