"""A Zarr v3 array of sharded chunks, written chunk by chunk; zarr-python would hold a whole shard in memory.

A shard is the compressed chunks one after the other, then their index: offset and length of each, (rows, columns, 2)
uint64, and its CRC-32C. The format is the codec `sharding_indexed` of the Zarr v3 specification.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from tilestream.store.codecs import Codec, Pixels
from tilestream.store.files import Files, Writer
from tilestream.store.layout import to_json

ABSENT = 2**64 - 1


@dataclass(frozen=True)
class Grid:
    """An array (channels, height, width) in chunks of `chunk_px` square, and shards of whole chunks."""

    channels: int
    height: int
    width: int
    chunk_px: int
    shard_px: tuple[int, int]

    @property
    def chunks(self) -> tuple[int, int]:
        return -(-self.height // self.chunk_px), -(-self.width // self.chunk_px)

    @property
    def per_shard(self) -> tuple[int, int]:
        return self.shard_px[0] // self.chunk_px, self.shard_px[1] // self.chunk_px


def metadata(grid: Grid, codec: Codec) -> dict[str, Any]:
    """The array's zarr.json."""
    inner = {
        "chunk_shape": [grid.channels, grid.chunk_px, grid.chunk_px],
        "codecs": list(codec.metadata),
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [grid.channels, grid.height, grid.width],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [grid.channels, *grid.shard_px]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        "attributes": {},
        "dimension_names": ["c", "y", "x"],
        "storage_transformers": [],
    }


class Shard:
    """One file; it is whole once all its chunks that hold a part of the array were put."""

    def __init__(self, writer: Writer, grid: Grid, left: int) -> None:
        self.writer, self.left = writer, left
        self.index = np.full((*grid.per_shard, 2), ABSENT, np.uint64)

    def put(self, row: int, column: int, data: bytes) -> None:
        self.index[row, column] = self.writer.bytes, len(data)
        self.writer.write(data)
        self.left -= 1
        if not self.left:
            table = self.index.astype("<u8").tobytes()
            self.writer.write(table + struct.pack("<I", google_crc32c.value(table)))
            self.writer.close()


class ArrayWriter:
    """Writes the array `name`; every chunk is put once, black ones too: a missing chunk is damage, never black."""

    def __init__(self, files: Files, name: str, grid: Grid, codec: Codec) -> None:
        self.files, self.name, self.grid, self.codec = files, name, grid, codec
        self.shards: dict[tuple[int, int], Shard] = {}
        self.written: dict[str, Writer] = {}
        self._put("zarr.json", to_json(metadata(grid, codec)))

    def _put(self, name: str, data: bytes) -> None:
        writer = self.written[name] = self.files.writer(f"{self.name}/{name}")
        writer.write(data)
        writer.close()

    def put(self, row: int, column: int, chunk: Pixels) -> None:
        """The chunk at (row, column), whole: (channels, chunk_px, chunk_px), zeros beyond the array's border."""
        per = self.grid.per_shard
        at = row // per[0], column // per[1]
        if at not in self.shards:
            name = f"c/0/{at[0]}/{at[1]}"
            there = [min(n, (i + 1) * p) - i * p for n, i, p in zip(self.grid.chunks, at, per, strict=True)]
            writer = self.written[name] = self.files.writer(f"{self.name}/{name}")
            self.shards[at] = Shard(writer, self.grid, there[0] * there[1])
        shard = self.shards[at]
        shard.put(row % per[0], column % per[1], self.codec.encode(chunk))
        if not shard.left:
            del self.shards[at]
