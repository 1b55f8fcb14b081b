"""Training on whole photographs, streamed: the steps are those of plain PyTorch on the whole images."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tilestream.engine import stream
from tilestream.training import TrainingConfig, augment, epoch_order, fit
from tilestream.training.augment import Flipped


@dataclass
class Photographs:
    """Of several sizes, read in windows and never as a whole."""

    images: list
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Windows(self.images[index])


class Windows:
    def __init__(self, image):
        self._image, self.shape = image, image.shape

    def __getitem__(self, index):
        block = self._image[index]
        assert block.shape[1] <= 256
        assert block.shape[2] <= 256
        return block


def photographs(sizes, seed):
    rng = np.random.default_rng(seed)
    images = [rng.normal(0, 1, (3, *size)).astype(np.float32) for size in sizes]
    for number, image in enumerate(images):
        image[0] += number % 2
        image[:, : size_third(image)] += 0.5 * rng.normal()
    return Photographs(images, np.arange(len(sizes)) % 2)


def size_third(image):
    return image.shape[1] // 3


def make_net():
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 2),
    )  # fmt: skip
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net.eval()


SIZES = [(150, 190), (97, 131), (150, 190), (64, 201), (120, 80), (77, 77), (150, 190)]


def plain(net, train, config):
    """The same by the book, whole images in memory."""
    counts = np.bincount(train.labels)
    weights = torch.tensor(len(train) / (2 * counts), dtype=torch.float32)
    parameters = list(net.parameters())
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    for epoch in range(1, config.epochs + 1):
        order = epoch_order(train.labels, config, epoch)
        for places in np.array_split(np.arange(len(order)), -(-len(order) // config.batch_size)):
            images = [augment(torch.from_numpy(train.images[order[p]])[None], config, epoch, [p]) for p in places]
            labels = torch.from_numpy(train.labels[order[places]])
            loss = functional.cross_entropy(torch.cat([net(image) for image in images]), labels, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def settings(**changes):
    return TrainingConfig(
        **{"epochs": 2, "batch_size": 3, "learning_rate": 0.05, "optimizer": "sgd", "schedule": "constant", **changes}
    )


def test_steps_are_those_on_whole_images(tmp_path):
    train, validation = photographs(SIZES, 0), photographs(SIZES[1:5], 1)
    wanted, net = make_net(), make_net()
    before = copy.deepcopy(net.state_dict())
    plain(wanted, train, settings())
    history = fit(net, train, validation, settings(), tmp_path, streamed=stream(net, tile=64))
    last = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["net"]
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(last[name], value, rtol=1e-4, atol=1e-6)
    assert torch.equal(last["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(last["1.weight"], before["1.weight"])
    net.load_state_dict(last)
    logits = torch.cat([net(torch.from_numpy(image)[None]) for image in validation.images]).detach()
    labels = torch.from_numpy(validation.labels)
    weights = torch.tensor([7 / 8, 7 / 6])
    assert history.records[-1].validation_loss == pytest.approx(
        functional.cross_entropy(logits, labels, weights).item(), rel=1e-4
    )


def test_it_resumes(tmp_path):
    train, validation = photographs(SIZES, 0), photographs(SIZES[1:5], 1)
    nets = [make_net(), make_net(), make_net()]
    fit(nets[0], train, validation, settings(), tmp_path / "whole", streamed=stream(nets[0], tile=64))
    fit(nets[1], train, validation, settings(epochs=1), tmp_path / "cut", streamed=stream(nets[1], tile=64))
    fit(nets[2], train, validation, settings(), tmp_path / "cut", streamed=stream(nets[2], tile=64))
    for one, other in zip(nets[0].state_dict().values(), nets[2].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_flipped_windows_are_those_of_augment():
    image = np.random.default_rng(0).normal(size=(3, 37, 52)).astype(np.float32)
    config, seen = settings(), set()
    for position in range(12):
        whole = augment(torch.from_numpy(image)[None], config, 4, [position])[0].numpy()
        flipped = Flipped(image, config, 4, position)
        seen.add(tuple(flipped.flips))
        assert flipped.shape == image.shape
        for window in [(slice(None), slice(0, 37), slice(0, 52)), (slice(0, 2), slice(5, 20), slice(31, 52))]:
            assert np.array_equal(flipped[window], whole[window])
    assert len(seen) == 4
    assert Flipped(image, settings(flips=False), 4, 0).flips == [False, False]


def test_what_needs_whole_images_is_refused(tmp_path):
    net, train = make_net(), photographs(SIZES, 0)
    for name, value in (("rotation_deg", 10), ("colour", 0.1)):
        with pytest.raises(ValueError, match=f"{name}={value}.* cannot be applied .* use 0"):
            fit(net, train, train, settings(**{name: value}), tmp_path, streamed=stream(net, tile=64))
