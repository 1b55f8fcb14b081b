"""Deletion, insertion and randomised weights on networks whose answers are known."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import tilestream as ts
from tilestream.methods.faithfulness import blurred_image, deletion_insertion, randomised_correlations


def brightness() -> nn.Module:
    """Logits (0, 8 * mean of the image - 1)."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[0].bias.zero_()
        net[3].weight.copy_(torch.tensor([[0.0], [8.0]]))
        net[3].bias.copy_(torch.tensor([0.0, -1.0]))
    return net.eval()


def quarters(values: list[float]) -> np.ndarray:
    """A picture of 8 x 8 px whose quarters have these values."""
    return np.kron(np.array(values, np.float32).reshape(2, 2), np.ones((4, 4), np.float32))[None]


def test_curves_are_those_done_by_hand():
    image = quarters([0.1, 0.4, 0.3, 0.2])
    blurred = np.zeros_like(image)
    deleted, inserted = deletion_insertion(brightness(), image, image[0], blocks=2, blurred=blurred)
    left, put = np.array([1.0, 0.6, 0.3, 0.1, 0.0]), np.array([0.0, 0.4, 0.7, 0.9, 1.0])
    np.testing.assert_allclose(deleted.shares, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(deleted.probabilities, 1 / (1 + np.exp(1 - 2 * left)), rtol=1e-6)
    np.testing.assert_allclose(inserted.probabilities, 1 / (1 + np.exp(1 - 2 * put)), rtol=1e-6)
    p = deleted.probabilities
    assert deleted.auc == pytest.approx((p[0] / 2 + p[1] + p[2] + p[3] + p[4] / 2) / 4)
    np.testing.assert_array_equal(image, quarters([0.1, 0.4, 0.3, 0.2]))  # the caller's array stays


def test_a_right_map_beats_its_opposite():
    image = np.random.default_rng(0).random((1, 33, 50)).astype(np.float32)
    image[0, 8:14, 20:30] += 4
    right = deletion_insertion(brightness(), image, image[0], blocks=8)
    wrong = deletion_insertion(ts.stream(brightness(), tile=16), image, -image[0], blocks=8)
    assert right[0].auc < wrong[0].auc - 0.005
    assert right[1].auc > wrong[1].auc + 0.005
    for curve in (*right, *wrong):
        assert (curve.shares[0], curve.shares[-1]) == (0, 1)
        assert (np.diff(curve.shares) > 0).all()
    assert right[0].probabilities[0] == pytest.approx(right[1].probabilities[-1], rel=1e-6)


def test_steps_and_blocks_at_the_rim():
    image = np.random.default_rng(0).random((3, 30, 45)).astype(np.float32)
    net = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    deleted, _ = deletion_insertion(net, image, image.mean(0), blocks=7, steps=5)
    assert len(deleted.shares) == 6
    assert deleted.shares[-1] == 1
    with torch.no_grad():
        ends = [net(torch.from_numpy(x)[None]).softmax(1)[0, 1] for x in (image, blurred_image(image, 7))]
    np.testing.assert_allclose(deleted.probabilities[[0, -1]], ends, rtol=1e-5)


def test_the_blur_keeps_means_and_removes_detail():
    board = np.indices((64, 96)).sum(axis=0)[None] % 2
    np.testing.assert_allclose(blurred_image(board.astype(np.float32), 8), 0.5)
    flat = np.full((2, 17, 23), 0.3, np.float32)
    np.testing.assert_allclose(blurred_image(flat, 5), flat)


def test_maps_that_do_not_fit_are_refused():
    image = quarters([0, 1, 2, 3])
    for bad in (np.zeros((8, 9)), np.full((8, 8), np.nan)):
        with pytest.raises(ValueError, match=r"must be finite and of the image's size \(8, 8\)"):
            deletion_insertion(brightness(), image, bad)


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(1, 2),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[2].bias.fill_(0.2)
    return net


def test_the_cascade_goes_from_the_logits_down(small):
    image = np.random.default_rng(1).random((3, 40, 50)).astype(np.float32)
    state = copy.deepcopy(small.state_dict())
    found = randomised_correlations(small, image, seed=5)
    assert list(found) == ["6", "2", "0"]
    # behind one channel the last layer is a factor of the whole map: ranks of |map| cannot change
    assert found["6"] == pytest.approx(1, abs=1e-9)
    assert abs(found["0"]) < 0.5
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert randomised_correlations(small, image, seed=5) == found
    both = copy.deepcopy(small)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        both[6].reset_parameters()
        both[2].reset_parameters()
    maps = []
    for net in (small, both):
        x = torch.from_numpy(image)[None].requires_grad_()
        net(x)[0, 1].backward()
        maps.append(x.grad[0].mean(0).abs().numpy().ravel())
    assert found["2"] == pytest.approx(spearmanr(*maps).statistic, abs=1e-3)


def test_all_at_once_on_the_papers_network():
    torch.manual_seed(0)
    net = ts.nets.ResidualNet(num_classes=2, widths=(4, 4, 6, 8, 8)).eval()
    image = np.random.default_rng(1).random((3, 200, 210)).astype(np.float32)
    found = randomised_correlations(net, image, cascade=False)
    assert list(found) == ["all"]
    assert abs(found["all"]) < 0.6
    steps = randomised_correlations(net, image)
    assert len(steps) == 8  # the last layer, five segments, batch norm, stem
    assert list(steps)[-1] == "stem"
    assert steps["stem"] == pytest.approx(found["all"], abs=1e-9)


class Scale(nn.Module):
    """Weights without a way to draw them."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_weights_that_cannot_be_drawn_are_named():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Sequential(Scale()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"1\.0 has weights but no reset_parameters"):
        randomised_correlations(net.eval(), np.zeros((3, 9, 9), np.float32))


def test_a_constant_map_has_no_correlation():
    found = randomised_correlations(brightness(), np.ones((1, 9, 9), np.float32), cascade=False)
    assert found == {"all": None}
