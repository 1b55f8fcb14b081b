"""What a review found to be silently wrong: now equal to plain PyTorch, or refused by name."""

import copy
import pickle
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tilestream.engine import stream

SIZE = (61, 83)


class Net(nn.Module):
    """A convolution, what `step` does to its map, and a linear head on means."""

    def __init__(self, step, channels: int = 4, head=None):
        super().__init__()
        self.conv, self.step, self.fc = nn.Conv2d(3, 4, 3, padding=1), step, head or nn.Linear(channels, 2)

    def forward(self, x):
        return self.fc(self.step(self.conv(x)).mean((2, 3)))


@pytest.fixture
def image():
    return torch.randn(3, *SIZE, dtype=torch.float64)


@pytest.fixture
def equal(whole, check_gradients, image):
    """Streamed in tiles of 16 px equals plain PyTorch."""

    def run(net: nn.Module, size=SIZE, tile: int = 16) -> None:
        torch.manual_seed(1)
        net.double().eval()
        x = torch.randn(3, *size, dtype=torch.float64)
        logits, gradient = whole(net, x, 1)
        check_gradients(net, x, stream(net, tile=tile), logits, gradient)

    return run


def refused(net: nn.Module, match: str, shape=(3, *SIZE)) -> None:
    net.double().eval()
    with pytest.raises(ValueError, match=match):
        stream(net, tile=16)(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "step",
    [
        lambda y: torch.cat([y[:, :2], F.relu(y)[:, 2:]], 1),
        lambda y: torch.cat([y.chunk(2, 1)[0], y.chunk(2, 1)[1]], 1) + F.relu(y),
        lambda y: torch.cat([F.gelu(y[:, :2]), F.relu(y)[:, :2]], 1),
    ],
)
def test_a_rectifier_leaves_views_of_its_input_alone(equal, step):
    equal(Net(step))


def test_a_rectifier_leaves_a_flattened_map_alone(equal):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(8, 2)

        def forward(self, x):
            y = self.conv(x)
            pooled = y.view(y.shape[0], 4, -1).mean(-1)
            return self.fc(torch.cat([pooled, F.relu(y).mean((2, 3))], 1))

    equal(Flat())


def in_place(name):
    def first(y):
        a = y[:, :2]
        a.relu_()
        return y * 1

    def second(y):
        a = y[:, :2]
        y.mul_(3.0)
        return torch.cat([a, y[:, 2:]], 1)

    def third(y):
        v = y.view(y.shape[0], 4, -1)
        v.mul_(2.0)
        return y * y

    def power(y):
        z = y
        y **= 2
        return z + y

    return {"first": first, "second": second, "third": third, "power": power}[name]


@pytest.mark.parametrize("name", ["first", "second", "third", "power"])
def test_writing_on_a_map_that_has_views_is_refused(name):
    refused(Net(in_place(name)), "overwrites a map of which another value is a view|cannot be streamed exactly")


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y.view(y.shape[0], 4, 2, -1, y.shape[3]).transpose(1, 2).reshape(y.shape),
        lambda y: y.view(y.size(0), 2, 2, y.size(2), y.size(3)).transpose(1, 2).reshape(1, 4, y.size(3), y.size(2)),
    ],
)
def test_views_that_move_positions_are_refused(view):
    refused(Net(view), "cannot be streamed|can be streamed|can only be joined again", (3, 60, 84))


@pytest.mark.parametrize("kernel", [(129, 2), (1, 257)])
def test_windows_beyond_what_a_winners_place_can_say_are_refused(kernel):
    refused(Net(nn.MaxPool2d(kernel, 1)), "max pooling over up to", (3, 300, 300))


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 1, dilation=70), nn.MaxPool2d((1, 3), 1, dilation=(1, 140)), nn.MaxPool2d((128, 2), 1)]
)
def test_wide_windows(equal, pool):
    equal(Net(pool), (170, 310) if pool.dilation != 70 else (170, 170), 64)


@pytest.mark.parametrize("factor", [1.1, 1.3, 0.7])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_resampling_by_odd_factors(equal, factor, mode):
    equal(Net(lambda y: F.interpolate(y, scale_factor=factor, mode=mode)), tile=1000)
    equal(Net(lambda y: F.interpolate(y, scale_factor=factor, mode=mode)), (9, 9), 1000)


def test_equals_share_the_gradient_of_amax(equal):
    class Masked(Net):
        def forward(self, x):
            return self.fc(torch.clamp(self.conv(x), max=0.1).amax((2, 3)))

    equal(Masked(None))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
def test_norms_of_maps_far_from_zero(whole, image, norm):
    """float64 itself leaves twelve digits less the four of the mean."""
    net = Net(nn.Sequential(norm, nn.Tanh())).double().eval()
    nn.init.constant_(net.conv.bias, 1e4)
    logits, gradient = whole(net, image, 1)
    streamed = stream(net, tile=16)
    torch.testing.assert_close(streamed(image).detach(), logits, rtol=1e-10, atol=1e-10)
    got = torch.from_numpy(streamed.saliency(image, reduce=None).numpy())
    assert (got - gradient).abs().max() < 1e-10 * gradient.abs().max()


def hooked(kind):
    net = Net(nn.ReLU())
    {
        "forward": lambda: net.register_forward_hook(lambda m, i, o: o * 2),
        "pre": lambda: net.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
        "backward": lambda: net.conv.register_full_backward_hook(lambda m, gi, go: None),
        "patched": lambda: setattr(net.conv, "forward", lambda x: x),
    }[kind]()
    return net


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "patched"])
def test_hooks_anywhere_are_refused(kind):
    refused(hooked(kind), "has hooks")


class Head(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), head

    def forward(self, x):
        return self.head(self.fc(self.conv(x).mean((2, 3))), x)


def without_gradient(z, x):
    with torch.no_grad():
        half = z * 0.5
    return z + half


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (lambda z, x: z.softmax(0), "looks at the whole batch"),
        (lambda z, x: z - z.mean(0, keepdim=True), "looks at the whole batch"),
        (lambda z, x: z / x.shape[0], "looks at the whole batch"),
        (lambda z, x: z.mean(0, keepdim=True), "for a batch of two"),
        (without_gradient, "gradients are switched off inside it"),
    ],
)
def test_what_tracing_cannot_see_is_refused(head, match):
    refused(Head(head), match)


CHANGES = {
    "data": lambda net: net.conv.weight.data.mul_(1.5),
    "numpy": lambda net: net.conv.weight.detach().numpy().__imul__(1.5),
    "module": lambda net: setattr(net, "step", nn.GELU()),
    "stride": lambda net: setattr(net.conv, "padding", (0, 0)),
    "eps": lambda net: setattr(net.norm, "eps", 3.0),
    "number": lambda net: setattr(net, "factor", 5.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_network_changed_afterwards_is_traced_anew(name, image):
    class Changing(Net):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.norm, self.factor = nn.BatchNorm2d(4), 2.0

        def forward(self, x):
            return self.fc(self.step(self.norm(self.conv(x))).mean((2, 3)) * self.factor)

    net = Changing().double().eval()
    streamed = stream(net, tile=16)
    before = streamed(image)
    CHANGES[name](net)
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(streamed(image).detach(), net(image[None]), rtol=1e-11, atol=0)
    assert not torch.equal(before, streamed(image))


def test_a_loss_of_nothing_adds_its_gradient_once(image):
    net = Net(nn.ReLU(), head=nn.Linear(4, 1)).double().eval()
    loss = lambda z: (z - z.detach()).sum()  # noqa: E731
    stream(net, tile=16).backward(image, loss)
    got = net.conv.weight.grad.clone()
    net.zero_grad()
    loss(net(image[None])).backward()
    torch.testing.assert_close(got, net.conv.weight.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("method", ["guided", "deconv"])
def test_rectifiers_behind_the_pooling_are_not_clamped_but_refused(method, image):
    net = Net(nn.ReLU(), head=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))).double().eval()
    with pytest.raises(ValueError, match="has others behind its pooling"):
        stream(net, tile=16).saliency(image, method=method)


def test_around_a_call(image):
    net = Net(nn.ReLU()).double().eval()
    streamed = stream(net, tile=16)
    want = streamed.saliency(image).numpy()
    assert np.abs(want).max() > 0
    with torch.inference_mode():
        np.testing.assert_array_equal(streamed.saliency(image).numpy(), want)
    single = stream(copy.deepcopy(net).float(), tile=16)
    want = single.saliency(image.float()).numpy()
    with torch.autocast("cpu", torch.bfloat16):
        stream(copy.deepcopy(net).float())(image.float())
        np.testing.assert_array_equal(single.saliency(image.float()).numpy(), want)
        single.backward(image.float(), lambda z: z.float().sum())


def test_threads_do_not_meet_in_one_streamed_network(image):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.PReLU(4),
        nn.ConvTranspose2d(4, 4, 2, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    net.double().eval()
    streamed = stream(net, tile=16)
    loss = lambda z: z.square().sum()  # noqa: E731
    loss(net(image[None])).backward()
    want = [8 * p.grad for p in net.parameters()]
    net.zero_grad()
    errors = []

    def one() -> None:
        try:
            for _ in range(2):
                streamed.backward(image, loss)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for p, w in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-10, atol=1e-10)


def test_what_is_overwritten_before_going_back_is_told(image):
    net = Net(nn.ReLU()).double().eval()
    streamed = stream(net, tile=16)
    x = image.clone().requires_grad_()
    z = streamed(x).sum()
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()
    x = image.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="gradients of gradients cannot be streamed"):
        torch.autograd.grad(streamed(x).sum(), x, create_graph=True)


def test_hooks_of_parameters(image):
    net = Net(nn.ReLU()).double().eval()
    seen = []
    net.fc.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    stream(net, tile=16).backward(image, lambda z: z.sum())
    assert torch.equal(seen[0], net.fc.bias.grad)
    images, net.conv.weight.grad = torch.stack([image, -image]), None
    net.conv.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    net(images).square().sum().backward()
    want, net.conv.weight.grad = net.conv.weight.grad, None
    stream(net, tile=16)(images).square().sum().backward()
    torch.testing.assert_close(net.conv.weight.grad, want, rtol=1e-10, atol=1e-14)


def test_cancelled_batches_add_nothing(image):
    net = Net(nn.ReLU(), head=nn.Linear(4, 3)).double().eval()
    images, seen = torch.stack([image] * 3), []
    streamed = stream(net, tile=16)
    streamed.backward(images, lambda z: z.square().sum(), progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]
    net.zero_grad()

    def stop(done: int, of: int) -> None:
        if done == len(seen) - 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed.backward(images, lambda z: z.square().sum(), progress=stop)
    assert all(p.grad is None for p in net.parameters())


def test_layer_scale_in_a_network_that_gives_a_map(image):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(1, 4, 1, 1))

        def forward(self, x):
            return self.conv(x) * self.scale / x.shape[2]

    net = Dense().double().eval()
    streamed = stream(net, tile=16)
    loss = lambda z: z.square().sum()  # noqa: E731
    streamed.backward(image, loss)
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    loss(net(image[None])).backward()
    for g, p in zip(got, net.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-11, atol=1e-14)
    for wrong in ((4, *SIZE), (1, 4, 59, 81), (4, 5, 5)):
        with pytest.raises(ValueError, match=r"upstream.shape=.* must be \(4, 59, 81\)"):
            streamed.saliency(image, upstream=torch.ones(wrong))


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (lambda y: y[:, :1] * torch.ones(1, 4, 1, 1, dtype=y.dtype), "fails on those that are streamed"),
        (lambda y: y.chunk(3, 1)[-1] + y[:, :2], "4 channels in 3 chunks are fewer than 3"),
    ],
)
def test_channels_that_do_not_fit(step, match):
    refused(Net(step), match)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda net, x: stream(net, tile="16"), "tile='16' must be the side of the tiles"),
        (lambda net, x: stream(net, tile=0), "tile=0 must be the side of the tiles"),
        (lambda net, x: stream(net).saliency(x, target=1.0), "target=1.0 must be the number of a logit"),
        (lambda net, x: stream(net)([[1]]), "image is a list; give an array or tensor"),
        (lambda net, x: stream(net).backward(x, lambda z: torch.zeros(())), "does not depend on the logits"),
    ],
)
def test_arguments_of_other_kinds(call, match, image):
    with pytest.raises(ValueError, match=match):
        call(Net(nn.ReLU()).double().eval(), image)


def test_a_streamed_network_travels(image):
    streamed = stream(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval(), tile=16)
    again = pickle.loads(pickle.dumps(streamed))
    assert torch.equal(again(image), streamed(image))


class UNet(nn.Module):
    """Takes only sides that two divides; `step` is what it does at half the size."""

    def __init__(self, step):
        super().__init__()
        self.a, self.b, self.step = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), step
        self.up, self.out = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 2, 3, padding=1)

    def forward(self, x):
        a = F.relu(self.a(x))
        return self.out(torch.cat([a, self.up(F.relu(self.b(self.step(F.max_pool2d(a, 2)))))], 1))


def write_on_a_copy(y):
    y = y - 0.5
    return F.relu(y.permute(0, 2, 3, 1).contiguous(), inplace=True).permute(0, 3, 1, 2) * 2 + y


def write_on_a_pooled_vector(y):
    v = y.mean((2, 3), keepdim=True)
    m = y + v
    v.mul_(3)
    return m * v


def no_gradient(y):
    with torch.no_grad():
        return y * 2


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (no_gradient, "gradients are switched off inside it"),
        (write_on_a_copy, "overwrites a map of which another value is a view"),
        (write_on_a_pooled_vector, "is overwritten, and maps"),
        (lambda y: y * F.avg_pool2d(y, y.shape[2:], padding=1), "padding=1, divisor_override=None cannot be streamed"),
        (lambda y: y * F.avg_pool2d(y, y.shape[2:], divisor_override=7), "divisor_override=7 cannot be streamed"),
        (lambda y: y * float(np.random.rand()), "other results in plain PyTorch"),
    ],
)
def test_networks_that_want_even_sides_are_compared_too(step, match):
    refused(UNet(step), match, (3, 64, 84))


def test_a_softmax_over_rows_is_not_one_over_channels():
    class Rows(UNet):
        def __init__(self):
            super().__init__(None)
            self.soft = nn.Softmax2d()
            self.step = lambda y: self.soft(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    refused(Rows(), "cannot be streamed over a map with its channels last", (3, 64, 84))


def test_a_network_that_nothing_can_be_compared_of_is_refused():
    class Picky(Net):
        def forward(self, x):
            assert x.shape[2] == 61, "61 rows or nothing"
            return super().forward(x)

    net = Picky(nn.ReLU())
    refused(net, "takes no image of noise|cannot be traced")
    net = Net(nn.ReLU())
    nn.init.constant_(net.fc.bias, float("nan"))
    refused(net, "takes no image of noise.* it gives NaN or infinity")


def test_images_that_cannot_be_negative(equal, whole, check_gradients):
    class Root(Net):
        def forward(self, x):
            return super().forward(torch.sqrt(x))

    torch.manual_seed(0)
    net, x = Root(nn.ReLU()).double().eval(), torch.rand(3, *SIZE, dtype=torch.float64) + 0.1
    logits, gradient = whole(net, x, 1)
    check_gradients(net, x, stream(net, tile=16), logits, gradient)


class Losses:
    """Losses that depend on more than the logits."""

    def __init__(self, net):
        self.net, self.heat = net, torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def penalty(self, z):
        return z.square().sum() + 3 * sum(p.square().sum() for p in self.net.parameters())

    def temperature(self, z):
        return F.cross_entropy(z / self.heat.exp(), torch.zeros(len(z), dtype=torch.long))

    def written(self, z):
        return z.mul_(2).square().sum()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["penalty", "temperature", "written"])
def test_losses_of_more_than_the_logits(name, classes, image):
    net = Net(nn.ReLU(), head=nn.Linear(4, classes)).double().eval()
    losses, images = Losses(net), torch.stack([image, image.flip(1)])
    leaves = [*net.parameters(), losses.heat]
    getattr(losses, name)(net(images).clone()).backward()
    want = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
    for p in leaves:
        p.grad = None
    calls = []
    stream(net, tile=16).backward(images, lambda z: (calls.append(1), getattr(losses, name)(z))[1])
    assert len(calls) == 1
    for p, w in zip(leaves, want, strict=True):
        torch.testing.assert_close(torch.zeros_like(w) if p.grad is None else p.grad, w, rtol=1e-10, atol=1e-12)


def test_hooks_see_the_gradient_of_the_whole_batch(image):
    def run(backward):
        net.zero_grad(set_to_none=True)
        backward()
        return net.conv.weight.grad

    net, images = Net(nn.ReLU(), head=nn.Linear(4, 3)).double().eval(), torch.stack([image, image.flip(1), -image])
    net.conv.weight.register_hook(lambda g: g.clamp(-1, 1))
    loss = lambda z: (z * torch.arange(9.0).reshape(3, 3)).square().sum() * 100  # noqa: E731
    want = run(lambda: loss(net(images)).backward())
    torch.testing.assert_close(run(lambda: stream(net, tile=16).backward(images, loss)), want, rtol=1e-10, atol=1e-12)


def test_what_changes_between_forward_and_backward(image):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(4, 3)).double().eval()
    streamed, old = stream(net, tile=16), net[0].weight
    net(image[None]).square().sum().backward()
    want, old.grad = old.grad, None
    z = streamed(image).square().sum()
    net[0].weight = nn.Parameter(torch.zeros_like(old))  # the result came from the old one
    z.backward()
    torch.testing.assert_close(old.grad, want, rtol=1e-10, atol=1e-12)
    z = streamed(image).sum()
    net[1].running_var.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()
    z = streamed(image).sum()
    net[0].weight.requires_grad_(False)  # plain PyTorch gives it none then
    z.backward()
    assert net[0].weight.grad is None


def test_functional_call(image):
    net = Net(nn.ReLU()).double().eval()
    streamed = stream(net, tile=16)
    values = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    torch.func.functional_call(net, values, (image[None],)).square().sum().backward()
    want = {name: v.grad.clone() for name, v in values.items()}
    for v in values.values():
        v.grad = None
    named = {f"net.{name}": v for name, v in values.items()}
    torch.func.functional_call(streamed, named, (image,)).square().sum().backward()
    for name, v in values.items():
        torch.testing.assert_close(v.grad, want[name], rtol=1e-10, atol=1e-12)


@dataclass(slots=True)
class Slots:
    factor: float = 2.0


MORE_CHANGES = {
    "negative": lambda net: net.conv.weight.data.neg_(),
    "flipped": lambda net: net.conv.weight.data.copy_(net.conv.weight.flip(3)),
    "doubled": lambda net: net.conv.weight.data.mul_(2),
    "list": lambda net: net.many.__setitem__(0, 5.0),
    "dict": lambda net: net.named.update(a=5.0),
    "numpy": lambda net: setattr(net, "number", np.float64(5)),
    "array": lambda net: net.array.fill(5.0),
    "function": lambda net: setattr(net, "call", torch.tanh),
    "slots": lambda net: setattr(net.slots, "factor", 5.0),
    "memoryview": lambda net: net.memory.__setitem__(0, 5),
    "attribute of a class": lambda net: setattr(net.config, "factor", 5.0),
    "default": lambda net: net.default.__defaults__[0].__setitem__(0, 5.0),
    "deep": lambda net: net.deep[0][0][0][0][0][0][0][0][0].__setitem__(0, 5.0),
    "closure": lambda net: net.closure.__closure__[0].cell_contents.__setitem__(0, 5.0),
    "pooling of a leaf": lambda net: setattr(net.pool, "count_include_pad", False),
    "class": lambda net: setattr(type(net), "after", lambda self, y: y * 5),
}


@pytest.mark.parametrize("name", MORE_CHANGES)
def test_whatever_is_changed_afterwards(name, image):
    class Changing(Net):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.many, self.named, self.number, self.call = [2.0, 1.0], {"a": 1.0}, np.float64(1.5), torch.sigmoid
            self.array, self.slots, self.memory = np.array([2.0]), Slots(), memoryview(bytearray(b"\2"))
            self.config, self.deep = type("Config", (), {"factor": 2.0}), [[[[[[[[[[2.0]]]]]]]]]]
            self.default, factors = lambda y, factors=[2.0]: y * factors[0], [2.0]
            self.closure = lambda y: y * factors[0]
            self.pool = nn.AvgPool2d(3, 1, 1)

        def after(self, y):
            return y

        def forward(self, x):
            y = self.call(self.step(self.conv(x)) * self.many[0] + self.named["a"]) * float(self.number)
            y = self.pool(self.closure(self.default(y)) * self.slots.factor * self.config.factor)
            factor = float(self.array[0]) * self.memory[0] * self.deep[0][0][0][0][0][0][0][0][0][0]
            return self.fc(self.after(y).mean((2, 3)) * factor)

    change = MORE_CHANGES[name]
    net = Changing().double().eval()
    streamed = stream(net, tile=16)
    before = streamed(image)
    change(net)
    with torch.no_grad():
        torch.testing.assert_close(streamed(image).detach(), net(image[None]), rtol=1e-11, atol=1e-13)
    assert not torch.equal(before, streamed(image))


def test_gradients_are_added_where_they_are_and_never_shared(image):
    class Twins(Net):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.one, self.two = (nn.Parameter(torch.zeros(2)) for _ in range(2))

        def forward(self, x):
            return super().forward(x) + (self.one + self.two)

    net = Twins().double().eval()
    kept = net.conv.weight.grad = torch.zeros_like(net.conv.weight)
    stream(net, tile=16).backward(image, lambda z: z.square().sum())
    assert net.conv.weight.grad is kept
    assert kept.abs().max() > 0
    assert net.one.grad.data_ptr() != net.two.grad.data_ptr()


@pytest.mark.parametrize("mode", ["scatter", "gather"])
def test_a_nan_is_an_error_where_the_result_is_a_map(mode, image):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).double().eval()
    image[1, 30, 40] = float("nan")
    with pytest.raises(ValueError, match="is NaN in"):
        stream(net, tile=16).saliency(image, mode=mode)


@pytest.mark.parametrize(
    ("first", "channels"),
    [
        (lambda net, x: net.conv(x), 3),
        (lambda net, x: net.grey(x.mean(1, keepdim=True)), 3),
        (lambda net, x: net.conv(x[:, :3]) + net.grey(x[:, 3:]), 4),
        (lambda net, x: net.grey(x[:, 3:]) + net.conv(x[:, :3]), 4),
        (lambda net, x: net.conv(x[:, :3]), 4),
        (lambda net, x: net.grey(x.mean(1, keepdim=True)), 2),
        (lambda net, x: net.grey(net.norm(x).mean(1, keepdim=True)), 5),
        (lambda net, x: net.grey((x - net.shift).mean(1, keepdim=True)), 5),
    ],
)
def test_channels_of_the_image(equal, first, channels, whole, check_gradients):
    class First(Net):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.grey, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(5)
            self.shift = nn.Parameter(torch.rand(1, 5, 1, 1))

        def forward(self, x):
            return self.fc(self.step(first(self, x)).mean((2, 3)))

    net, x = First().double().eval(), torch.randn(channels, *SIZE, dtype=torch.float64)
    logits, gradient = whole(net, x, 1)
    streamed = stream(net, tile=16)
    torch.testing.assert_close(streamed(x).detach(), logits, rtol=1e-11, atol=1e-13)
    got = torch.from_numpy(streamed.saliency(x, reduce=None).numpy())
    torch.testing.assert_close(got, gradient, rtol=1e-11, atol=1e-14)


def test_a_network_of_buffers_alone(image):
    net = Net(nn.ReLU()).double().eval()
    for module in (net.conv, net.fc):
        for name, value in list(module.named_parameters()):
            delattr(module, name)
            module.register_buffer(name, value.detach())
    torch.testing.assert_close(stream(net, tile=16)(image), net(image[None]), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (
            lambda y: (y.permute(0, 2, 3, 1) * torch.ones(64, 84, 4, dtype=y.dtype)).permute(0, 3, 1, 2),
            "one value a channel",
        ),
        (
            lambda y: (y.permute(0, 2, 3, 1) * torch.ones(84, 4, dtype=y.dtype)).permute(0, 3, 1, 2),
            "one value a channel",
        ),
    ],
)
def test_values_a_pixel_are_not_values_a_channel(step, match):
    refused(Net(step), match, (3, 64, 84))


def test_hooks_of_containers_are_refused():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net[0].register_forward_hook(lambda m, i, o: None)
    refused(net, "0: Sequential: has hooks")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda net, x: stream(net)(x + 1j), "is complex; give real values"),
        (lambda net, x: stream(net)(x.numpy() + 1j), "is complex; give real values"),
        (lambda net, x: stream(net).backward(x, lambda z: z.sum() * 1j), "gives a complex number"),
    ],
)
def test_complex_numbers(call, match, image):
    with pytest.raises(ValueError, match=match):
        call(Net(nn.ReLU()).double().eval(), image)


def test_numbers_of_numpy(image):
    net = Net(nn.ReLU()).double().eval()
    streamed = stream(net, tile=16)
    want = streamed.saliency(image, target=1).numpy()
    np.testing.assert_array_equal(streamed.saliency(image, target=np.int64(1)).numpy(), want)


def test_tensors_that_want_gradients_and_are_no_parameters_are_refused():
    class Hidden(Net):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.register_buffer("scale", torch.ones(1, dtype=torch.float64, requires_grad=True))

        def forward(self, x):
            return super().forward(x) * self.scale

    net = Hidden()
    net.scale.requires_grad_()
    refused(net, "scale requires grad but is no parameter")
    net = Net(nn.ReLU()).double()
    weight = net.conv.weight.detach().clone().requires_grad_()
    del net.conv.weight
    net.conv.weight = weight * 2
    refused(net, "weight requires grad but is no parameter")


def test_weights_that_are_tied_to_others_are_noticed(image):
    class Tied(Net):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.c, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
            self.b.weight = self.conv.weight

        def forward(self, x):
            return self.fc((self.conv(x) * torch.sigmoid(self.b(x)) + self.c(x)).mean((2, 3)))

    net = Tied().double().eval()
    streamed = stream(net, tile=16)
    streamed(image)
    net.b.weight = net.c.weight
    with torch.no_grad():
        torch.testing.assert_close(streamed(image).detach(), net(image[None]), rtol=1e-11, atol=1e-13)


def test_the_shortcut_of_two_logits_looks_at_every_image(image):
    """The first image is blank, so that the weights' gradient is the second's alone, however much smaller."""
    net = Net(nn.ReLU())
    net.conv.bias = None
    net.double().eval()
    images = torch.stack([torch.zeros_like(image), image])
    loss = lambda z: 1e10 * (z[0, 1] - z[0, 0]) + 1e-8 * z[1].sum()  # noqa: E731
    loss(net(images)).backward()
    want, net.conv.weight.grad = net.conv.weight.grad, None
    stream(net, tile=16).backward(images, loss)
    torch.testing.assert_close(net.conv.weight.grad, want, rtol=1e-10, atol=0)


def test_what_forward_leaves_behind_does_not_trace_it_anew(image, monkeypatch):
    class Leaving(Net):
        def forward(self, x):
            self.features = self.conv(x)
            return super().forward(x)

    net = Leaving(nn.ReLU()).double().eval()
    streamed = stream(net, tile=16)
    known = streamed.network()
    assert streamed.network() is known


def test_weights_of_zero_hide_nothing():
    class Gate(Head):
        def __init__(self):
            super().__init__(lambda z, x: z)
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            z = self.fc(self.conv(x).mean((2, 3)))
            return z + self.gate * (z - z.mean(0, keepdim=True))

    refused(Gate(), "looks at the whole batch")
    net = Head(lambda z, x: z - z.mean(0, keepdim=True))
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    refused(net, "looks at the whole batch")


def test_a_gate_that_begins_at_zero_is_streamed(equal):
    class Gate(Net):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.gate = nn.Parameter(torch.zeros(1, 4, 1, 1))

        def forward(self, x):
            y = self.conv(x)
            return self.fc((y + self.gate * self.step(y)).mean((2, 3)))

    equal(Gate())


def test_a_loss_that_reads_the_image_is_refused(image):
    x = image[None].clone().requires_grad_()
    with pytest.raises(ValueError, match="loss_fn reads the image"):
        stream(Net(nn.ReLU()).double().eval(), tile=16).backward(x, lambda z: z.sum() + x.square().sum())
    assert x.grad is None


def test_tensors_inside_the_loss_are_gone_back_through_once(image):
    net, calls, kept = Net(nn.ReLU(), head=nn.Linear(4, 3)).double().eval(), [], []

    def loss(z):
        scaled = z * net.fc.bias
        scaled.retain_grad()
        scaled.register_hook(lambda g: calls.append(1))
        kept.append(scaled)
        return scaled.square().sum()

    loss(net(image[None])).backward()
    stream(net, tile=16).backward(image, loss)
    assert len(calls) == 2
    torch.testing.assert_close(kept[1].grad, kept[0].grad, rtol=1e-10, atol=1e-12)


class Own(torch.autograd.Function):
    """Twice the square, keeping its input under a name that autograd's own nodes use too."""

    @staticmethod
    def forward(ctx, z):
        ctx.variable = z.detach()
        return 2 * z * z

    @staticmethod
    def backward(ctx, g):
        return 4 * g * ctx.variable


def test_a_function_of_the_users_in_the_loss(image):
    net = Net(nn.ReLU()).double().eval()
    loss = lambda z: Own.apply(z).sum()  # noqa: E731
    loss(net(image[None])).backward()
    want, net.conv.weight.grad = net.conv.weight.grad, None
    stream(net, tile=16).backward(image, loss)
    torch.testing.assert_close(net.conv.weight.grad, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("call", [
    lambda s, x: torch.func.grad(lambda t: s(t).sum())(x), lambda s, x: torch.func.vmap(s)(x[None]),
    lambda s, x: torch.func.jacrev(s)(x),
    lambda s, x: torch.func.grad(lambda p: torch.func.functional_call(s, p, (x,)).sum())(dict(s.named_parameters())),
])  # fmt: skip
def test_transforms_of_functions_are_refused(call, image):
    with pytest.raises(ValueError, match=r"torch.func transforms cannot be streamed"):
        call(stream(Net(nn.ReLU()).double().eval(), tile=16), image)


def test_tracing_leaves_the_network_as_it_is(image):
    class Busy(Net):
        def __init__(self):
            super().__init__(nn.ReLU())
            self.calls, self.last = 0, None

        def forward(self, x):
            self.calls += 1
            self.last = self.conv(x - torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64).view(1, 3, 1, 1))
            return self.fc(self.step(self.last).mean((2, 3)))

    net = Busy().double().eval()
    before = dict(vars(net))
    streamed = stream(net, tile=16)
    known = streamed.network()
    with torch.no_grad():
        torch.testing.assert_close(
            streamed(image), Busy.forward(copy.deepcopy(net), image[None]), rtol=1e-11, atol=1e-13
        )
    assert streamed.network() is known
    assert vars(net) == before


def test_other_threads_run_networks_while_one_is_traced():
    """torch.fx replaces nn.Module.__call__ for all of them."""
    entered, go, plain = threading.Event(), threading.Event(), Net(nn.ReLU())

    class Slow(Net):
        def forward(self, x):
            if not isinstance(x, torch.Tensor):
                entered.set()
                go.wait(10)
            return super().forward(x)

    thread = threading.Thread(target=stream, args=(Slow(nn.ReLU()).eval(),))
    thread.start()
    assert entered.wait(10)
    try:
        assert isinstance(plain(torch.randn(1, 3, 8, 8)), torch.Tensor)
    finally:
        go.set()
        thread.join()


@pytest.mark.parametrize(
    "step",
    [
        lambda y: y.contiguous().relu_() * 2,
        lambda y: torch.cat([F.relu(y[:, :2], inplace=True)] * 2, 1),
    ],
)
def test_views_that_nobody_reads_afterwards_may_be_overwritten(equal, step):
    equal(Net(step))


def test_a_network_that_takes_no_batch(image):
    class One(Net):
        def forward(self, x):
            y = self.conv(x)
            return self.fc((y.permute(0, 2, 3, 1) * y.mean((2, 3))).permute(0, 3, 1, 2).mean((2, 3)))

    net = One(nn.ReLU()).double().eval()
    streamed = stream(net, tile=16)
    with torch.no_grad():
        torch.testing.assert_close(streamed(image[None]), net(image[None]), rtol=1e-11, atol=1e-13)
    for call in (streamed, lambda x: streamed.backward(x, torch.sum)):
        with pytest.raises(ValueError, match=r"One.forward takes one image: The size of tensor a"):
            call(torch.stack([image, image]))


class LowRank(nn.Module):
    """A weight plus a product of two narrow matrices (LoRA)."""

    def __init__(self, weight):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(len(weight), 2)), nn.Parameter(torch.randn(2, weight[0].numel()))

    def forward(self, weight):
        return weight + (self.a @ self.b).reshape(weight.shape)


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: parametrizations.weight_norm(conv),
        lambda conv: parametrizations.spectral_norm(conv),
        lambda conv: parametrize.register_parametrization(conv, "weight", LowRank(conv.weight)),
    ],
)
def test_weights_that_are_computed_from_others(equal, change):
    net = Net(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    for conv in (net.conv, net.step[2]):
        change(conv)
    equal(net)


@pytest.mark.parametrize(
    "step",
    [
        lambda y: y + F.relu(y).detach(),
        lambda y: F.relu(y.detach()) * y,
        lambda y: F.relu(y - torch.detach(y).mean((2, 3), keepdim=True)),
        lambda y: (y.permute(0, 2, 3, 1).detach() + y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    ],
)
def test_nothing_comes_back_through_what_was_detached(equal, step):
    equal(Net(step))


def test_a_backbone_that_is_detached(image):
    class Frozen(Net):
        def forward(self, x):
            return self.fc(self.step(self.conv(x).detach()).mean((2, 3)))

    net = Frozen(nn.Conv2d(4, 4, 3, stride=2)).double().eval()
    net(image[None])[0, 1].backward()
    wanted = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    streamed = stream(net, tile=16)
    streamed.backward(image, lambda logits: logits[0, 1])
    for name, parameter in net.named_parameters():
        if name.startswith("conv."):
            assert wanted[name] is None
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-11, atol=1e-13)
    assert not streamed.saliency(image).numpy().any()


class Functional(nn.Module):
    """Convolutions by the function, of a parameter and of a buffer, as blurs are written."""

    def __init__(self, weight=lambda w: w):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))
        self.register_buffer("blur", torch.rand(4, 1, 3, 2))
        self.fc, self.change = nn.Linear(4, 2), weight

    def forward(self, x):
        y = F.relu(F.conv2d(x, self.change(self.weight), self.bias, padding="same"))
        return self.fc(F.conv2d(y, self.blur, stride=(2, 1), padding=(1, 0), groups=4).mean((2, 3)))


def test_convolution_by_the_function(equal, image):
    net = Functional()
    equal(net)
    streamed = stream(net, tile=16)
    streamed(image[None])
    with torch.no_grad():
        net.blur.mul_(2)
        net.weight.add_(1)
        torch.testing.assert_close(streamed(image[None]), net(image[None]), rtol=1e-11, atol=1e-13)


def test_a_weight_that_forward_computes_is_refused():
    refused(Functional(lambda w: w - w.mean()), "weights that the forward code computes cannot be streamed")


def test_segments_whose_inputs_end_at_different_places(whole, check_gradients):
    """A tile over the image's last rows, of which the other input, two rows shorter, has none."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.fc = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3), nn.Linear(2, 2)

        def forward(self, x):
            y = self.first(x)
            return self.fc((self.second(x) - y).mean((2, 3)) + y.amax((2, 3)))

    torch.manual_seed(0)
    net = Two().double().eval()
    for size in ((18, 4), (17, 5), (19, 4), (21, 6), (20, 7), (23, 5)):
        image = torch.randn(3, *size, dtype=torch.float64)
        check_gradients(net, image, stream(net, tile=8), *whole(net, image, 1))


def test_of_tied_maxima_the_first_wins_though_its_tile_comes_later(whole, check_gradients):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double().eval()
    image = torch.zeros(3, 32, 32, dtype=torch.float64)
    nn.init.ones_(net[0].weight)
    image[:, 5, 3] = image[:, 2, 20] = image[:, 9, 1] = 1  # in tiles of 16 px the second is the first of all
    logits, gradient = whole(net, image, 1)
    assert gradient[:, 2, 20].all()
    assert not gradient[:, 5, 3].any()
    check_gradients(net, image, stream(net, tile=16), logits, gradient)
