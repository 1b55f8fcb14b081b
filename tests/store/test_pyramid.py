import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pyvips
import zarr

from tilestream.store.files import Folder
from tilestream.store.pyramid import Attempt, Format, Square, halved, level_shapes, shard_shape, write_attempt


def write(folder: Path, pixels: np.ndarray, format: Format = Format(), **masks: np.ndarray) -> Attempt:  # noqa: B008
    pictures = {name: pyvips.Image.new_from_array(mask) for name, mask in masks.items()}
    image = pyvips.Image.new_from_array(pixels)
    return write_attempt(Folder(folder.parent), folder.name, image, "a", format, pictures)


def squash(pixels: np.ndarray) -> np.ndarray:
    """The square of an 8-bit picture that comes in strips of 37 rows."""
    square = Square(*pixels.shape[:2])
    for y in range(0, len(pixels), 37):
        square.add(pixels[y : y + 37])
    return square.finish()


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
        ((2848, 4288), (3072, 4608)),
        ((1, 1), (512, 512)),
        ((8192, 8192), (8192, 8192)),
        ((8192, 8193), (8192, 8192)),
        ((2000, 60000), (2048, 8192)),
        ((1000, 20000), (1024, 20480)),
    ],
)
def test_shard_shape(size: tuple[int, int], shard: tuple[int, int]) -> None:
    assert shard_shape(*size) == shard


def test_attempt(tmp_path: Path, noise: Callable[..., np.ndarray]) -> None:
    pixels = noise(1301, 1100)
    pixels[:600, :600] = 0
    assert write(tmp_path / "attempt", pixels).levels == [(1301, 1100), (651, 550)]
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
    write(tmp_path / "black", np.zeros((600, 600, 3), dtype=np.uint8))
    assert (tmp_path / "black" / "s0" / "image" / "c" / "0" / "0" / "0").stat().st_size > 4 * 16  # more than an index


def test_ome_metadata(tmp_path: Path, noise: Callable[..., np.ndarray]) -> None:
    write(tmp_path / "attempt", noise(1200, 1100))
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
        step = 250 / size[axis]
        ramp = np.indices(size, dtype=np.float32)[axis] * step
        square = squash(np.rint(np.stack([ramp] * 3, axis=-1)).astype(np.uint8))
        assert square.shape == (1024, 1024, 3)
        want = ((np.arange(1024) + 0.5) * size[axis] / 1024 - 0.5) * step
        got = (square[..., 0].mean(axis=0) if axis else square[..., 0].mean(axis=1))[8:-8]
        assert np.abs(got - want[8:-8]).max() <= 1.1
        assert abs((got - want[8:-8]).mean()) < (0.15 if max(size) < 1024 else 0.03)  # half a pixel would be more


def test_squash_is_the_mean_of_areas(noise: Callable[..., np.ndarray]) -> None:
    pixels = noise(1501, 2048)
    rows = np.zeros((1024, 1501))
    for i in range(1024):
        for y in range(1501):
            rows[i, y] = max(0, min((i + 1) * 1501 / 1024, y + 1) - max(i * 1501 / 1024, y)) * 1024 / 1501
    halves = pixels.reshape(1501, 1024, 2, 3).mean(axis=2)
    want = np.einsum("iy,yxc->ixc", rows, halves)
    assert np.abs(squash(pixels) - want).max() <= 1.01


def test_levels_are_those_of_libvips(tmp_path: Path, noise: Callable[..., np.ndarray]) -> None:
    """Band by band the halves are those of the whole picture."""
    pixels = noise(2333, 1601)
    write(tmp_path / "attempt", pixels)
    for level in (1, 2):
        pixels = halved(pixels)
        stored = zarr.open_array(tmp_path / "attempt" / f"s{level}" / "image", mode="r")[...]
        np.testing.assert_array_equal(stored.transpose(1, 2, 0), pixels)


@pytest.mark.parametrize("name", ["zstd", "lz4", "jpegxl"])
def test_codecs_and_shards_read_back_by_zarr(tmp_path: Path, noise: Callable[..., np.ndarray], name: str) -> None:
    pixels = noise(700, 1000)
    made = write(tmp_path / "attempt", pixels, Format(chunk_px=128, shard_px=256, codec=name))
    array = zarr.open_array(tmp_path / "attempt" / "s0" / "image", mode="r")
    assert (array.shards, array.chunks) == ((3, 256, 256), (3, 128, 128))
    np.testing.assert_array_equal(array[...], pixels.transpose(2, 0, 1))
    assert len([name for name in made.files if name.startswith("s0/image/c/")]) == 3 * 4
    assert {path.relative_to(tmp_path / "attempt").as_posix() for path in tmp_path.rglob("*") if path.is_file()} == set(
        made.files
    )
    shard = tmp_path / "attempt" / "s0" / "image" / "c" / "0" / "1" / "1"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Exception, match=r".+"):  # codecs raise errors of many kinds
        array[...]


def test_masks_are_label_images(tmp_path: Path, noise: Callable[..., np.ndarray]) -> None:
    mask = np.zeros((1301, 1100), np.uint8)
    mask[1300, 1099] = mask[7, 8] = 255
    made = write(tmp_path / "attempt", noise(1301, 1100), MA=mask)
    for level, want in ((0, mask > 0), (1, None)):
        got = zarr.open_array(tmp_path / "attempt" / "labels" / "MA" / f"s{level}" / "image", mode="r")[0]
        if want is not None:
            np.testing.assert_array_equal(got, want)
        assert [(y << level, x << level) for y, x in np.argwhere(got)] in (
            [(7, 8), (1300, 1099)],
            [(6, 8), (1300, 1098)],
        )
    assert made.files["labels/zarr.json"]
    assert dict(zarr.open_group(tmp_path / "attempt" / "labels", mode="r").attrs)["ome"]["labels"] == ["MA"]


@pytest.mark.parametrize(("chunk", "shard"), [(63, 8192), (32, 64), (512, 700), (512, 256)])
def test_formats_that_are_none(chunk: int, shard: int) -> None:
    with pytest.raises(ValueError, match=r"(chunks|shards)=\d+ px must be"):
        Format(chunk, shard)


def test_squash_keeps_the_mean(noise: Callable[..., np.ndarray]) -> None:
    pixels = noise(1500, 2300)
    pixels[:750] //= 2
    square = squash(pixels).astype(float)
    assert abs(square[:512].mean() - pixels[:750].mean()) < 0.1
    assert abs(square[512:].mean() - pixels[750:].mean()) < 0.1
    assert square.std() < 0.75 * pixels.std()  # noise is averaged away, not sampled
