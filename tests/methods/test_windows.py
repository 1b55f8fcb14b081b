"""Window probabilities against the classifier on each window, histograms by hand, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

import tilestream as ts
from tilestream.methods import FieldOfView, eye_rules
from tilestream.methods.windows import Padded, Window, highest_window, histogram, probability_map
from tilestream.nets import ResidualNet
from tilestream.nets.surgery import fully_convolutional


@pytest.fixture
def net():
    """A classifier of 20 px windows, one every 5 px, that pads nowhere, so that lone windows are the oracle."""
    body = [nn.Conv2d(3, 5, 5, 5), nn.ReLU(), nn.Conv2d(5, 6, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)).double().eval()


@pytest.mark.parametrize("size", [(43, 52), (20, 20), (12, 31), (33, 7)])
def test_each_probability_is_the_classifiers_on_its_window(net, size):
    image = np.random.default_rng(0).uniform(-3, 3, (3, *size))
    found = probability_map(ts.stream(fully_convolutional(net, 20), tile=20), image)
    whole = np.zeros((3, max(20, size[0]), max(20, size[1])))
    whole[:, : size[0], : size[1]] = image
    rows, columns = ((n - 20) // 5 + 1 for n in whole.shape[1:])
    assert (found.shape, found.dtype) == ((rows, columns), np.float64)
    for i in range(rows):
        for j in range(columns):
            window = torch.from_numpy(whole[None, :, 5 * i : 5 * i + 20, 5 * j : 5 * j + 20])
            expected = torch.softmax(net(window), 1)[0, 1].item()
            assert found[i, j] == pytest.approx(expected, abs=1e-7)


def test_only_windows_can_slide(net):
    with pytest.raises(ValueError, match=r"stream fully_convolutional\(net\)"):
        probability_map(ts.stream(net, tile=20), np.zeros((3, 30, 30)))
    with pytest.raises(ValueError, match=r"target=2 must be in \[0, 2\)"):
        probability_map(ts.stream(fully_convolutional(net, 20), tile=20), np.zeros((3, 30, 30)), target=2)


def test_histograms_are_shares():
    shares = histogram([[0, 0.049], [0.05, 1.0]])
    assert shares.shape == (20,)
    assert (shares[0], shares[1], shares[19], shares.sum()) == (0.5, 0.25, 0.25, 1)
    np.testing.assert_array_equal(histogram(np.float32([0.2, 0.9]), 2), [0.5, 0.5])


@pytest.mark.parametrize("values", [[], [0.5, np.nan], [1.1], [-0.1]])
def test_what_is_no_probability_is_an_error(values):
    with pytest.raises(ValueError, match="at least one number in"):
        histogram(values)


def test_the_highest_window_by_its_centre():
    windows = fully_convolutional(ResidualNet(2, (2, 2)), 64)
    assert windows.stride_px == 8
    values = np.float32([[0.1, 0.9, 0.9], [0.9, 0.2, 0.3]])
    assert highest_window(values, windows) == Window(32, 8 + 32, pytest.approx(0.9))


def test_the_highest_window_is_one_that_the_rules_allow():
    windows = fully_convolutional(ResidualNet(2, (2, 2)), 64)
    values = np.full((5, 9), 0.1)
    values[0, 0], values[2, 4], values[4, 8] = 0.9, 0.5, 0.7  # two of them in the black corners
    extent, field = (96, 128), FieldOfView(48, 64, 30, 0, 95)
    assert highest_window(values, windows).probability == 0.9
    assert highest_window(values, windows, eye_rules(extent, 0.1, field)) == Window(48, 64, 0.5)
    assert highest_window(values, windows, eye_rules(extent, 0.1)).probability == 0.9
    assert highest_window(values[:1, :1], windows, eye_rules((20, 30), 0.4)) == Window(32, 32, 0.9)  # none is allowed


def test_padding_is_read_in_windows():
    source = np.random.default_rng(0).integers(1, 9, (3, 7, 30))
    whole = np.pad(source, [(0, 0), (0, 13), (0, 0)])
    padded = Padded(source, 20)
    assert padded.shape == whole.shape
    for ys in (slice(0, 5), slice(3, 12), slice(9, 20)):
        np.testing.assert_array_equal(padded[:, ys, 4:30], whole[:, ys, 4:30])
