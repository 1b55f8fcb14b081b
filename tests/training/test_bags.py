"""Bags of descriptors: what the classifier learns of bags of any size, some of them empty."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional

from tilestream.nets import ConvBoVW
from tilestream.training import Loader, TrainingConfig, fit, predict
from tilestream.training.loader import read_batches

CPU = torch.device("cpu")


@dataclass
class Bags:
    bags: list
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.bags[index]


def make_bags(count, seed, one=6.0):
    """Noise, up to 30 instances a bag, none in the first; of a positive bag one lies far out along the first axis."""
    rng = np.random.default_rng(seed)
    sizes, labels = rng.integers(0, 30, count), np.arange(count) % 2
    bags = []
    for size, label in zip(sizes, labels, strict=True):
        bag = rng.normal(size=(max(size, label), 8)).astype(np.float32)
        if label:
            bag[rng.integers(len(bag)), 0] = one
        bags.append(bag)
    bags[0] = bags[0][:0]
    return Bags(bags, labels.astype(np.int64))


def settings(**changes):
    given = {"epochs": 12, "batch_size": 8, "learning_rate": 0.02, "flips": False, "weight_decay": 0}
    return TrainingConfig(**given, **changes)


def make_net(seed=0, dropout=0.1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConvBoVW(words=6, hidden=16, dropout=dropout, features=8)


def test_batches_are_padded_with_nan():
    examples = make_bags(5, 0)
    ((x, labels),) = read_batches(examples, [np.array([1, 0, 4])], 2, CPU)
    assert x.shape == (3, max(len(examples[i]) for i in (1, 0, 4)), 8)
    assert labels.tolist() == [1, 0, 0]
    for rows, i in zip(x, (1, 0, 4), strict=True):
        count = len(examples[i])
        assert np.array_equal(rows[:count], examples[i])
        assert rows[count:].isnan().all()
    ((empty, _),) = read_batches(examples, [np.array([0])], 1, CPU)
    assert empty.shape == (1, 1, 8)
    assert empty.isnan().all()


def test_one_instance_tells_a_bag(tmp_path):
    train, validation = make_bags(80, 0), make_bags(40, 1)
    net = make_net()
    history = fit(net, train, validation, settings(), tmp_path)
    assert max(record.validation_auc for record in history.records) > 0.95
    probabilities = predict(net, validation, batch_size=7)
    alone = torch.stack([net(torch.from_numpy(bag)[None])[0] for bag in validation.bags if len(bag)]).softmax(1)
    there = [bool(len(bag)) for bag in validation.bags]
    np.testing.assert_allclose(probabilities[there], alone.detach(), atol=1e-6)
    np.testing.assert_allclose(probabilities[0], net.classifier.bias.softmax(0).detach(), atol=1e-6)


def test_a_step_is_plain_pytorchs(tmp_path):
    """One epoch of gradient descent by the book, bag by bag: batch norm sees all instances of a batch, no padding."""
    train, config = make_bags(16, 2), settings(optimizer="sgd", schedule="constant")
    config = config.model_copy(update={"epochs": 1, "balance": "none"})
    net, wanted = make_net(dropout=0), make_net(dropout=0).train()
    fit(net, train, train, config, tmp_path)
    coding, optimizer = wanted.coding, torch.optim.SGD(wanted.parameters(), config.learning_rate, 0.9)
    order = Loader(train, config, 1, CPU).order
    for batch in np.array_split(order, 2):
        rows = coding.norm(coding.hidden(torch.from_numpy(np.concatenate([train[i] for i in batch])))).relu()
        codes = coding.code(rows).softmax(1).split([len(train[i]) for i in batch])
        z = torch.stack([c.amax(0) if len(c) else torch.zeros(6) for c in codes])
        loss = functional.cross_entropy(wanted.classifier(z), torch.from_numpy(train.labels[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (name, value), other in zip(net.state_dict().items(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=name)


def test_it_resumes(tmp_path):
    train, validation = make_bags(20, 0), make_bags(10, 1)
    nets = [make_net(), make_net(), make_net()]
    constant = {"schedule": "constant"}
    fit(nets[0], train, validation, settings(**constant), tmp_path / "whole")
    fit(nets[1], train, validation, settings(**constant).model_copy(update={"epochs": 5}), tmp_path / "cut")
    fit(nets[2], train, validation, settings(**constant), tmp_path / "cut")
    for one, other in zip(nets[0].state_dict().values(), nets[2].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_what_is_for_images_is_refused(tmp_path):
    train = make_bags(8, 0)
    for name, value in (("flips", True), ("rotation_deg", 10.0), ("colour", 0.1)):
        config = settings().model_copy(update={name: value})
        with pytest.raises(ValueError, match=f"{name}={value} cannot be applied to bags .* use"):
            fit(make_net(), train, train, config, tmp_path)
    mixed = Bags([train[1], train[3][:, :5]], np.array([0, 1]))
    with pytest.raises(ValueError, match=r"example 1 is float32 .* or a bag \(n, D\)"):
        list(read_batches(mixed, [np.array([0, 1])], 1, CPU))
