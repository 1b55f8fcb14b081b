"""Codecs beside the JPEG files: bytes, write and read speed; and what a random crop costs.

    python benchmarks/storage.py PHOTOGRAPHS --count 8

A crop of 512 x 512 px is read from the store, decompressed in C from its chunks (which lie in memory), and cut from the
JPEG file by libvips. One core; medians of `--crops` places a photograph.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

CODECS, CROP_PX = ("zstd", "lz4", "jpegxl"), 512


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs all codecs, prints the table; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with JPEG photographs")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--crops", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    paths = sorted(path for path in options.folder.iterdir() if path.is_file())[: options.count]
    rows = [measure(codec, paths, options.crops) for codec in CODECS]
    from engine import report  # its neighbour, which imports torch

    report(rows, options.out)
    return rows


def measure(codec: str, paths: list[Path], crops: int) -> dict[str, Any]:
    """One codec: bytes of the full resolution and of all that is stored, MB/s of pixels, seconds of a crop."""
    import numpy as np
    import pyvips
    import zarr

    from tilestream.store import Format, Settings, Source, Store, create_store, ingest_photograph

    pyvips.concurrency_set(1)
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
    with tempfile.TemporaryDirectory() as folder:
        store = create_store(Path(folder) / "store.zarr")
        settings = Settings(Format(codec=codec))
        ingest_photograph(store, Source("first", str(paths[0])), settings)
        started = time.perf_counter()
        for path in paths:
            result = ingest_photograph(store, Source(path.name, str(path)), settings)
            if result["status"] != "committed":
                raise RuntimeError(f"{path.name}: {result['reason']}")
        wrote = time.perf_counter() - started
        opened = Store(store)
        arrays = [opened.image(path.name) for path in paths]
        pixels = sum(int(np.prod(array.shape)) for array in arrays)
        read = sum(_timed(partial(np.asarray, array)) for array in arrays)
        plain = pyvips.Image.new_from_file(str(paths[0])).numpy()
        if (np.asarray(arrays[0]).transpose(1, 2, 0) != plain).any():
            raise RuntimeError(f"{paths[0].name} does not read back as it was")
        stored = sum(int(array.nbytes_stored()) for array in arrays)
        total = sum(int(opened.commit(path.name)["bytes"]) for path in paths)
        jpeg = sum(path.stat().st_size for path in paths)
        chance = np.random.default_rng(0)
        times: dict[str, list[float]] = {"crop_s": [], "chunks_s": [], "jpeg_s": []}
        for path, array in zip(paths, arrays, strict=True):
            for _ in range(crops):
                y, x = (int(chance.integers(0, n - CROP_PX)) for n in array.shape[1:])
                times["crop_s"].append(_timed(partial(_read, array, y, x)))
                times["chunks_s"].append(_timed(_decoders(codec, array, y, x)))
                times["jpeg_s"].append(_timed(partial(_cut, str(path), y, x)))
    found = {name: statistics.median(values) for name, values in times.items()}
    return {
        "codec": codec,
        "of_jpeg": stored / jpeg,
        "mb_each": stored / len(paths) / 1e6,
        "mb_each_with_pyramid": total / len(paths) / 1e6,
        "write_mb_s": pixels / wrote / 1e6,
        "read_mb_s": pixels / read / 1e6,
        **found,
        "crop_of_chunks": found["crop_s"] / found["chunks_s"],
        "jpeg_of_crop": found["jpeg_s"] / found["crop_s"],
    }


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _decoders(codec: str, array: Any, y: int, x: int) -> Callable[[], None]:
    """Decompression alone of the chunks that a crop touches."""
    import numpy as np
    from numcodecs import Blosc, Zstd

    from tilestream.store import codecs, jpegxl

    encode, size, chunks = codecs.codec(codec).encode, array.chunks[1], []
    for top in range(y // size * size, y + CROP_PX, size):
        for left in range(x // size * size, x + CROP_PX, size):
            part = np.asarray(array[:, top : top + size, left : left + size])
            pad = [(0, 0), (0, size - part.shape[1]), (0, size - part.shape[2])]
            chunks.append(encode(np.pad(part, pad)))
    shape = array.chunks
    decode = {
        "zstd": Zstd().decode,
        "lz4": lambda data: Blosc().decode(data[:-4]),
        "jpegxl": lambda data: jpegxl.decode(data[:-4], shape),
    }[codec]

    def run() -> None:
        for chunk in chunks:
            decode(chunk)

    return run


def _read(array: Any, y: int, x: int) -> Any:
    return array[:, y : y + CROP_PX, x : x + CROP_PX]


def _cut(path: str, y: int, x: int) -> Any:
    import pyvips

    return pyvips.Image.new_from_file(path, access="sequential").crop(x, y, CROP_PX, CROP_PX).numpy()


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    main()
