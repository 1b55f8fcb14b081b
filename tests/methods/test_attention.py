"""Attention over crops: its formula by hand, bags of unequal sizes, and that it finds the one crop that counts."""

import numpy as np
import pytest
import torch

from tilestream.methods.attention import AttentionPooling, Bags, attend, fit_attention


def drawn(seed: int, count: int = 60) -> tuple[Bags, np.ndarray, np.ndarray]:
    """Bags of 2 to 5 vectors; in those of the second class one is far along the first axis. Which ones."""
    rng = np.random.default_rng(seed)
    labels, sizes = np.arange(count) % 2, rng.integers(2, 6, count)
    bag = np.repeat(np.arange(count), sizes)
    features = rng.normal(size=(len(bag), 8)).astype(np.float32)
    starts = np.cumsum(sizes) - sizes
    telling = (starts + rng.integers(0, sizes))[labels == 1]
    features[telling, 0] += 6
    return Bags(features, bag), labels, telling


def test_the_formula_by_hand():
    net = AttentionPooling(8, hidden=3).eval()
    bags, _, _ = drawn(0, 4)
    probability, attention = attend(net, bags)
    state = {name: value.numpy().astype(float) for name, value in net.state_dict().items()}

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for number in range(4):
        h = bags.features[bags.bag == number].astype(float)
        scores = linear("weight", np.tanh(linear("tanh", h)) / (1 + np.exp(-linear("gate", h))))[:, 0]
        shares = np.exp(scores) / np.exp(scores).sum()
        logits = linear("classify", shares @ h)
        np.testing.assert_allclose(attention[bags.bag == number], shares, atol=1e-6)
        assert probability[number] == pytest.approx(1 / (1 + np.exp(logits[0] - logits[1])), abs=1e-6)


def test_it_finds_the_vector_that_counts():
    net = fit_attention(*drawn(0, 200)[:2], *drawn(1)[:2])
    bags, labels, telling = drawn(2)
    probability, attention = attend(net, bags)
    assert ((probability > 0.5) == labels).mean() > 0.9
    even = 1 / np.bincount(bags.bag)[bags.bag[telling]]
    assert (attention[telling] > even).mean() > 0.9
    np.testing.assert_allclose(np.bincount(bags.bag, attention), 1, atol=1e-6)


def test_order_and_company_do_not_matter():
    net = AttentionPooling(8).eval()
    bags, _, _ = drawn(0, 6)
    one = bags.bag == 3
    (alone,), _ = attend(net, Bags(bags.features[one][::-1].copy(), np.zeros(one.sum(), int)))
    assert alone == pytest.approx(attend(net, bags)[0][3], abs=1e-6)


def test_training_repeats_itself_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (fit_attention(*drawn(0)[:2], *drawn(1)[:2], steps=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_one_class_is_an_error():
    bags, labels, _ = drawn(0)
    with pytest.raises(ValueError, match=r"both classes, got \[60, 0\]"):
        fit_attention(bags, 0 * labels, bags, labels)
