"""Tiled equals un-tiled: DESIGN's tests (a), (b) and the negative control (d)."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from tilestream.engine import SaliencyPass, plan, stream, trace
from tilestream.geometry import Region

CASES = [
    ("paper_net", (301, 453), 64),
    ("paper_net", (301, 453), 192),
    ("paper_net", (257, 130), 128),
    ("paper_net", (64, 65), 64),
    ("local_average_net", (157, 203), 64),
    ("small_resnet18", (173, 227), 32),
    ("small_resnet18", (173, 227), 96),
    ("small_resnet18", (97, 211), 64),
    ("small_resnet18", (1, 33), 32),
]


@pytest.mark.parametrize(("make", "size", "tile"), CASES)
def test_float64_equals_the_whole(make, size, tile, whole, request):
    net, image = request.getfixturevalue(make), torch.randn(3, *size, dtype=torch.float64)
    logits, gradient = whole(net, image, 2)
    streamed = stream(net, tile=tile)
    result = streamed.saliency(image, target=2, reduce=None)
    assert torch.allclose(result.logits, logits, rtol=0, atol=1e-12 * logits.abs().max().item())
    assert torch.allclose(streamed(image), logits, rtol=0, atol=1e-12 * logits.abs().max().item())
    error = np.abs(result.numpy() - gradient.numpy()).max()
    assert error <= 1e-12 * gradient.abs().max().item()


@pytest.mark.parametrize("reduce", ["mean", "absmean", "absmax"])
def test_reductions_of_channels(reduce, whole, small_resnet18):
    net, image = small_resnet18, torch.randn(3, 90, 121, dtype=torch.float64)
    gradient = whole(net, image, 1)[1].numpy()
    expected = {
        "mean": gradient.mean(axis=0),
        "absmean": np.abs(gradient).mean(axis=0),
        "absmax": np.abs(gradient).max(axis=0),
    }[reduce]
    got = stream(net, tile=32).saliency(image, reduce=reduce).numpy()
    assert got.shape == (90, 121)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def integers(net: nn.Module) -> nn.Module:
    """Weights drawn from -2..2, so that float32 adds without rounding."""
    for parameter in net.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape).to(parameter.dtype)
    return net.eval()


@st.composite
def integer_cases(draw):
    """Up to three windowed layers of any kernel, stride, padding and dilation, a max pooling head, an image, a tile."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    layers, channels = [], 3
    for _ in range(draw(st.integers(1, 3))):
        kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
        if draw(st.booleans()):
            padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
            groups = draw(st.sampled_from([1, channels]))
            layers.append(
                nn.Conv2d(channels, 3 * groups, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
            )
            channels = 3 * groups
        else:
            layers.append(nn.MaxPool2d(kernel, stride, tuple(k // 2 for k in kernel), dilation))
        if draw(st.booleans()):
            layers.append(nn.ReLU())
    if not any(isinstance(layer, nn.Conv2d) for layer in layers):
        layers.insert(0, nn.Conv2d(3, 3, 3, padding=1))
        channels = 3
    net = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(channels, 2))
    size = draw(st.tuples(st.integers(20, 50), st.integers(20, 50)))
    return integers(net), torch.randint(-2, 3, (3, *size)).float(), draw(st.integers(1, 4))


@settings(
    max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # a network shrinks slowly
@given(case=integer_cases())
def test_integers_are_equal_bit_for_bit(whole, case):
    net, image, cells = case
    try:
        logits, gradient = whole(net, image, 1)
    except RuntimeError:  # a window does not fit the map before it
        return
    if not logits.isfinite().all():  # a maximum over padding alone is minus infinity
        return
    network = trace(net)
    stride = network.nodes[-1].stride
    tile = cells * stride[0] * stride[1]  # a multiple of both
    result = stream(net, tile=tile).saliency(image, reduce=None)
    assert torch.equal(result.logits, logits)
    np.testing.assert_array_equal(result.numpy(), gradient.numpy())


def test_a_halo_too_narrow_by_one_pixel_is_wrong_and_noticed(whole):
    """The negative control: a tile that misses a column of its halo is far off, and the engine refuses to run it."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).double().eval()
    image = torch.randn(3, 64, 64, dtype=torch.float64)
    gradient = whole(net, image, 1)[1].numpy()
    layout = plan(trace(net), (64, 64), tile=16)
    work = SaliencyPass(trace(net), layout, target=1, reduce=None)
    narrow = replace(layout.tiles[0], window=replace(layout.tiles[0].window, x1=layout.tiles[0].window.x1 - 1))
    with pytest.raises(ValueError, match=r"reads .* but its outputs need"):
        work.pieces(image, narrow, work.upstream())

    class ColumnLost:
        """An image whose windows miss their last column, unless it is the image's."""

        shape = image.shape

        def __getitem__(self, index):
            block = image[index].clone()
            if index[2].stop < image.shape[2]:
                block[:, :, -1] = 0
            return block

    def run(source) -> float:
        values = np.zeros(gradient.shape)

        def write(cell: Region, block: np.ndarray) -> None:
            values[:, cell.y0 : cell.y1, cell.x0 : cell.x1] = block

        work.run(source, write)
        return np.abs(values - gradient).max() / np.abs(gradient).max()

    assert run(image) < 1e-12
    assert run(ColumnLost()) > 0.1


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)])
def test_a_head_that_is_not_linear_takes_two_sweeps(pool, whole):
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)
    )
    net, image = net.double().eval(), torch.randn(3, 41, 37, dtype=torch.float64)
    logits, gradient = whole(net, image, 0)
    assert not SaliencyPass(trace(net), plan(trace(net), (41, 37), tile=8)).one_sweep
    result = stream(net, tile=8).saliency(image, target=0, reduce=None)
    torch.testing.assert_close(result.logits, logits, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.numpy(), gradient.numpy(), rtol=0, atol=1e-12)


def test_average_pooling_addition_and_channel_padding(whole):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, 2, padding=2, dilation=2)
            self.same = nn.Conv2d(6, 6, (5, 3), padding="same")
            self.pool, self.drop, self.fc = nn.AvgPool2d(3, 2, 1), nn.Dropout(0.5), nn.Linear(12, 2)

        def forward(self, x):
            x = torch.relu(self.a(x))
            skip = nn.functional.pad(self.pool(x), (0, 0, 0, 0, 1, 1))
            x = self.drop(self.b(x)) + skip
            x = self.same(x) + x + x
            mean, most = nn.functional.adaptive_avg_pool2d(x, 1), nn.functional.adaptive_max_pool2d(x, (1, 1))
            return self.fc(torch.cat([mean, most], 1).flatten(1))

    net, image = Net().double().eval(), torch.randn(3, 51, 38, dtype=torch.float64)
    logits, gradient = whole(net, image, 1)
    result = stream(net, tile=8).saliency(image, reduce=None)
    torch.testing.assert_close(result.logits, logits, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.numpy(), gradient.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(5, 1, 2), nn.AvgPool2d((1, 4), 1, (0, 2), count_include_pad=False),
        nn.AvgPool2d(3, 1, divisor_override=2), nn.AvgPool2d((7, 2), (1, 2), (3, 1), ceil_mode=True),
    ],
)  # fmt: skip
def test_average_pooling_at_stride_one(pool, dtype, whole):
    net = nn.Sequential(pool, nn.Conv2d(3, 4, 3, 2), pool, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    net, image = net.to(dtype).eval(), torch.randn(3, 51, 38, dtype=dtype)
    logits, gradient = whole(net, image, 1)
    result = stream(net, tile=8).saliency(image, reduce=None)
    error = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(result.logits, logits, rtol=0, atol=error)
    np.testing.assert_allclose(result.numpy(), gradient.numpy(), rtol=0, atol=error * gradient.abs().max().item())


def test_wide_average_pooling_in_bf16_returns():
    """oneDNN's depthwise convolution does not, and a hang in C can be ended from outside alone."""
    code = """if True:
        import torch
        from torch import nn
        from tilestream.engine import stream
        net = nn.Sequential(nn.AvgPool2d((1, 21), 1), nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        stream(net, memory="100 MiB", precision="bf16").saliency(torch.randn(3, 64, 160))
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_sources_of_every_kind_give_the_same(tmp_path, small_resnet18):
    import zarr

    net = small_resnet18.float()
    image = np.random.default_rng(0).integers(0, 256, (3, 70, 90), dtype=np.uint8)
    stored = zarr.create_array(tmp_path / "image.zarr", data=image, chunks=(3, 32, 32))
    mapped = np.memmap(tmp_path / "image.raw", np.uint8, "w+", shape=image.shape)
    mapped[:] = image
    mapped.flags.writeable = False
    streamed = stream(net, tile=32)
    expected = streamed.saliency(image).numpy()
    tensors = (torch.from_numpy(image), torch.from_numpy(image)[None])
    turned = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    for source in (stored, mapped, *tensors, image.astype(np.float32), image.astype(">f4"), turned):
        np.testing.assert_array_equal(streamed.saliency(source).numpy(), expected)


@pytest.mark.parametrize("reduce", ["mean", "absmean", None])
def test_cells_put_together_elsewhere_have_the_same_bits(reduce, small_resnet18):
    net, image = small_resnet18.float(), torch.randn(3, 97, 130)
    work = SaliencyPass(trace(net), plan(trace(net), (97, 130), tile=32), reduce=reduce)
    expected = {}
    work.run(image, lambda cell, values: expected.update({cell: values}))
    pieces = {t.index: work.pieces(image, t, work.upstream())[1] for t in reversed(work.plan.tiles)}
    for index, tiles in work.plan.routes.items():
        got = work.cell(index, [pieces[tile][index] for tile in tiles])
        np.testing.assert_array_equal(got, expected.pop(work.plan.tiles[index].cell), strict=True)
    assert not expected


def test_batches_go_image_by_image(small_resnet18):
    net, images = small_resnet18, torch.randn(3, 3, 65, 70, dtype=torch.float64)
    torch.testing.assert_close(stream(net, tile=32)(images), net(images).detach(), rtol=0, atol=1e-12)


def test_new_weights_are_seen(small_resnet18):
    net, image = small_resnet18, torch.randn(3, 65, 70, dtype=torch.float64)
    streamed = stream(net, tile=32)
    before = streamed(image)
    with torch.no_grad():
        net.conv1.weight.mul_(2)
    assert not torch.equal(streamed(image), before)
    torch.testing.assert_close(streamed(image), net(image[None]).detach(), rtol=0, atol=1e-12)
    for _ in range(20):  # old storage is free for new weights to take its address
        for _ in range(3):
            net.fc.weight.data = net.fc.weight.data * 0.9
        torch.testing.assert_close(streamed(image), net(image[None]).detach(), rtol=0, atol=1e-12)
    net.train()
    with pytest.raises(ValueError, match="train mode"):
        streamed(image)
