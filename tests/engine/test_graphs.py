"""Tiled equals un-tiled for graphs of any shape: branches, aliases, in-place operations, several poolings."""

import math
import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from tilestream.engine import SaliencyPass, plan, stream, trace
from tilestream.engine.segment import segments


class Apply(nn.Module):
    """A function as a module, which torch.fx looks into."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *maps):
        return self.function(*maps)


class Graph(nn.Module):
    """Step i reads the values numbered `inputs[i]` (0 is the image); the values in `pooled` go to one linear layer."""

    def __init__(self, steps, inputs, pooled, head):
        super().__init__()
        self.steps, self.inputs, self.pooled, self.head = nn.ModuleList(steps), inputs, pooled, head

    def forward(self, x):
        values = [x]
        for step, inputs in zip(self.steps, self.inputs, strict=True):
            values.append(step(*(values[i] for i in inputs)))
        kinds = {"average": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}
        return self.head(torch.cat([kinds[kind](values[i], 1) for i, kind in self.pooled], 1).flatten(1))


ADDITIONS = (operator.add, torch.add, operator.iadd, lambda x, y: x.add_(y))
POINTWISE = (nn.ReLU(), nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5))
FUNCTIONS = (F.relu, torch.relu, lambda x: F.relu(x, inplace=True), lambda x: x.relu_(), lambda x: x.contiguous())


KINDS = (
    "convolution", "convolution", "convolution", "same", "max", "average", "ceil", "norm", "point", "point", "call",
    "pad", "activation", "transposed", "resample", "border", "space", "whole",
)  # fmt: skip
ACTIVATIONS = (nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.PReLU, lambda: nn.LeakyReLU(0.3, inplace=True), nn.Softmax2d)
WHOLE = (
    lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    lambda x: x * torch.tanh(F.adaptive_max_pool2d(x, 1)),
    lambda x: x + torch.softmax(x.flatten(2), -1).view(x.shape),
    lambda x: torch.cat([x, x - x.mean(1, keepdim=True)], 1),
)
JOINS = (lambda x, y: torch.cat([x, y], 1), operator.mul, operator.sub)


@st.composite
def steps(draw, channels: int):
    """One operation on a map with so many channels."""
    pairs = lambda low, high: draw(st.tuples(st.integers(low, high), st.integers(low, high)))  # noqa: E731
    kind = draw(st.sampled_from(KINDS))
    if kind == "activation":
        return draw(st.sampled_from(ACTIVATIONS))()
    if kind == "transposed":
        stride = pairs(1, 3)
        return nn.ConvTranspose2d(channels, 2, pairs(1, 4), stride, pairs(0, 2), tuple(s - 1 for s in stride))
    if kind == "resample":
        mode = draw(st.sampled_from(["nearest", "bilinear"]))
        if draw(st.booleans()):
            return nn.Upsample(size=pairs(1, 24), mode=mode)
        return nn.Upsample(scale_factor=(draw(st.sampled_from([0.6, 1, 1.5, 2])), 2), mode=mode)
    if kind == "border":
        sides = tuple(draw(st.integers(-1, 3)) for _ in range(4))
        mode = draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
        return Apply(lambda x: F.pad(x, sides if mode == "constant" else tuple(abs(s) for s in sides), mode))
    if kind == "space":
        groups = draw(st.sampled_from([1, channels]))
        return draw(st.sampled_from([nn.GroupNorm(groups, channels, eps=0.1), nn.InstanceNorm2d(channels, eps=0.1)]))
    if kind == "whole":
        return Apply(draw(st.sampled_from(WHOLE)))
    if kind == "convolution":
        groups = draw(st.sampled_from([1, channels]))
        out, far = groups * draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 6]))
        return nn.Conv2d(channels, out, pairs(1, 4), pairs(1, 4), pairs(0, far), pairs(1, 3), groups)
    if kind == "same":
        return nn.Conv2d(channels, 2, pairs(1, 4), padding="same", dilation=pairs(1, 3))
    if kind == "norm":
        norm = nn.BatchNorm2d(channels, affine=draw(st.booleans()))
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        return norm
    if kind == "pad":
        before, after = pairs(0, 2)
        return Apply(lambda x: F.pad(x, (0, 0, 0, 0, before, after)))
    if kind in ("point", "call"):
        return draw(st.sampled_from(POINTWISE)) if kind == "point" else Apply(draw(st.sampled_from(FUNCTIONS)))
    kernel, stride = pairs(1, 4), pairs(1, 4)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    if kind == "ceil":
        layer = draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))
        more = {"count_include_pad": draw(st.booleans())} if layer is nn.AvgPool2d else {}
        return layer(kernel, stride, padding, ceil_mode=True, **more)
    function, layer = (F.max_pool2d, nn.MaxPool2d) if kind == "max" else (F.avg_pool2d, nn.AvgPool2d)
    call = Apply(lambda x: function(x, kernel, stride, padding))
    return draw(st.sampled_from([call, layer(kernel, stride, padding), layer(kernel, padding=padding)]))


@st.composite
def graphs(draw):
    """A graph that starts with a convolution, an image, and how many outputs a tile has along each axis."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    image = torch.randn(1, draw(st.integers(1, 3)), *(draw(st.integers(1, 30)) for _ in range(2)), dtype=torch.float64)
    values, modules, inputs = [image], [], []
    for number in range(draw(st.integers(1, 8))):
        source = draw(st.integers(0, len(values) - 1)) if draw(st.booleans()) else len(values) - 1
        alike = [i for i, v in enumerate(values) if v.shape == values[source].shape]
        if number == 0:
            step, reads = nn.Conv2d(image.shape[1], 2, draw(st.integers(1, 3)), padding=draw(st.integers(0, 2))), (0,)
        elif draw(st.integers(0, 3)) == 0:
            step, reads = Apply(draw(st.sampled_from(ADDITIONS + JOINS))), (source, draw(st.sampled_from(alike)))
        else:
            step, reads = draw(steps(values[source].shape[1])), (source,)
        if modules and draw(st.integers(0, 5)) == 0:
            step = draw(st.sampled_from(modules))  # once more
        try:
            with torch.no_grad():
                result = step.double().eval()(*(values[i].clone() for i in reads))
        except (RuntimeError, TypeError, ValueError, UserWarning):  # a window that does not fit, other channels
            continue
        values.append(result)
        modules.append(step)
        inputs.append(reads)
    if not modules:
        modules, inputs = [nn.Conv2d(image.shape[1], 2, 1)], [(0,)]
        values.append(modules[0].double()(image).detach())
    last = list(range(1, len(values)))
    kinds = st.sampled_from(["average", "max"])
    pooled = [(len(values) - 1, draw(kinds)), *draw(st.lists(st.tuples(st.sampled_from(last), kinds), max_size=2))]
    width = sum(values[i].shape[1] for i, _ in pooled)
    head = (
        nn.Linear(width, 2) if draw(st.booleans()) else nn.Sequential(nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, 2))
    )
    return Graph(modules, inputs, pooled, head).double().eval(), image[0], draw(st.sampled_from([1, 2, 3, 1000]))


def nothing_comes_out(net: nn.Module, image: torch.Tensor) -> bool:
    try:
        return bool(net(image[None].clone()).isnan().all())
    except RuntimeError:
        return True


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=100, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(case=graphs())
def test_any_graph_equals_the_whole(whole, differs, check_gradients, case):
    net, image, outputs = case
    try:
        network = trace(net)
    except ValueError as error:
        if "has no convolution" in str(error):  # none on the way to a pooling
            return
        if "a map of which another value is a view" in str(error):  # written on after contiguous(), which may copy
            return
        raise
    try:
        bound = network.bind(tuple(image.shape[1:]))
    except ValueError:  # padding that leaves no pixel: plain PyTorch must have nothing to compare with either
        assert nothing_comes_out(net, image)
        return
    parts = segments(bound, ())
    try:
        streamed = stream(net, tile=math.lcm(*(side for part in parts for side in part.stride(part.owned))) * outputs)
    except ValueError as error:
        if "takes no image of noise" in str(error):  # its maps meet in images of one size alone
            return
        raise
    with torch.no_grad():
        logits = net(image[None].clone())
        assert not differs(streamed(image), logits)
    try:
        _, gradient = whole(net, image, 1)
    except RuntimeError:  # it overwrites what plain autograd keeps, or its input
        return
    check_gradients(net, image, streamed, logits, gradient)


@pytest.fixture
def both(whole, check_gradients):
    def run(net: nn.Module, image: torch.Tensor, tile: int) -> None:
        net.double().eval()
        logits, gradient = whole(net, image.double(), 1)
        check_gradients(net, image.double(), stream(net, tile=tile), logits, gradient)

    return run


def graph(*steps_, pooled=(-1,), channels=4, kind="average"):
    """Steps are (module or function, inputs...)."""
    modules = [s[0] if isinstance(s[0], nn.Module) else Apply(s[0]) for s in steps_]
    pools = [(i % (len(steps_) + 1), kind) for i in pooled]
    return Graph(modules, [s[1:] for s in steps_], pools, nn.Linear(channels, 2))


@pytest.mark.parametrize("kind", ["average", "max"])
def test_a_map_that_is_pooled_and_read_on_counts_its_halo_once(both, kind):
    conv = nn.Conv2d(2, 2, 3, padding=1)
    both(graph((conv, 0), (conv, 1), pooled=(0, 1, 2), channels=6, kind=kind), torch.randn(2, 20, 23), 4)


@pytest.mark.parametrize("function", [lambda x: F.relu(x, inplace=True), lambda x: operator.iadd(x, x)])
def test_who_holds_an_overwritten_map_sees_it_change(both, function):
    first = nn.Conv2d(2, 4, 3, padding=1)
    net = graph((first, 0), (nn.Identity(), 1), (function, 1), (operator.add, 1, 2), (operator.add, 4, 3))
    both(net, torch.randn(2, 20, 23), 4)


def test_an_alias_is_not_overwritten_by_the_engine(both):
    net = graph((nn.Conv2d(2, 4, 3), 0), (nn.Dropout(), 1), (nn.ReLU(), 1), (operator.add, 2, 3))
    both(net, torch.randn(2, 20, 23), 4)


def test_what_autograd_keeps_is_not_overwritten(both):
    twice = graph((nn.Conv2d(2, 4, 3), 0), (nn.ReLU(), 1), (nn.ReLU(), 2), (nn.ReLU(), 3))
    both(twice, torch.randn(2, 20, 23), 4)
    pool = nn.MaxPool2d(3, 1, 1)
    both(graph((nn.Conv2d(2, 4, 3), 0), (pool, 1), (nn.ReLU(), 1), (operator.add, 2, 3)), torch.randn(2, 9, 9), 3)


def test_pixels_that_no_output_reads_have_no_gradient(both):
    net = graph((nn.Conv2d(2, 4, 1, stride=5, padding=1), 0))
    both(net, torch.randn(2, 6, 16), 5)
    work = SaliencyPass(trace(net), plan(trace(net), (6, 16), tile=5))
    assert work.plan.routes[4] == ()
    written = []
    work.run(torch.randn(2, 6, 16), lambda cell, _: written.append(cell))
    assert sorted(map(str, written)) == sorted(str(tile.cell) for tile in work.plan.tiles if not tile.cell.empty)


def test_channels_that_are_padded_or_repeated(both):
    padded = graph((lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), 0), (nn.Conv2d(5, 4, 3), 1))
    both(padded, torch.randn(2, 9, 11), 4)
    one = graph((nn.Conv2d(2, 1, 1), 0), (nn.Conv2d(2, 4, 1), 0), (operator.add, 1, 2), kind="max")
    both(one, torch.randn(2, 9, 11), 4)


class Heads(nn.Module):
    """Its head overwrites a pooled vector and leaves another unused."""

    def __init__(self):
        super().__init__()
        self.conv, self.average, self.most = nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x)
        pooled, _ = self.average(x), self.most(x)
        return self.fc(self.relu(pooled).flatten(1))


def test_heads_may_overwrite_and_ignore(both):
    both(Heads(), torch.randn(2, 9, 11), 4)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(4, (1, 3), (36, 2)), (7, (1, 2), (9, 4)), (5, (1, 4), (30, 3))]
)
def test_one_channel_and_an_output_one_pixel_wide(whole, kernel, stride, size):
    """oneDNN, channels-last, computes these wrongly."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, kernel, stride, 2), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    ).eval()
    for parameter in net.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape).float()
    image = torch.randint(-2, 3, (1, *size)).float()
    logits, gradient = whole(net.double(), image.double(), 1)
    result = stream(net.float(), tile=1000 * stride[0] * stride[1]).saliency(image, reduce=None)
    assert torch.equal(result.logits.double(), logits)
    np.testing.assert_array_equal(result.numpy(), gradient.numpy())


def test_sums_over_tiles_share_no_memory_with_gradients_of_maps(both):
    """Over one pixel autograd returns the gradient itself for a shift's: nothing is to be summed."""
    norms = (nn.BatchNorm2d(2), 1), (nn.BatchNorm2d(2, affine=False), 1)
    both(graph((nn.Conv2d(3, 2, 3), 0), *norms, (operator.add, 3, 2), channels=2), torch.randn(3, 7, 9), 1)
