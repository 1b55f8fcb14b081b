"""Saliency of images from 2,048 px square up in one budget: memory and time a pixel stay what they are.

    python benchmarks/sizes.py --net ResidualNet --memory 300MiB --sizes 2048,8192,16384 --out sizes.json

The image is made window by window and the map thrown away, so that what is measured is the engine alone. Stored maps
that do not fit the budget go to files in the system's temporary folder, which needs room for them: the column `stored`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import tilestream as ts


class Pattern:
    """An image (3, n, n) that is computed where it is read: a texture with edges at many scales."""

    def __init__(self, n: int) -> None:
        self.shape = (3, n, n)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        y, x = (np.arange(s.start, s.stop, dtype=np.int64) for s in index[1:])
        mixed = (y[:, None] * 7919 + x * 104729 + (y[:, None] // 37) * (x // 53) * 31) % 1021
        return np.stack([(mixed * k % 1021).astype(np.float32) / 1021 for k in (1, 3, 7)])


class Nowhere:
    """Takes a map of this shape and forgets it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __setitem__(self, index: Any, value: Any) -> None:
        pass


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs all sizes, each in a process of its own; prints the table, writes the JSON, returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="ResidualNet")
    parser.add_argument("--memory", default="300MiB")
    parser.add_argument("--sizes", default="2048,4096,8192")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.net, options.one, options.memory, options.threads, options.device)))
        return []
    words = ["--net", options.net, "--memory", options.memory, "--threads", str(options.threads)]
    words += ["--device", options.device]
    rows: list[dict[str, Any]] = []
    print(f"{'px':>8}{'seconds':>10}{'ns/px':>8}{'MiB':>8}{'predicted':>11}{'stored':>10}")
    for size in options.sizes.split(","):
        done = subprocess.run(
            [sys.executable, __file__, *words, "--one", size], capture_output=True, text=True, check=True
        )
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{row['size']:>8}{row['seconds']:>10.2f}{row['seconds'] / row['size'] ** 2 * 1e9:>8.0f}"
            f"{row['bytes'] / 2**20:>8.0f}{row['predicted_bytes'] / 2**20:>11.0f}{row['stored_bytes'] / 2**20:>10.0f}",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps({"options": vars(options), "rows": rows}, indent=2, default=str))
    return rows


def measure(net: str, size: int, memory: str, threads: int, device: str = "cpu") -> dict[str, float]:
    """One size in this process: seconds, bytes above the bare process (or on the GPU), and what the plan said."""
    import torch
    from engine import watched

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    streamed = ts.stream(ts.nets.build(net).to(device), memory=memory)
    plan = streamed.plan((3, size, size), out=True)
    streamed.saliency(Pattern(256), out=Nowhere((256, 256)))  # libraries load before the clock starts
    seconds, added = watched(lambda: streamed.saliency(Pattern(size), out=Nowhere((size, size))), device)
    return {
        "size": size,
        "seconds": seconds,
        "bytes": added,
        "predicted_bytes": plan.peak_bytes,
        "stored_bytes": plan.stored_bytes,
    }


if __name__ == "__main__":
    main()
