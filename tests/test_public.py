"""The public face as a reader of the README uses it, under exactly these names."""

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from PIL import Image

import tilestream as ts
from tilestream.store import create_store, find_photographs, ingest_photograph


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    return ts.nets.ResidualNet(num_classes=2, widths=(4, 4, 6, 8, 8)).eval().double()


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).random((3, 301, 397))


@pytest.mark.parametrize("how", [{"memory": "2 GiB"}, {"tile": 128}])
def test_the_snippet(net, image, how, tmp_path):
    streamed = ts.stream(net, **how)
    assert isinstance(streamed, ts.Streamed)

    text = str(streamed.plan(image.shape))
    for word in ("301 x 397 px", "tiles", "halo", "peak", "FLOP"):
        assert word in text

    whole = torch.from_numpy(image)[None].requires_grad_()
    expected = net(whole)
    logits = streamed(image)
    assert logits.shape == (1, 2)
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-12, atol=1e-12)

    result = streamed.saliency(image, target=1, method="gradient")
    assert isinstance(result, ts.Saliency)
    (gradient,) = torch.autograd.grad(expected[0, 1], whole)
    saliency = gradient[0].mean(dim=0).numpy()
    assert np.abs(result.numpy() - saliency).max() <= 1e-12 * np.abs(saliency).max()
    torch.testing.assert_close(result.logits, expected.detach(), rtol=1e-12, atol=1e-12)

    y_px, x_px, value = result.argmax(border=0.1)
    inside = np.full_like(saliency, -np.inf)
    inside[31:271, 40:358] = saliency[31:271, 40:358]  # 30.1 < y < 270.9, 39.7 < x < 357.3
    assert (y_px, x_px) == np.unravel_index(np.argmax(inside), inside.shape)
    assert value == result.numpy()[y_px, x_px]

    array = zarr.create_array(tmp_path / "map.zarr", shape=(301, 397), chunks=(64, 100), dtype="f8")
    result.write(array)
    np.testing.assert_array_equal(array[:], result.numpy())


def test_channels_are_kept_on_request(net, image):
    kept = ts.stream(net, tile=192).saliency(image, reduce=None)
    assert kept.numpy().shape == (3, 301, 397)
    mean = ts.stream(net, tile=192).saliency(image)
    scale = np.abs(mean.numpy()).max()
    assert np.abs(kept.numpy().mean(axis=0) - mean.numpy()).max() <= 1e-12 * scale


def test_batches_and_bytes(net, image):
    streamed = ts.stream(net, tile=192)
    pixels = (image * 255).astype(np.uint8)
    batch = np.stack([pixels, pixels[:, ::-1]])
    with torch.no_grad():
        expected = net(torch.from_numpy(batch).double())  # cast, not scaled
    torch.testing.assert_close(streamed(batch), expected, rtol=1e-11, atol=1e-11)


def test_any_module_of_known_operations_streams_and_others_are_named(image):
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, 2),
    ).eval()  # fmt: skip
    values = image.astype(np.float32)
    with torch.no_grad():
        expected = plain(torch.from_numpy(values)[None])
    torch.testing.assert_close(ts.stream(plain, tile=64)(values), expected, rtol=1e-4, atol=1e-5)
    odd = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.PixelShuffle(2), *list(plain)[2:]).eval()
    with pytest.raises(ValueError, match="1"):
        ts.stream(odd)
    with pytest.raises(ValueError, match="eval"):
        ts.stream(plain.train())


@pytest.mark.parametrize("name", ["ResidualNet", "resnet18", "resnet34", "resnet50"])
def test_networks_by_name(name):
    assert getattr(ts.nets, name)(num_classes=2).fc.out_features == 2


def test_open_dataset(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (301, 397, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    store = create_store(tmp_path / "s.zarr")
    for source in find_photographs(tmp_path):
        ingest_photograph(store, source)
    ds = ts.open_dataset(store)
    assert isinstance(ds, xr.Dataset)
    assert list(ds["id"].values) == ["a"]
    np.testing.assert_array_equal(ds.photographs["a"].values, pixels.transpose(2, 0, 1))


def test_the_namespace_is_the_contract():
    contract = {"Saliency", "Streamed", "nets", "open_dataset", "stream"}
    assert set(ts.__all__) == contract | {"CropDecision", "HistogramSVM"}
    assert set(ts.__all__) <= set(dir(ts))
    with pytest.raises(AttributeError, match="strem"):
        _ = ts.strem
