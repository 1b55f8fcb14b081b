"""An attempt: one photograph as an OME-Zarr 0.5 multiscale image in Zarr v3, and its training square."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyvips
import zarr
from zarr.codecs import ZstdCodec

Pixels = npt.NDArray[np.uint8]

CHUNK_PX = 512
SHARD_PX = 8192  # a shard holds at most 64 megapixels
TOP_PX = 1024  # the long side at which the pyramid ends
SQUARE_PX = 1024


def level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of every level: halved, rounded up, until the long side is at most 1024 px."""
    shapes = [(height, width)]
    while max(shapes[-1]) > TOP_PX:
        shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
    return shapes


def shard_shape(height: int, width: int) -> tuple[int, int, int]:
    """The shard of a (3, height, width) level: all of it up to 64 megapixels, else 8192 x 8192 px; whole chunks."""
    rounded = [-(-size // CHUNK_PX) * CHUNK_PX for size in (height, width)]
    if height * width > SHARD_PX**2:
        rounded = [min(size, SHARD_PX) for size in rounded]
    return 3, rounded[0], rounded[1]


def write_attempt(folder: Path, pixels: Pixels, name: str) -> list[tuple[int, int]]:
    """Write (height, width, 3) uint8 `pixels` as an attempt in the new `folder`; the levels' (height, width).

    Arrays are (c, y, x): s0/image is the photograph itself, each further level the 2 x 2 means of the one before;
    train1024/image is the whole frame squashed to 1024 x 1024.
    """
    folder.mkdir(parents=True)
    shapes = level_shapes(*pixels.shape[:2])
    image = pyvips.Image.new_from_array(pixels)
    _write_group(folder, {"ome": _multiscale(name, len(shapes))})
    _write_array(folder / "train1024", squash(pixels))
    _write_array(folder / "s0", pixels)
    for level in range(1, len(shapes)):
        pixels = image.shrink(2, 2, ceil=True).numpy()
        image = pyvips.Image.new_from_array(pixels)
        _write_array(folder / f"s{level}", pixels)
    return shapes


def squash(pixels: Pixels) -> Pixels:
    """The whole frame (height, width, 3) squashed to (1024, 1024, 3): means over each pixel's area; linear where the
    frame is the smaller one.

    Position i of the square lies at (i + 1/2) H / 1024 - 1/2 of a frame of height H; likewise along x.
    """
    # OpenCV, for libvips shifts by half a pixel when it enlarges; in two steps, for OpenCV takes means only to shrink
    height, width = (min(size, SQUARE_PX) for size in pixels.shape[:2])
    shrunk = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    square: Pixels = cv2.resize(shrunk, (SQUARE_PX, SQUARE_PX), interpolation=cv2.INTER_LINEAR)
    return square


def _write_array(group: Path, pixels: Pixels) -> None:
    group.mkdir()
    array = zarr.create_array(
        group / "image",
        shape=(3, *pixels.shape[:2]),
        dtype="uint8",
        chunks=(3, CHUNK_PX, CHUNK_PX),
        shards=shard_shape(*pixels.shape[:2]),
        compressors=[ZstdCodec(level=3, checksum=True)],  # without the checksum flipped bits pass unseen
        fill_value=0,
        dimension_names=["c", "y", "x"],
        config={"write_empty_chunks": True},  # a missing chunk is damage, never black
    )
    array[...] = pixels.transpose(2, 0, 1)
    # xarray warns of a group without consolidated metadata
    metadata = {"image": json.loads((group / "image" / "zarr.json").read_text())}
    _write_group(group, {}, consolidated_metadata={"kind": "inline", "must_understand": False, "metadata": metadata})


def _write_group(folder: Path, attributes: dict[str, Any], **more: Any) -> None:
    # by hand: zarr-python would read the store first to see what is there
    text = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes, **more}, indent=1)
    (folder / "zarr.json").write_text(text)


def _multiscale(name: str, levels: int) -> dict[str, Any]:
    """OME-Zarr 0.5 metadata; a level's pixel (i) lies at 2^level i + (2^level - 1) / 2 of the photograph."""
    datasets = []
    for level in range(levels):
        scale, shift = float(2**level), (2**level - 1) / 2
        transforms = [
            {"type": "scale", "scale": [1.0, scale, scale]},
            {"type": "translation", "translation": [0.0, shift, shift]},
        ]
        datasets.append({"path": f"s{level}/image", "coordinateTransformations": transforms})
    axes = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    return {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": datasets, "type": "mean"}]}
