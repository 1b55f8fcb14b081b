import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from tilestream.store.pyramid import level_shapes, shard_shape, squash, write_attempt


@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        ((2848, 4288), [(2848, 4288), (1424, 2144), (712, 1072), (356, 536)]),
        ((1024, 1024), [(1024, 1024)]),
        ((1025, 3), [(1025, 3), (513, 2)]),
        ((1, 1), [(1, 1)]),
    ],
)
def test_level_shapes(size: tuple[int, int], shapes: list[tuple[int, int]]) -> None:
    assert level_shapes(*size) == shapes


@pytest.mark.parametrize(
    ("size", "shard"),
    [
        ((2848, 4288), (3, 3072, 4608)),
        ((1, 1), (3, 512, 512)),
        ((8192, 8192), (3, 8192, 8192)),
        ((8192, 8193), (3, 8192, 8192)),
        ((2000, 60000), (3, 2048, 8192)),
        ((1000, 20000), (3, 1024, 20480)),
    ],
)
def test_shard_shape(size: tuple[int, int], shard: tuple[int, int, int]) -> None:
    assert shard_shape(*size) == shard


def test_attempt(tmp_path: Path, noise: Callable[..., np.ndarray]) -> None:
    pixels = noise(1301, 1100)
    pixels[:600, :600] = 0
    assert write_attempt(tmp_path / "attempt", pixels, "a") == [(1301, 1100), (651, 550)]
    array = zarr.open_array(tmp_path / "attempt" / "s0" / "image", mode="r")
    np.testing.assert_array_equal(array[...], pixels.transpose(2, 0, 1))
    metadata = json.loads((tmp_path / "attempt" / "s0" / "image" / "zarr.json").read_text())
    assert metadata["dimension_names"] == ["c", "y", "x"]
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [3, 1536, 1536]
    sharding = metadata["codecs"][0]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["chunk_shape"] == [3, 512, 512]
    zstd = {"name": "zstd", "configuration": {"level": 3, "checksum": True}}
    assert sharding["configuration"]["codecs"] == [{"name": "bytes"}, zstd]
    means = pixels[:1300].reshape(650, 2, 550, 2, 3).astype(float).mean(axis=(1, 3))
    level = zarr.open_array(tmp_path / "attempt" / "s1" / "image", mode="r")[...].transpose(1, 2, 0)
    assert np.abs(level[:650] - means).max() <= 1
    last = pixels[1300].reshape(550, 2, 3).astype(float).mean(axis=1)  # the odd row is doubled
    assert np.abs(level[650] - last).max() <= 1


def test_chunks_of_nothing_are_written(tmp_path: Path) -> None:
    write_attempt(tmp_path / "black", np.zeros((600, 600, 3), dtype=np.uint8), "black")
    assert (tmp_path / "black" / "s0" / "image" / "c" / "0" / "0" / "0").stat().st_size > 4 * 16  # more than an index


def test_ome_metadata(tmp_path: Path, noise: Callable[..., np.ndarray]) -> None:
    write_attempt(tmp_path / "attempt", noise(1200, 1100), "a")
    ome = dict(zarr.open_group(tmp_path / "attempt", mode="r").attrs)["ome"]
    assert ome["version"] == "0.5"
    multiscale = ome["multiscales"][0]
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
    assert [dataset["path"] for dataset in multiscale["datasets"]] == ["s0/image", "s1/image"]
    scale, shift = multiscale["datasets"][1]["coordinateTransformations"]
    assert (scale["scale"], shift["translation"]) == ([1, 2, 2], [0, 0.5, 0.5])


@pytest.mark.parametrize("size", [(2848, 4288), (400, 300), (1100, 900), (1025, 1023)])
def test_squash_maps_centres_to_centres(size: tuple[int, int]) -> None:
    """On a ramp a mean is the value at the centre, so that the position that each pixel stands for can be read."""
    for axis in (0, 1):
        square = squash(np.stack([np.indices(size, dtype=np.float32)[axis]] * 3, axis=-1))
        assert square.shape == (1024, 1024, 3)
        want = (np.arange(1024) + 0.5) * size[axis] / 1024 - 0.5
        got = square[512, :, 0] if axis else square[:, 512, 0]
        np.testing.assert_allclose(got[8:-8], want[8:-8], rtol=0, atol=0.13)


def test_squash_keeps_the_mean(noise: Callable[..., np.ndarray]) -> None:
    pixels = noise(1500, 2300)
    pixels[:750] //= 2
    square = squash(pixels).astype(float)
    assert abs(square[:512].mean() - pixels[:750].mean()) < 0.1
    assert abs(square[512:].mean() - pixels[750:].mean()) < 0.1
    assert square.std() < 0.75 * pixels.std()  # noise is averaged away, not sampled
