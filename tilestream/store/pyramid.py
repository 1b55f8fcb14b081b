"""An attempt: one photograph as an OME-Zarr 0.5 multiscale image in Zarr v3, and its training square.

Rows come from the decoder in strips. A level gathers them into bands of one row of chunks; a full band is compressed,
halved, and handed to the next level. So memory grows with the photograph's width, and not with its area.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pyvips

from tilestream.store.codecs import Codec, Pixels, codec
from tilestream.store.files import Files, Writer
from tilestream.store.layout import to_json
from tilestream.store.shards import ArrayWriter, Grid, metadata

TOP_PX = 1024  # the long side at which the pyramid ends
SQUARE_PX = 1024
STRIP_BYTES, BUFFER_BYTES = 2**18, 2**23  # strips that stay in a core's cache are read twice as fast
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1


@dataclass(frozen=True)
class Format:
    """How photographs are stored: chunks and shards in px (a shard holds at most `shard_px` squared), and the codec."""

    chunk_px: int = 512
    shard_px: int = 8192
    codec: str = "zstd"

    def __post_init__(self) -> None:
        if self.chunk_px < 64 or self.chunk_px % 2:
            raise ValueError(f"chunks={self.chunk_px} px must be even, and 64 at least")
        if self.shard_px < self.chunk_px or self.shard_px % self.chunk_px:
            raise ValueError(f"shards={self.shard_px} px must be a multiple of the chunks' {self.chunk_px} px")

    def grid(self, height: int, width: int, channels: int = 3) -> Grid:
        return Grid(channels, height, width, self.chunk_px, shard_shape(height, width, self))


def level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of every level: halved, rounded up, until the long side is at most 1024 px."""
    shapes = [(height, width)]
    while max(shapes[-1]) > TOP_PX:
        shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
    return shapes


def shard_shape(height: int, width: int, format: Format = Format()) -> tuple[int, int]:
    """The shard of a level: all of it up to the area of a shard (64 megapixels), else shards of 8192 x 8192 px."""
    rounded = [-(-size // format.chunk_px) * format.chunk_px for size in (height, width)]
    if height * width > format.shard_px**2:
        rounded = [min(size, format.shard_px) for size in rounded]
    return rounded[0], rounded[1]


@dataclass
class Attempt:
    """What was written: the levels' (height, width), extremes of each channel, the smallest level, all files."""

    levels: list[tuple[int, int]]
    low: list[int]
    high: list[int]
    top: Pixels
    """The smallest level, (height, width, 3)."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file, by its name in the attempt."""
    bytes: int = 0

    def add(self, folder: str, written: dict[str, Writer]) -> None:
        for name, writer in written.items():
            self.files[f"{folder}/{name}" if folder else name] = writer.sha256
            self.bytes += writer.bytes


def write_attempt(
    files: Files, folder: str, image: pyvips.Image, name: str, format: Format, masks: dict[str, pyvips.Image]
) -> Attempt:
    """Write an 8-bit RGB `image`, read once from the top, as an attempt in the new `folder`.

    Arrays are (c, y, x): s0/image is the photograph itself, each further level the 2 x 2 means of the one before;
    train1024/image is the whole frame squashed to 1024 x 1024. `masks` become label images of one channel each.
    """
    shapes, way = level_shapes(image.height, image.width), codec(format.codec)
    writers = [ArrayWriter(files, f"{folder}/s{i}/image", format.grid(*s), way) for i, s in enumerate(shapes)]
    levels = [Level(writer) for writer in writers]
    for level, below in pairwise(levels):
        level.below = below
    square = Square(image.height, image.width)
    _keep_freed_memory(not isinstance(levels[0].band, np.memmap))
    for strip in strips(image):
        square.add(strip)
        levels[0].add(strip)
    low, high = levels[0].low.tolist(), levels[0].high.tolist()
    made = Attempt(shapes, low, high, np.concatenate(levels[-1].kept))
    last = ArrayWriter(files, f"{folder}/train1024/image", format.grid(SQUARE_PX, SQUARE_PX), way)
    Level(last).add(square.finish())
    for group, writer in [*((f"s{i}", w) for i, w in enumerate(writers)), ("train1024", last)]:
        made.add(f"{group}/image", writer.written)
        made.add(group, _write_array_group(files, f"{folder}/{group}", writer.grid, way))
    made.add("", _write_group(files, folder, {"ome": _multiscale(name, len(shapes))}))
    if masks:
        _write_masks(files, folder, made, masks, format, way)
    return made


def strips(image: pyvips.Image) -> Iterator[Pixels]:
    """The rows of an 8-bit image from the top, (rows, width, bands), 16 or more at a time."""
    region = pyvips.Region.new(image)
    rows = max(16, STRIP_BYTES // (image.width * image.bands) // 16 * 16)
    for y in range(0, image.height, rows):
        count = min(rows, image.height - y)
        data = region.fetch(0, y, image.width, count)
        yield np.frombuffer(data, np.uint8).reshape(count, image.width, image.bands)


class Level:
    """One level of the pyramid: rows in, chunks out, halves to the level below it."""

    def __init__(self, writer: ArrayWriter, maximum: bool = False) -> None:
        self.writer, self.grid, self.maximum = writer, writer.grid, maximum
        self.below: Level | None = None
        self.kept: list[Pixels] = []
        """All rows, where no level is below."""
        grid = self.grid
        self.band = _buffer((min(grid.height, grid.chunk_px), grid.width, grid.channels))
        self.chunk = np.zeros((grid.channels, grid.chunk_px, grid.chunk_px), np.uint8)
        self.low, self.high = np.full(grid.channels, 255), np.zeros(grid.channels, int)
        self.done = self.rows = 0

    def add(self, rows: Pixels) -> None:
        """The next rows, (n, width, channels)."""
        while len(rows):
            part, rows = np.split(rows, [len(self.band) - self.rows])
            self.band[self.rows : self.rows + len(part)] = part
            self.rows += len(part)
            _release(self.band)
            if self.rows == len(self.band) or self.done + self.rows == self.grid.height:
                self._flush()

    def _flush(self) -> None:
        band, size = self.band[: self.rows], self.grid.chunk_px
        for column in range(self.grid.chunks[1]):
            if column % 4 == 0:
                _release(self.band)
            part = band[:, column * size : (column + 1) * size]
            height, width = part.shape[:2]
            if (height, width) != (size, size):
                self.chunk[:] = 0
            planes = cv2.split(np.ascontiguousarray(part))
            for channel, plane in enumerate(planes):
                self.chunk[channel, :height, :width] = plane
                low, high, _, _ = cv2.minMaxLoc(plane)
                self.low[channel] = min(self.low[channel], low)
                self.high[channel] = max(self.high[channel], high)
            self.writer.put(self.done // size, column, self.chunk)
        self.done, self.rows = self.done + self.rows, 0
        if self.below is None:
            self.kept.append(band.copy())
            return
        halve = halved_maximum if self.maximum else halved
        rows = 16 if isinstance(self.band, np.memmap) else len(band)
        for y in range(0, len(band), rows):
            self.below.add(halve(band[y : y + rows]))
            _release(self.band)


def _buffer(shape: tuple[int, ...]) -> Pixels:
    """Memory for a band; that of a wide photograph lies in a file without a name, so that memory does not grow."""
    if np.prod(shape) <= BUFFER_BYTES:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _keep_freed_memory(keep: bool) -> None:
    """Whether glibc keeps freed buffers, which is a third faster, or gives them back, so that memory does not grow."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(threshold, 2**25 if keep else 2**17)


def _release(buffer: Pixels) -> None:
    """Leaves a buffer's pages to the system's cache; what they hold stays."""
    if isinstance(buffer, np.memmap):
        buffer._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def halved(band: Pixels) -> Pixels:
    """Means of 2 x 2, an odd last row or column doubled: libvips' shrink."""
    result: Pixels = pyvips.Image.new_from_array(band).shrink(2, 2, ceil=True).numpy()
    return result


def halved_maximum(band: Pixels) -> Pixels:
    """Maxima of 2 x 2, for masks: a lesion of one pixel stays."""
    odd = [(0, n % 2) for n in band.shape[:2]]
    padded = np.pad(band, [*odd, (0, 0)])
    blocks = padded.reshape(len(padded) // 2, 2, padded.shape[1] // 2, 2, band.shape[2])
    result: Pixels = blocks.max(axis=(1, 3))
    return result


class Square:
    """The whole frame squashed to (1024, 1024, 3): means over each pixel's area; linear where the frame is smaller.

    Position i of the square lies at (i + 1/2) H / 1024 - 1/2 of a frame of height H; likewise along x.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.done = height, 0
        self.rows, self.columns = min(height, SQUARE_PX), min(width, SQUARE_PX)
        self.sums = np.zeros((self.rows, self.columns * 3), np.float32)

    def add(self, strip: Pixels) -> None:
        """The next rows, (n, width, 3)."""
        narrow = cv2.resize(strip, (self.columns, len(strip)), interpolation=cv2.INTER_AREA)
        scale = self.height / self.rows
        for start in range(0, len(strip), 32):  # few rows at a time, of which a row of the square takes many
            rows = narrow[start : start + 32].reshape(-1, self.columns * 3).astype(np.float32)
            last = self.done + len(rows)
            targets = np.arange(int(self.done / scale), min(self.rows, int(np.ceil(last / scale))))
            edges, at = targets[:, None] * scale, np.arange(self.done, last)
            shares = np.minimum(edges + scale, at + 1) - np.maximum(edges, at)
            self.sums[targets[0] : targets[-1] + 1] += (shares.clip(0) / scale).astype(np.float32) @ rows
            self.done = last

    def finish(self) -> Pixels:
        shrunk = np.rint(self.sums).astype(np.uint8).reshape(self.rows, self.columns, 3)
        square: Pixels = cv2.resize(shrunk, (SQUARE_PX, SQUARE_PX), interpolation=cv2.INTER_LINEAR)
        return square


def _write_masks(
    files: Files, folder: str, made: Attempt, masks: dict[str, pyvips.Image], format: Format, way: Codec
) -> None:
    """Label images labels/<name>, 1 where the mask is not 0, on all levels of the photograph."""
    for name, mask in masks.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"mask={name!r} must be letters, digits, - and _")
        place = f"labels/{name}"
        writers = [
            ArrayWriter(files, f"{folder}/{place}/s{i}/image", format.grid(*shape, 1), way)
            for i, shape in enumerate(made.levels)
        ]
        levels = [Level(writer, maximum=True) for writer in writers]
        for level, below in pairwise(levels):
            level.below = below
        for strip in strips(mask):
            levels[0].add((strip[..., :1] > 0).astype(np.uint8))
        for i, writer in enumerate(writers):
            made.add(f"{place}/s{i}/image", writer.written)
            made.add(f"{place}/s{i}", _write_array_group(files, f"{folder}/{place}/s{i}", writer.grid, way))
        label = {"version": "0.5", "colors": [{"label-value": 1, "rgba": [255, 255, 0, 128]}]}
        ome = {**_multiscale(name, len(made.levels), "maximum"), "image-label": label}
        made.add(place, _write_group(files, f"{folder}/{place}", {"ome": ome}))
    ome = {"version": "0.5", "labels": sorted(masks)}
    made.add("labels", _write_group(files, f"{folder}/labels", {"ome": ome}))


def _write_group(files: Files, folder: str, attributes: dict[str, Any], **more: Any) -> dict[str, Writer]:
    # by hand: zarr-python would read the store first to see what is there
    writer = files.writer(f"{folder}/zarr.json")
    writer.write(to_json({"zarr_format": 3, "node_type": "group", "attributes": attributes, **more}))
    writer.close()
    return {"zarr.json": writer}


def _write_array_group(files: Files, folder: str, grid: Grid, way: Codec) -> dict[str, Writer]:
    # xarray warns of a group without consolidated metadata
    inline = {"kind": "inline", "must_understand": False, "metadata": {"image": metadata(grid, way)}}
    return _write_group(files, folder, {}, consolidated_metadata=json.loads(json.dumps(inline)))


def _multiscale(name: str, levels: int, kind: str = "mean") -> dict[str, Any]:
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
    return {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": datasets, "type": kind}]}
