"""Maps of whole images that a pass keeps between sweeps: on the device while a budget lasts, in files beyond."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tilestream.geometry import Extent, Region

Array = npt.NDArray[Any]
BAND_BYTES = 2**20
Allocate = Callable[[tuple[int, int, int], np.dtype[Any]], Any]
"""Gives an array (height, width, values) of zeros that takes and gives blocks [y0:y1, x0:x1]."""


class FileArray:
    """(height, width, values) in a file without a name: nothing is left of it, however the process ends.

    Blocks are read and written, not mapped, so that they count as the system's cache and not as the process's memory.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: np.dtype[Any], folder: str | None = None) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the array)
        self._file.truncate(int(np.prod(shape)) * self.dtype.itemsize)

    def __del__(self) -> None:
        self._file.close()

    def _rows(self, index: tuple[slice, slice], block: Array) -> list[tuple[memoryview, int]]:
        """The pieces of a contiguous block that lie together in the file, with their places."""
        (_, width, values), (y, x) = self.shape, index
        pixel = values * self.dtype.itemsize
        if x.start == 0 and x.stop == width:
            whole = np.ascontiguousarray(block)
            return [(memoryview(whole.data).cast("B"), y.start * width * pixel)] if block.size else []
        rows = [(np.ascontiguousarray(row), (y.start + i) * width + x.start) for i, row in enumerate(block)]
        return [(memoryview(row.data).cast("B"), place * pixel) for row, place in rows]

    def __getitem__(self, index: tuple[slice, slice]) -> Array:
        y, x = index
        block = np.empty((y.stop - y.start, x.stop - x.start, self.shape[2]), self.dtype)
        for part, place in self._rows(index, block):
            while len(part):
                done = os.preadv(self._file.fileno(), [part], place)
                if done == 0:
                    raise OSError("a scratch file is shorter than it was made")
                part, place = part[done:], place + done
        return block

    def __setitem__(self, index: tuple[slice, slice], block: Array) -> None:
        block = np.asarray(block, self.dtype)
        for part, place in self._rows(index, block):
            while len(part):
                done = os.pwrite(self._file.fileno(), part, place)
                part, place = part[done:], place + done


def holder(dtype: torch.dtype) -> torch.dtype:
    """A dtype of the same size that numpy has."""
    return torch.int16 if dtype == torch.bfloat16 else dtype


class Scratch:
    """Hands out maps; `memory` bytes of them stay on their device, others are made by `allocate` (files by default)."""

    def __init__(self, memory: int, allocate: Allocate = FileArray) -> None:
        self.left, self.allocate = memory, allocate

    def map(self, channels: int, extent: Extent, dtype: torch.dtype, device: torch.device) -> Stored:
        kind = torch.empty((), dtype=holder(dtype)).numpy().dtype
        shape = (*extent, channels)
        size = int(np.prod(shape)) * kind.itemsize
        if size <= self.left:
            self.left -= size
            held: Any = np.zeros(shape, kind)  # takes memory only where it is written
            if device.type != "cpu":
                held = torch.zeros(shape, dtype=holder(dtype), device=device)
            return Stored(held, dtype, device, lambda: self._give_back(size))
        return Stored(self.allocate(shape, kind), dtype, device, lambda: None)

    def _give_back(self, size: int) -> None:
        self.left += size


class Stored:
    """A map (1, C, H, W) that is read and written by regions."""

    def __init__(self, array: Any, dtype: torch.dtype, device: torch.device, freed: Callable[[], None]) -> None:
        self.array, self.dtype, self.device, self._freed = array, dtype, device, freed

    def free(self) -> None:
        if self.array is not None:
            self.array = None
            self._freed()

    def read(self, region: Region) -> Tensor:
        """(1, C, h, w), channels-last, a copy."""
        block = self.array[region.y0 : region.y1, region.x0 : region.x1]
        if isinstance(block, Tensor):
            return block.clone().view(self.dtype).permute(2, 0, 1)[None]
        block = np.asarray(block)
        block = block if block.flags.owndata else block.copy()
        return torch.from_numpy(block).view(self.dtype).to(self.device).permute(2, 0, 1)[None]

    def write(self, region: Region, values: Tensor) -> None:
        block: Any = values[0].permute(1, 2, 0).view(holder(self.dtype))
        block = block if isinstance(self.array, Tensor) else block.cpu().numpy()
        self.array[region.y0 : region.y1, region.x0 : region.x1] = block

    def add(self, region: Region, values: Tensor) -> None:
        self.write(region, self.read(region) + values)


class Bits:
    """A map of booleans (1, C, H, W), eight to the byte along the channels."""

    def __init__(self, scratch: Scratch, channels: int, extent: Extent, device: torch.device) -> None:
        self.channels = channels
        self.stored = scratch.map(-(-channels // 8), extent, torch.uint8, device)

    def free(self) -> None:
        self.stored.free()

    def write(self, region: Region, values: Tensor) -> None:
        """Where `values` are positive; on a CPU a band of rows at a time, which stays in its cache."""
        block, array = values[0].permute(1, 2, 0), self.stored.array
        if isinstance(array, Tensor):
            array[region.y0 : region.y1, region.x0 : region.x1] = _packed(block > 0)
            return
        as_it_is = block.is_cpu and block.dtype != torch.bfloat16  # which numpy does not have
        held: Array = (block if as_it_is else block > 0).cpu().numpy()
        packed = np.empty((*region.shape, array.shape[2]), np.uint8)
        rows = max(1, BAND_BYTES * region.height // max(1, held.nbytes))
        for y in range(0, region.height, rows):
            packed[y : y + rows] = _packbits(held[y : y + rows] > 0)
        array[region.y0 : region.y1, region.x0 : region.x1] = packed

    def read(self, region: Region) -> Tensor:
        packed = self.stored.array[region.y0 : region.y1, region.x0 : region.x1]
        if isinstance(packed, Tensor):
            bits = (packed[..., None] & _powers(packed)).ne(0).flatten(2)[..., : self.channels]
            return bits.permute(2, 0, 1)[None]
        packed = np.asarray(packed)
        if self.channels % 8:
            unpacked = np.unpackbits(packed, axis=-1, count=self.channels).view(bool)
        else:
            unpacked = np.unpackbits(np.ascontiguousarray(packed)).view(bool).reshape(*packed.shape[:2], -1)
        return torch.from_numpy(unpacked).to(self.stored.device).permute(2, 0, 1)[None]


def _packbits(bits: Array) -> Array:
    """(h, w, C) booleans as (h, w, C / 8 rounded up) bytes."""
    # without an axis the same bits, several times as fast
    return np.packbits(bits, axis=-1) if bits.shape[-1] % 8 else np.packbits(bits).reshape(*bits.shape[:2], -1)


def _packed(block: Tensor) -> Tensor:
    """The same on a device, with its own order of bits."""
    bits = F.pad(block.to(torch.uint8), (0, -block.shape[-1] % 8)).reshape(*block.shape[:2], -1, 8)
    return torch.sum(bits * _powers(bits), -1, dtype=torch.uint8)


def _powers(like: Tensor) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=like.device)
