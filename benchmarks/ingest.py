"""Ingest beside its floor, a plain loop, and a peer; and a worker's memory, from 12 megapixels to 2 gigapixels.

    python benchmarks/ingest.py PHOTOGRAPHS --count 200 --workers 2 [--ngff-zarr python-of-its-environment]
    python benchmarks/ingest.py --memory

Floor: the same photographs decoded by libvips, halved by libvips, and the same chunks compressed by zstd, nothing
written, in as many processes. Loop: Pillow, NumPy and zarr-python on one core, as one writes it in a quarter of an
hour: chunks and pyramid, no square, no hashes, no fsync. Every variant is timed without its start, after one photograph
that is not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK_PX, TOP_PX = 512, 1024


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs all variants, prints the table; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="folder with photographs")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ngff-zarr", metavar="PYTHON", help="interpreter of an environment with ngff-zarr[cli]")
    parser.add_argument("--memory", action="store_true", help="a worker's memory instead")
    parser.add_argument("--megapixels", default="12,100,500,2000", help="of the photographs of --memory")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.memory:
        rows = [memory(float(size)) for size in options.megapixels.split(",")]
    else:
        if options.folder is None:
            parser.error("give a folder with photographs, or --memory")
        paths = sorted(path for path in options.folder.iterdir() if path.is_file())[: options.count + 1]
        variants = {
            f"floor, {options.workers} processes": lambda: floor(paths, options.workers),
            f"tilestream, {options.workers} workers": lambda: ours(paths, options.workers),
            "Pillow and zarr, one core": lambda: in_process(loop, paths[: 1 + len(paths) // 4]),
        }
        if options.ngff_zarr:
            variants["ngff-zarr, one process"] = lambda: peer(paths[: 1 + len(paths) // 10], options.ngff_zarr)
        rows = [{"variant": name, "seconds_each": call()} for name, call in variants.items()]
        for row in rows:
            row["of_floor"] = rows[0]["seconds_each"] / row["seconds_each"]
    from engine import report  # its neighbour, which imports torch

    report(rows, options.out)
    return rows


def floor(paths: list[Path], workers: int) -> float:
    """Seconds a photograph."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_floor_one, paths[:1] * workers, chunksize=1)
        started = time.perf_counter()
        pool.map(_floor_one, paths[1:], chunksize=1)
        return (time.perf_counter() - started) / (len(paths) - 1)


def _floor_one(path: Path) -> int:
    import cv2
    import numpy as np
    import pyvips
    from numcodecs import Zstd

    pyvips.concurrency_set(1)
    levels = [pyvips.Image.new_from_file(str(path), access="sequential").numpy()]
    while max(levels[-1].shape[:2]) > TOP_PX:
        levels.append(pyvips.Image.new_from_array(levels[-1]).shrink(2, 2, ceil=True).numpy())
    levels.append(cv2.resize(levels[0], (TOP_PX, TOP_PX), interpolation=cv2.INTER_AREA))
    zstd, total = Zstd(level=3, checksum=True), 0
    chunk = np.zeros((3, CHUNK_PX, CHUNK_PX), np.uint8)
    for level in levels:
        for y in range(0, level.shape[0], CHUNK_PX):
            for x in range(0, level.shape[1], CHUNK_PX):
                part = level[y : y + CHUNK_PX, x : x + CHUNK_PX]
                for channel, plane in enumerate(cv2.split(part)):
                    chunk[channel, : len(part), : part.shape[1]] = plane
                total += len(zstd.encode(chunk))
    return total


def ours(paths: list[Path], workers: int) -> float:
    """Seconds a photograph, over Dask, without the cluster's start."""
    from tilestream.cluster import Job, connect, run
    from tilestream.store import Limits, Settings, Source, create_store, ingest_guarded, lease, open_store

    with tempfile.TemporaryDirectory() as folder, connect(workers=workers) as client:
        store = str(create_store(Path(folder) / "store.zarr"))
        first = [client.submit(ingest_guarded, store, Source(f"first{i}", str(paths[0])), Settings(), Limits(),
                               workers=[worker], pure=False)
                 for i, worker in enumerate(client.scheduler_info(n_workers=-1)["workers"])]  # fmt: skip
        client.gather(first)
        statuses = []
        started = time.perf_counter()
        with lease(open_store(store), "ingest"):
            jobs = (Job.call(p.name, ingest_guarded, store, Source(p.name, str(p)), Settings(), Limits())
                    for p in paths[1:])  # fmt: skip
            run(
                jobs, client=client, window=2 * workers, on_result=lambda job, result: statuses.append(result["status"])
            )
        seconds = (time.perf_counter() - started) / (len(paths) - 1)
        if set(statuses) != {"committed"}:
            raise RuntimeError(f"not all photographs were committed: {set(statuses)}")
    return seconds


def in_process(call: Callable[[list[Path]], float], paths: list[Path]) -> float:
    """What `call` returns in a process of its own, on one core."""
    with multiprocessing.get_context("spawn").Pool(1, _one_core) as pool:
        return pool.apply(call, (paths,))


def _one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])


def loop(paths: list[Path]) -> float:
    """Seconds a photograph."""
    import numpy as np
    import zarr
    from PIL import Image
    from zarr.codecs import ZstdCodec

    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            started = time.perf_counter()
            with Image.open(path) as file:
                image = file.convert("RGB")
            level = 0
            while True:
                pixels = np.asarray(image).transpose(2, 0, 1)
                array = zarr.create_array(
                    f"{folder}/{path.name}/{level}", shape=pixels.shape, dtype="uint8",
                    chunks=(3, CHUNK_PX, CHUNK_PX), compressors=[ZstdCodec(level=3, checksum=True)],
                )  # fmt: skip
                array[...] = pixels
                if max(image.size) <= TOP_PX:
                    break
                image, level = image.reduce(2), level + 1
            if path is not paths[0]:
                seconds += time.perf_counter() - started
    return seconds / (len(paths) - 1)


def peer(paths: list[Path], python: str) -> float:
    """Seconds a photograph of ngff-zarr's conversion, in a process of its environment."""
    code = """
import sys, tempfile, time
import imageio.v3, numpy as np
from ngff_zarr import Methods, to_multiscales, to_ngff_image, to_ngff_zarr
with tempfile.TemporaryDirectory() as folder:
    for i, path in enumerate(sys.argv[1:]):
        if i == 1:
            started = time.perf_counter()
        pixels = imageio.v3.imread(path).transpose(2, 0, 1)
        image = to_ngff_image(pixels, dims=["c", "y", "x"])
        scales = to_multiscales(image, scale_factors=[2, 4, 8], chunks=512, method=Methods.DASK_IMAGE_GAUSSIAN)
        to_ngff_zarr(f"{folder}/{i}.zarr", scales, version="0.5")
    print((time.perf_counter() - started) / (len(sys.argv) - 2))
"""
    done = subprocess.run([python, "-c", code, *map(str, paths)], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def memory(megapixels: float) -> dict[str, Any]:
    """Peak resident memory of a process that ingests a tiled TIFF of so many megapixels, and its time."""
    side = max(512, round((megapixels * 1e6) ** 0.5 / 16) * 16)
    with tempfile.TemporaryDirectory() as folder:
        make_picture(f"{folder}/picture.tif", side)
        code = (
            "import sys, time; import pyvips; pyvips.concurrency_set(1)\n"
            "from tilestream.store import *\n"
            "store = create_store(sys.argv[1] + '/store.zarr'); started = time.perf_counter()\n"
            "result = ingest_photograph(store, Source('a', sys.argv[1] + '/picture.tif'), Settings())\n"
            "assert result['status'] == 'committed', result\n"
            "seconds = time.perf_counter() - started\n"  # the peak of this program, not of who started it
            "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0], seconds)"
        )
        environment = {
            **os.environ,
            "MALLOC_ARENA_MAX": "1",
        }  # as ingest's own processes have it
        done = subprocess.run(
            [sys.executable, "-c", code, folder], check=True, capture_output=True, text=True, env=environment
        )
    peak, seconds = done.stdout.split()
    return {"variant": f"{side} x {side} px", "peak_mib": int(peak) / 1024, "seconds": float(seconds)}


def make_picture(path: str, side: int) -> None:
    """A tiled TIFF, made strip by strip by libvips."""
    import pyvips

    waves = pyvips.Image.xyz(side, side).linear([0.01, 0.02], [0, 1]).sin() * 100 + 128
    picture = waves[0].bandjoin([waves[1], (waves[0] + waves[1]) * 0.5]).cast("uchar").copy(interpretation="srgb")
    picture.tiffsave(path, tile=True, tile_width=128, tile_height=128, compression="deflate", bigtiff=True)


if __name__ == "__main__":
    main()
