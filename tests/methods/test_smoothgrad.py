"""SmoothGrad's noise: the published generator's numbers, a normal distribution, and the same whatever the window."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tilestream.methods import Noise, Noisy
from tilestream.methods.smoothgrad import normal, philox

ALL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL,) * 4, (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox_gives_the_published_words(counter, key, words):
    """The known answers of Random123, kat_vectors, philox4x32 10."""
    assert tuple(int(word) for word in philox(counter, key)) == words


def test_noise_is_normal_and_independent():
    drawn = [normal(3, sample, range(3), range(200), range(100, 300)) for sample in (0, 1)]
    for channel in drawn[0]:
        assert stats.kstest(channel.ravel(), "norm").pvalue > 1e-3
        assert channel.std() == pytest.approx(1, abs=0.02)
    several = np.stack([*(d.ravel() for d in drawn[0]), *(d.ravel() for d in drawn[1])])
    several = np.concatenate([several, np.roll(several[:1], 1), np.roll(several[:1], 200)])  # the neighbours of a pixel
    assert np.abs(np.corrcoef(several) - np.eye(len(several))).max() < 0.03


def test_noise_follows_from_seed_and_sample_alone():
    one = normal(1, 0, range(3), range(5), range(6))
    np.testing.assert_array_equal(normal(1, 0, range(3), range(5), range(6)), one)
    many = normal(1, 0, range(17), range(5), range(6))
    assert len({channel.tobytes() for channel in many}) == 17
    for seed, sample in ((2, 0), (1, 1), (1 + (1 << 40), 0)):
        assert (normal(seed, sample, range(3), range(5), range(6)) != one).mean() > 0.9


@given(
    box=st.tuples(st.integers(0, 60), st.integers(1, 61), st.integers(0, 2000), st.integers(1, 3000)),
    channels=st.tuples(st.integers(0, 9), st.integers(1, 10)),
)
def test_windows_agree_bit_for_bit(box, channels):
    y, height, x, width = box
    source = np.random.default_rng(0).random((10, 61, 3000), np.float32)
    noisy = Noisy(source, Noise(2, 0.15, 7), 1)
    index = (slice(*channels), slice(y, y + height), slice(x, x + width))
    np.testing.assert_array_equal(noisy[index], WHOLE[index])
    assert noisy.shape == source.shape


WHOLE = Noisy(np.random.default_rng(0).random((10, 61, 3000), np.float32), Noise(2, 0.15, 7), 1)[:, :, :]


def test_sigma_is_in_the_input_s_units_and_the_source_is_left_as_it_is():
    source = np.full((3, 40, 50), 100, np.uint8)
    values = Noisy(source, Noise(1, 20.0), 0)[:, 0:40, 0:50]
    assert values.dtype == np.float32
    assert values.std() == pytest.approx(20, rel=0.03)
    assert values.mean() == pytest.approx(100, abs=1)
    assert (source == 100).all()
    np.testing.assert_array_equal(Noisy(source, Noise(1, 0.0), 0)[:, 3:9, 4:5], source[:, 3:9, 4:5])
