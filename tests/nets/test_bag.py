"""Paper B's networks: bags of descriptors, and photographs of any size; the oracle is the un-tiled network."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilestream.engine import stream
from tilestream.geometry import SegmentPlan
from tilestream.nets import ConvBoVW, ImageWordNet, WordNet, build, load_model, save_model

SMALL = {"instances": "images", "words": 5, "hidden": 8, "widths": [4, 4, 6, 6]}


def lively(make, *arguments, **parameters):
    """A network in float64, with statistics of batch norm that are not those of the start; the same each time."""
    torch.manual_seed(0)
    net = make(*arguments, **parameters).double()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net.eval()


@pytest.fixture
def photograph():
    """Smooth, with structure; no stride divides its sides."""
    torch.manual_seed(1)
    noise = torch.randn(1, 3, 12, 15, dtype=torch.float64)
    return F.interpolate(noise, (301, 397), mode="bilinear")[0] + 0.05 * torch.randn(3, 301, 397, dtype=torch.float64)


def bag(count, seed):
    return torch.randn(count, 128, generator=torch.Generator().manual_seed(seed)).double()


def padded(*bags):
    return nn.utils.rnn.pad_sequence(bags, batch_first=True, padding_value=float("nan"))


@pytest.mark.parametrize("pooling", ["max", "mean", "sum"])
def test_a_bag_is_the_same_beside_larger_ones(pooling):
    net = lively(ConvBoVW, words=7, hidden=16, pooling=pooling)
    bags = [bag(9, 0), bag(1, 1), bag(0, 2), bag(4, 3)]
    alone = torch.cat([net(b[None]) if len(b) else net(torch.full((1, 1, 128), torch.nan).double()) for b in bags])
    together = net(padded(*bags))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-13)
    assert torch.equal(together[2], net.classifier.bias)  # no descriptor: no word is there
    words = net.coding.code(net.coding.norm(net.coding.hidden(bags[0])).relu()).softmax(1)
    z = {"max": words.amax(0), "mean": words.mean(0), "sum": words.sum(0)}[pooling]
    torch.testing.assert_close(together[0], net.classifier(z), rtol=0, atol=1e-13)


def test_padding_trains_nothing():
    bags = [bag(6, 0), bag(3, 1), bag(0, 2)]
    nets = [lively(ConvBoVW, words=7, hidden=16, dropout=0).train() for _ in range(2)]
    for net, extra in zip(nets, (0, 5), strict=True):
        x = F.pad(padded(*bags), (0, 0, 0, extra), value=float("nan"))
        F.cross_entropy(net(x), torch.tensor([0, 1, 1])).backward()
    for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
        assert name == "coding.hidden.bias" or one.grad.abs().max() > 1e-6  # batch norm takes a bias away
    torch.testing.assert_close(nets[0].coding.norm.running_mean, nets[1].coding.norm.running_mean)


@pytest.mark.parametrize("count", [0, 1])
def test_hardly_any_descriptor_leaves_batch_norm_alone(count):
    net = lively(ConvBoVW, words=7, hidden=16, dropout=0)
    x = padded(bag(count, 0), bag(0, 1), bag(0, 2)) if count else torch.full((3, 1, 128), torch.nan).double()
    mean, wanted = net.coding.norm.running_mean.clone(), net(x)
    torch.testing.assert_close(net.train()(x), wanted, rtol=0, atol=1e-13)
    assert torch.equal(net.coding.norm.running_mean, mean)


@pytest.mark.parametrize(("patch_px", "shape"), [(46, (16, 22)), (62, (15, 21))])
def test_a_position_is_its_patch(photograph, patch_px, shape):
    net = lively(ImageWordNet, words=5, hidden=8, patch_px=patch_px, widths=[4, 4, 6, 6])
    words = net(photograph[None])
    assert words.shape == (1, 5, *shape)
    torch.testing.assert_close(words.sum(1), torch.ones(1, *shape).double())
    for i, j in [(0, 0), (7, 4), (shape[0] - 1, shape[1] - 1)]:
        patch = photograph[None, :, 16 * i : 16 * i + patch_px, 16 * j : 16 * j + patch_px]
        torch.testing.assert_close(net(patch)[..., 0, 0], words[..., i, j], rtol=0, atol=1e-13)


def wanted_gradients(net, image):
    """Logits, gradients of weights and where words are won, of the un-tiled network."""
    logits = net(image[None])
    F.cross_entropy(logits, torch.tensor([1])).backward()
    places = net.coding(image[None]).flatten(2).argmax(2)[0]
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    return logits, gradients, places


def close(net, gradients):
    largest = max(g.abs().max() for g in gradients)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).abs().max() <= 1e-12 * largest


@pytest.mark.parametrize("pooling", ["max", "mean", "sum"])
def test_streamed_is_untiled(photograph, pooling):
    net = lively(ConvBoVW, **SMALL, pooling=pooling)
    logits, gradients, places = wanted_gradients(net, photograph)
    streamed = stream(net, tile=64)
    torch.testing.assert_close(streamed(photograph), logits, rtol=0, atol=1e-12)
    streamed.backward(photograph, lambda z: F.cross_entropy(z, torch.tensor([1])))
    close(net, gradients)
    visited, tiles = streamed.gone_back
    if pooling == "max":  # a backward pass costs the winning tiles only
        won = {(p // 22 // 4, p % 22 // 4) for p in places.tolist()}
        assert visited == len(won) <= 5 < tiles == 4 * 6
    else:
        assert visited == tiles


@pytest.mark.parametrize("cuts", [(0, 4), (0, 2, 6), (0, 8)])
def test_a_cut_network_goes_back_where_winners_reach(photograph, cuts):
    """Segments before the last are gone back over where the gradient of a stored map is not zero."""
    net = lively(ConvBoVW, **SMALL)
    _, gradients, _ = wanted_gradients(net, photograph)
    streamed = stream(net)
    found, count = streamed.plan(photograph.shape, weights=True), len(streamed.network().nodes)
    parts = tuple(SegmentPlan(a, b, (96, 80), (48, 64), 0) for a, b in zip(cuts, [*cuts[1:], count], strict=True))
    streamed._planned = lambda *_, **__: replace(found, segments=parts)
    streamed.backward(photograph, lambda z: F.cross_entropy(z, torch.tensor([1])))
    close(net, gradients)
    visited, tiles = streamed.gone_back
    assert len(parts) <= visited < tiles * 0.6


def test_ties_go_to_the_first(photograph):
    """A photograph of one colour: every position is a winner, the first of them takes the gradient."""
    net = lively(ConvBoVW, **SMALL)
    flat = torch.full_like(photograph, 0.3)
    _, gradients, places = wanted_gradients(net, flat)
    assert places.unique().tolist() == [0]
    streamed = stream(net, tile=64)
    streamed.backward(flat, lambda z: F.cross_entropy(z, torch.tensor([1])))
    close(net, gradients)
    assert streamed.gone_back[0] == 1


def test_a_loss_without_gradient_gives_zeros(photograph):
    net = lively(ConvBoVW, **SMALL)
    streamed = stream(net, tile=64)
    streamed.backward(photograph, lambda z: 0 * z.sum())
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_the_planner_goes_back_in_small_tiles(photograph):
    """Few places win: small tiles around them cost less than those of the way forward."""
    streamed = stream(ConvBoVW("images").eval(), memory="200 MiB")
    (part,) = streamed.plan((3, 2848, 4288), weights=True).segments
    assert max(part.backward_px) <= 256 < min(part.forward_px)
    averaged = stream(ConvBoVW("images", pooling="mean").eval(), memory="200 MiB").plan((3, 2848, 4288), weights=True)
    assert all(part.backward_px == part.forward_px for part in averaged.segments)


def test_it_goes_to_a_file_and_back(tmp_path):
    net = lively(build, "ConvBoVW", SMALL).float()
    save_model(tmp_path / "words.safetensors", net, architecture="ConvBoVW", parameters=SMALL)
    again = load_model(tmp_path / "words.safetensors").net
    x = torch.randn(2, 3, 80, 96)
    assert torch.equal(again(x), net(x))
    assert isinstance(build("ConvBoVW").coding, WordNet)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(ImageWordNet, patch_px=50), "patch_px=50 must be a multiple of 16 less 2, from 46; use 46"),
        (partial(ImageWordNet, patch_px=32), "use 46"),
        (partial(ConvBoVW, pooling="median"), "pooling='median' must be one of"),
        (partial(ConvBoVW, "patches"), "instances='patches' of"),
        (partial(build, "ConvBoVW", {"patch_px": 46}), "does not take parameters"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
