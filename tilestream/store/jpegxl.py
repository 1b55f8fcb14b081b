"""Lossless JPEG XL as a codec of Zarr v3: a chunk (c, y, x) uint8 is a picture of c channels. An extra."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON

try:
    import imagecodecs
except ImportError:
    raise ValueError("codec jpegxl needs the extra jpegxl; pip install 'tilestream[jpegxl]'") from None


def encode(chunk: npt.NDArray[np.uint8]) -> bytes:
    """(c, y, x) uint8 to a lossless JPEG XL file."""
    picture = np.ascontiguousarray(chunk.transpose(1, 2, 0))
    return bytes(imagecodecs.jpegxl_encode(picture, lossless=True, effort=1, numthreads=1))


def decode(data: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The chunk (c, y, x) that `encode` made the file from."""
    picture = np.asarray(imagecodecs.jpegxl_decode(data, numthreads=1)).reshape(*shape[1:], shape[0])
    return np.ascontiguousarray(picture.transpose(2, 0, 1))


@dataclass(frozen=True)
class JpegXL(ArrayBytesCodec):
    """Registered under the name tilestream.jpegxl by the package's entry point."""

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> JpegXL:
        return cls()

    def to_dict(self) -> dict[str, JSON]:
        return {"name": "tilestream.jpegxl"}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError("the size of a JPEG XL file is known once it is made")

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        data = await asyncio.to_thread(encode, chunk_array.as_numpy_array())
        return chunk_spec.prototype.buffer.from_bytes(data)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        values: Any = await asyncio.to_thread(decode, chunk_bytes.to_bytes(), chunk_spec.shape)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(values)
