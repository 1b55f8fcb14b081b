"""Saliency of one image: tilestream at several budgets beside plain autograd, time and memory of the same run.

    python benchmarks/engine.py --net resnet18 --size 2048x2048 --budgets 400MiB,1GiB --repeats 3 --out engine.json

Each variant runs in a process of its own, one after the other, round by round. Memory is what the call adds to the
process's resident memory; the floor is the machine's measured convolution rate, given as useful FLOPs a second.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import tilestream as ts


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs all variants, prints the table, writes the JSON; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--size", default="2048x2048", help="HEIGHTxWIDTH")
    parser.add_argument("--budgets", default="400MiB,1GiB,4GiB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    height, width = map(int, options.size.split("x"))
    if options.variant:
        print(json.dumps(measure(options.variant, options.net, height, width, options.threads)))
        return []
    variants = ["autograd", "autograd channels-last", *options.budgets.split(",")]
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(options.repeats):
        for variant in variants:
            runs[variant].append(_child(variant, options))
    rows = [{"variant": variant, **_medians(results)} for variant, results in runs.items()]
    _print(rows, f"{options.net}, {options.size}, float32, {options.threads} threads, median of {options.repeats}")
    if options.out:
        machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
        options.out.write_text(
            json.dumps({"machine": machine, "options": vars(options), "rows": rows}, indent=2, default=str)
        )
    return rows


def measure(variant: str, net_name: str, height: int, width: int, threads: int) -> dict[str, float]:
    """One variant in this process: seconds, bytes above the bare process, predicted bytes, overhead, useful GFLOP/s."""
    import numpy as np
    import psutil
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    net = ts.nets.build(net_name)
    image = np.random.default_rng(0).random((3, height, width), np.float32)
    plan = None
    if variant.startswith("autograd"):
        layout = torch.channels_last if "channels-last" in variant else torch.contiguous_format
        net.requires_grad_(False).to(memory_format=layout)

        def call(array: Any) -> None:
            x = torch.from_numpy(array)[None].contiguous(memory_format=layout).requires_grad_()
            net(x)[0, 1].backward()
    else:
        streamed = ts.stream(net, memory=variant)
        plan = streamed.plan(image.shape)

        def call(array: Any) -> None:
            streamed.saliency(array)

    call(np.ascontiguousarray(image[:, :256, :256]))  # kernels compile before the clock starts
    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    call(image)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    whole = ts.stream(net, memory="64 GiB").plan(image.shape).whole_flops
    return {
        "seconds": seconds,
        "bytes": peak[0] - before,
        "predicted_bytes": plan.peak_bytes if plan else 0,
        "overhead": plan.overhead if plan else 1.0,
        "useful_gflops": whole / seconds / 1e9,
        "convolution_gflops": convolution_rate(),
    }


def convolution_rate() -> float:
    """GFLOP/s of a 3 x 3 convolution, 64 to 64 channels, channels-last: what this machine does at best."""
    import torch

    x = torch.randn(1, 64, 512, 512).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    torch.nn.functional.conv2d(x, weight, padding=1)
    started = time.perf_counter()
    for _ in range(5):
        torch.nn.functional.conv2d(x, weight, padding=1)
    return 5 * 2 * 64 * 64 * 9 * 512 * 512 / (time.perf_counter() - started) / 1e9


def _child(variant: str, options: argparse.Namespace) -> dict[str, float]:
    words = ["--net", options.net, "--size", options.size, "--threads", str(options.threads), "--variant", variant]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"variant {variant!r} failed: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _medians(results: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in results) for key in results[0]}


def _print(rows: list[dict[str, Any]], caption: str) -> None:
    plain = rows[0]
    print(caption)
    heads = ("seconds", "x plain", "MiB", "x plain", "predicted", "GFLOP/s", "of peak")
    print(f"{'variant':24}" + "".join(f"{head:>10}" for head in heads))
    for row in rows:
        predicted = f"{row['predicted_bytes'] / 2**20:.0f}" if row["predicted_bytes"] else "-"
        cells = (
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / plain['seconds']:.2f}",
            f"{row['bytes'] / 2**20:.0f}",
            f"{row['bytes'] / plain['bytes']:.2f}",
            predicted,
            f"{row['useful_gflops']:.0f}",
            f"{row['useful_gflops'] / row['convolution_gflops']:.2f}",
        )
        print(f"{row['variant']:24}" + "".join(f"{cell:>10}" for cell in cells))


if __name__ == "__main__":
    main()
