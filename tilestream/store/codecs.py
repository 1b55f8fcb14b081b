"""How chunks are compressed: every codec says when a byte of it is wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
CodecName = Literal["zstd", "lz4", "jpegxl"]


@dataclass(frozen=True)
class Codec:
    """`encode` a contiguous chunk (c, y, x) uint8; `metadata` tells readers of Zarr how to undo it."""

    name: str
    metadata: tuple[dict[str, Any], ...]
    encode: Callable[[Pixels], bytes]


def codec(name: str) -> Codec:
    """The codec of this name. Raises ValueError for an unknown one, or where its extra is not installed."""
    if name == "zstd":
        from numcodecs import Zstd

        zstd = Zstd(level=3, checksum=True)  # without the checksum flipped bits pass unseen
        metadata = {"name": "zstd", "configuration": {"level": 3, "checksum": True}}
        return Codec(name, ({"name": "bytes"}, metadata), zstd.encode)
    if name == "lz4":
        from numcodecs import Blosc

        blosc = Blosc(cname="lz4", clevel=5, shuffle=Blosc.NOSHUFFLE)
        how = {"typesize": 1, "cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "blocksize": 0}
        steps = ({"name": "bytes"}, {"name": "blosc", "configuration": how}, {"name": "crc32c"})
        return Codec(name, steps, lambda chunk: checked(blosc.encode(chunk)))
    if name == "jpegxl":
        from tilestream.store.jpegxl import encode

        return Codec(name, ({"name": "tilestream.jpegxl"}, {"name": "crc32c"}), lambda chunk: checked(encode(chunk)))
    raise ValueError(f"codec={name!r} is not known; use zstd, lz4 or jpegxl")


def checked(data: bytes) -> bytes:
    """`data` with its CRC-32C behind it, as Zarr's codec crc32c has it."""
    data = bytes(data)
    return data + struct.pack("<I", google_crc32c.value(data))
