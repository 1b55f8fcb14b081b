"""bf16, asked for by name: as near to the float64 result as plain autocast comes."""

import copy

import pytest
import torch
from torch import nn

from tilestream.engine import SaliencyPass, plan, stream, trace
from tilestream.nets import ResidualNet, resnet18


def distance(got, want):
    return ((torch.as_tensor(got).double() - want).norm() / want.norm()).item()


def loss(logits):
    return logits[0, 1] * 2 - logits[0, 0] ** 2


@pytest.fixture(params=[resnet18, ResidualNet])
def net(request):
    torch.manual_seed(0)
    return request.param(num_classes=2).eval()


@pytest.fixture
def expected(net):
    """The image, the gradients in float64, and the distance of those of autocast to them."""
    image, reference, auto = torch.randn(3, 301, 273), copy.deepcopy(net).double(), copy.deepcopy(net)
    x, y = image.double()[None].requires_grad_(), image[None].clone().requires_grad_()
    loss(reference(x)).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss(auto(y).float()).backward()
    gradients = [torch.cat([p.grad.double().flatten() for p in n.parameters()]) for n in (reference, auto)]
    return image, x.grad[0], gradients[0], distance(y.grad[0], x.grad[0]), distance(gradients[1], gradients[0])


def gradients_of(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("memory", ["100 MiB", "1 GiB"])
def test_gradients_of_image_and_weights(net, expected, memory):
    image, of_image, of_weights, image_error, weights_error = expected
    streamed = stream(net, memory=memory, precision="bf16")
    result = torch.empty_like(image)
    streamed.backward(image, loss, gradient=result)
    assert result.dtype == torch.float32
    assert 1e-3 < distance(result, of_image) <= 1.2 * image_error
    assert 1e-3 < distance(gradients_of(net), of_weights) <= 1.2 * weights_error


@pytest.mark.parametrize("mode", ["scatter", "gather"])
def test_saliency(net, mode):
    image = torch.randn(3, 301, 273)
    exact = stream(net, tile=64).saliency(image, mode=mode)
    short = stream(net, tile=64, precision="bf16").saliency(image, mode=mode)
    assert short.numpy().dtype == exact.numpy().dtype
    assert 1e-3 < distance(short.numpy(), torch.from_numpy(exact.numpy())) < 0.4
    assert torch.allclose(short.logits, exact.logits, rtol=0, atol=0.05 * exact.logits.abs().max().item())
    if mode == "scatter":
        network, found = trace(net, "bf16"), torch.empty(301, 273)
        SaliencyPass(network, plan(network, (301, 273), tile=64)).run(
            image, lambda cell, values: found[cell.y0 : cell.y1, cell.x0 : cell.x1].copy_(torch.from_numpy(values))
        )
        assert distance(found, torch.from_numpy(short.numpy()).double()) < 0.4


def test_weights_that_are_not_convolutions_and_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 8, 2, 2), nn.SiLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        nn.Linear(8, 2),
    ).eval()  # fmt: skip
    image = torch.randn(3, 60, 71)
    reference = copy.deepcopy(net).double()
    with torch.no_grad():
        want = reference(image.double()[None])
    streamed = stream(net, tile=16, precision="bf16")
    assert distance(streamed(image).detach(), want) < 0.02
    stream(net, tile=16).backward(image, loss)
    exact = gradients_of(net).double()
    net.zero_grad()
    streamed.backward(image, loss)
    assert distance(gradients_of(net), exact) < 0.1


def test_a_dense_result_is_in_the_dtype_of_the_parameters():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    image = torch.randn(3, 40, 41)
    result = stream(net, tile=8, precision="bf16")(image)
    assert result.dtype == torch.float32
    assert torch.allclose(result, net(image[None]), atol=0.02)


def test_a_precision_that_is_not_known():
    with pytest.raises(ValueError, match="precision='fp8' is not known; use 'bf16', or None"):
        stream(resnet18().eval(), precision="fp8")
