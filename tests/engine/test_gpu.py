"""On a GPU: the same numbers as the un-tiled network there, within the budget, bit for bit again."""

import numpy as np
import pytest
import torch

from tilestream.engine import stream
from tilestream.nets import ResidualNet, resnet18

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_float32():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def plain(net, image, target=1):
    x = image[None].clone().requires_grad_()
    logits = net(x)
    (gradient,) = torch.autograd.grad(logits[0, target], x)
    return logits.detach(), gradient[0].mean(0)


def distance(got, expected):
    got, expected = torch.as_tensor(got).cpu().double(), torch.as_tensor(expected).cpu().double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("mode", ["scatter", "gather"])
@pytest.mark.parametrize("bound", [{"tile": 64}, {"tile": 256}, {"memory": "4 GiB"}])
def test_saliency_is_the_untiled_gradient(small_resnet18, mode, bound):
    net, image = small_resnet18.cuda(), torch.rand(3, 403, 517, dtype=torch.float64, device="cuda")
    logits, gradient = plain(net, image)
    streamed = stream(net, **bound)
    result = streamed.saliency(image.cpu().numpy(), mode=mode)
    assert distance(result.numpy(), gradient) < 1e-12
    assert distance(streamed(image.cpu().numpy()), logits) < 1e-12


def same(net, wanted):
    largest = max(float(w.norm()) for w in wanted)
    return all(float((p.grad - w).norm()) < 1e-12 * largest for p, w in zip(net.parameters(), wanted, strict=True))


def test_gradients_of_weights(paper_net):
    net = paper_net.cuda()
    images = torch.rand(2, 3, 330, 410, dtype=torch.float64, device="cuda")
    labels = torch.tensor([0, 2], device="cuda")
    loss = torch.nn.functional.cross_entropy(net(images), labels)
    wanted = torch.autograd.grad(loss, list(net.parameters()))
    got = stream(net, tile=128).backward(images, lambda logits: torch.nn.functional.cross_entropy(logits, labels))
    assert distance(got, loss.detach()) < 1e-12
    assert same(net, wanted)
    net.zero_grad()
    streamed = stream(net, tile=128)
    torch.nn.functional.cross_entropy(streamed(images), labels).backward()
    assert same(net, wanted)


def test_guided(small_resnet18):
    net, image = small_resnet18.cuda(), torch.rand(3, 300, 301, dtype=torch.float64)
    whole = stream(net, memory="4 GiB").saliency(image, method="guided").numpy()
    assert distance(stream(net, tile=64).saliency(image, method="guided").numpy(), whole) < 1e-12
    on_cpu = stream(net.cpu(), tile=64).saliency(image, method="guided").numpy()
    assert distance(whole, on_cpu) < 1e-12


def test_float32_is_not_tf32():
    """Our distance to float64 is at most 1.5 times that of plain float32, and another run gives the same bits."""
    torch.manual_seed(0)
    net = resnet18().eval().cuda()
    image = np.random.default_rng(0).random((3, 1024, 1200), np.float32)
    on_gpu = torch.from_numpy(image).cuda()
    _, single = plain(net, on_gpu)
    _, double = plain(net.double(), on_gpu.double())
    net.float()
    streamed = stream(net, tile=512)
    ours = streamed.saliency(image).numpy()
    assert distance(ours, double) <= 1.5 * distance(single, double)
    assert np.array_equal(streamed.saliency(image).numpy(), ours)
    short = stream(net, memory="500 MiB", precision="bf16").saliency(image).numpy()
    assert distance(single, double) < distance(short, double) < 0.5


@pytest.mark.parametrize("net", [ResidualNet, resnet18])
@pytest.mark.parametrize("work", ["saliency", "guided", "weights"])
@pytest.mark.parametrize(
    "bound", [{"memory": "3 GiB"}, {"memory": "6 GiB"}, {"memory": "500 MiB", "precision": "bf16"}]
)
def test_keeps_its_budget(net, work, bound):
    torch.manual_seed(0)
    net, image = net().eval().cuda(), np.random.default_rng(0).random((3, 2848, 4288), np.float32)
    streamed = stream(net, **bound)
    streamed.saliency(image[:, :256, :256])
    plan = streamed.plan(image.shape, weights=work == "weights", method="guided" if work == "guided" else "gradient")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if work == "weights":
        streamed.backward(image, lambda logits: torch.logsumexp(logits, 1).sum() - logits[0, 1])
    else:
        streamed.saliency(image, method="guided" if work == "guided" else "gradient")
    assert torch.cuda.max_memory_allocated() - before <= plan.peak_bytes
