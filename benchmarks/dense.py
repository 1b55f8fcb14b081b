"""Paper B's dense form over a photograph of 12 megapixels, beside the un-tiled network in plain PyTorch.

    python benchmarks/dense.py --memory 400MiB --repeats 3 --out dense.json

Tasks: `forward` (no gradients) and `weights` (gradients of all weights of cross-entropy), each variant in a process of
its own. Memory is what the call adds to the process's resident memory. Under max pooling a way back costs the tiles
that won a word: `gone_back` of `back_tiles`. The photograph is smooth noise at many scales: maxima lie all over it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine import loss, machine, watched

import tilestream as ts

UNTILED = ("plain", "channels-last")
TASKS = ("forward", "weights")


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs all variants of both tasks, prints the table, writes the JSON; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2848x4288", help="HEIGHTxWIDTH")
    parser.add_argument("--words", type=int, default=100)
    parser.add_argument("--memory", default="400MiB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(*options.one.split(":"), options)))
        return []
    words = ["--size", options.size, "--words", str(options.words), "--threads", str(options.threads)]
    names = [(task, variant) for task in TASKS for variant in (*UNTILED, options.memory)]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for (task, variant), results in runs.items():
            command = [sys.executable, __file__, *words, "--one", f"{task}:{variant}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    rows: list[dict[str, Any]] = []
    print(
        f"{'task':9}{'variant':15}{'s':>7}{'CPU s':>7}{'x best':>7}{'MiB':>7}{'x best':>7}{'predicted':>10}  tiles back"
    )
    for (task, variant), results in runs.items():
        row = {key: statistics.median(result[key] for result in results) for key in results[0]}
        rows.append({"task": task, "variant": variant, **row})
        untiled = [other for other in rows if other["task"] == task and other["variant"] in UNTILED]
        ratios = [row[key] / min(other[key] for other in untiled) for key in ("seconds", "bytes")]
        back = f"{row['gone_back']:.0f} of {row['back_tiles']:.0f}" if row["back_tiles"] else "-"
        print(
            f"{task:9}{variant:15}{row['seconds']:7.2f}{row['cpu_seconds']:7.2f}{ratios[0]:7.2f}"
            f"{row['bytes'] / 2**20:7.0f}{ratios[1]:7.3f}{row['predicted_bytes'] / 2**20:10.0f}  {back}"
        )
    if options.out:
        given = {name: value for name, value in vars(options).items() if name not in ("out", "one")}
        options.out.write_text(json.dumps({"machine": machine(), "options": given, "rows": rows}, indent=2))
    return rows


def measure(task: str, variant: str, options: argparse.Namespace) -> dict[str, float]:
    """One variant in this process: seconds, its CPU's, bytes above the bare process, predicted bytes, tiles back."""
    import time

    import numpy as np
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    net = ts.nets.build("ConvBoVW", {"instances": "images", "words": options.words})
    image = photograph(tuple(map(int, options.size.split("x"))))
    streamed: Any = None
    if variant in UNTILED:
        layout = torch.channels_last if variant == "channels-last" else torch.contiguous_format
        net.to(memory_format=layout)

        def call(a: np.ndarray) -> Any:
            return net(torch.from_numpy(a)[None].contiguous(memory_format=layout))

        one = torch.no_grad()(call) if task == "forward" else lambda a: loss(call(a)).backward()
    else:
        streamed = ts.stream(net, memory=variant)
        one = streamed if task == "forward" else lambda a: streamed.backward(a, loss)
    one(np.ascontiguousarray(image[:, :256, :256]))  # libraries load before the clock starts
    net.zero_grad()
    cpu = time.process_time()
    seconds, bytes_ = watched(lambda: one(image))
    plan = streamed.plan(image.shape, weights=task == "weights", backward=task == "weights") if streamed else None
    back, tiles = (streamed.gone_back if streamed and task == "weights" else None) or (0, 0)
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "bytes": bytes_,
        "predicted_bytes": plan.peak_bytes if plan else 0,
        "gone_back": back,
        "back_tiles": tiles,
    }


def photograph(size: tuple[int, ...]) -> Any:
    """(3, height, width) float32: smooth noise at many scales, in [0, 1]."""
    import torch

    total = torch.zeros(1, 3, *size)
    for side in (4, 16, 64, 256):
        total += torch.nn.functional.interpolate(torch.rand(1, 3, side, side), size, mode="bilinear")
    return (total[0] / 4).numpy()


if __name__ == "__main__":
    main()
