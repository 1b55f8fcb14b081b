import numpy as np
import pytest
import torch
from torch import nn

from tilestream.engine import Peak, Saliency, highest, highest_of, stream
from tilestream.geometry import Region
from tilestream.nets import resnet18


def of(values: np.ndarray) -> Saliency:
    return Saliency(values, torch.zeros(1, 2))


def test_argmax_obeys_the_border_and_breaks_ties_by_position():
    values = np.zeros((50, 60), np.float32)
    values[0, 0] = 9
    values[5, 30] = 8  # on the line border * h: outside
    values[20, 30] = values[20, 12] = values[31, 7] = 7
    assert of(values).argmax(border=0.1) == Peak(20, 12, 7.0)
    assert of(values).argmax(border=0) == Peak(0, 0, 9.0)
    y_px, x_px, value = of(values).argmax()
    assert (y_px, x_px, value) == (20, 12, 7.0)


def test_parts_find_what_the_whole_finds():
    values = np.random.default_rng(0).integers(0, 4, (40, 50)).astype(np.float32)
    allowed = Region(3, 33, 5, 47)
    cells = [Region(y, y + 8, x, x + 10) for y in range(0, 40, 8) for x in range(0, 50, 10)]
    parts = [highest(values[c.y0 : c.y1, c.x0 : c.x1], c, allowed) for c in cells]
    assert highest_of(parts[::-1]) == highest(values, Region(0, 40, 0, 50), allowed)


def test_nan_is_an_error():
    values = np.zeros((20, 20))
    values[10, 10] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        of(values).argmax()
    net = resnet18().eval()
    image = torch.zeros(3, 64, 64)
    image[0, 40, 40] = float("nan")
    with pytest.raises(ValueError, match=r"layer4.* is NaN in y"):
        stream(net, tile=64).saliency(image)
    with pytest.raises(ValueError, match="NaN"):
        stream(net, tile=64)(image)


def test_write_copies_into_an_array_of_the_same_shape(tmp_path):
    import zarr

    values = np.random.default_rng(0).normal(size=(45, 70)).astype(np.float32)
    target = zarr.create_array(tmp_path / "saliency.zarr", shape=(45, 70), chunks=(16, 32), dtype="f4")
    of(values).write(target)
    np.testing.assert_array_equal(target[:], values)
    with pytest.raises(ValueError, match=r"target.shape=\(3, 3\) must be \(45, 70\)"):
        of(values).write(np.zeros((3, 3)))
    channels = np.random.default_rng(0).normal(size=(3, 45, 70))
    into = np.zeros_like(channels)
    of(channels).write(into)
    np.testing.assert_array_equal(into, channels)
    with pytest.raises(ValueError, match="one channel"):
        of(channels).argmax()


def test_bad_arguments_name_what_would_do():
    streamed, image = stream(resnet18().eval(), tile=32), torch.zeros(3, 32, 32)
    with pytest.raises(ValueError, match=r"target=2 must be in \[0, 2\)"):
        streamed.saliency(image, target=2)
    with pytest.raises(ValueError, match="method='magic' is not known"):
        streamed.saliency(image, method="magic")
    with pytest.raises(ValueError, match="reduce='sum' is not known"):
        streamed.saliency(image, reduce="sum")
    with pytest.raises(ValueError, match=r"image.shape=\(1, 32, 32\) must be \(3, H, W\)"):
        streamed.saliency(image[:1])
    with pytest.raises(ValueError, match="must be"):
        streamed.saliency(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="holds no image"):
        streamed(torch.zeros(0, 3, 32, 32))


def test_progress_counts_every_tile():
    calls = []
    stream(resnet18().eval(), tile=32).saliency(torch.zeros(3, 64, 64), progress=lambda *c: calls.append(c))
    assert calls == [(i + 1, 8) for i in range(8)]  # there and back


def test_integers_are_cast_not_scaled():
    net = nn.Sequential(
        nn.Conv2d(1, 1, 1, bias=False), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(1, 1, bias=False)
    ).eval()
    nn.init.ones_(net[0].weight)
    nn.init.ones_(net[3].weight)
    assert stream(net, tile=4)(np.full((1, 5, 5), 200, np.uint8)).item() == 200
