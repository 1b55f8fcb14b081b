"""The engine beside plain PyTorch: time and memory of the same run, each variant in a process of its own.

    python benchmarks/engine.py --net resnet18 --size 4096x4096 --task saliency --budgets 400MiB,800MiB --repeats 3

Tasks: `saliency` (input gradient of a logit), `guided` (guided back-propagation), `weights` (all gradients of
cross-entropy: `backward`). Beside ours: plain autograd, channels-last with batch norm folded (saliency), checkpointing
by stage (weights). A budget like "bf16 400MiB" is that of maps in bfloat16; `error` is its distance to the float32
saliency by its norm, as it is for autocast. Memory is what the call adds to the process's resident memory; the floor is
the machine's measured convolution rate, and useful FLOPs are those of the un-tiled pass. Variants that do not fit the
machine are left out by name, with --skip plain. With `--device cuda` all run in one process, warm, memory is what
PyTorch allocates there, and torch.compile stands beside; TF32 is off. The peer, lightstream (weights), runs in an
environment of its own:
`peer.py` says how.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tilestream as ts

OTHERS = {
    "saliency": ["plain", "channels-last folded", "channels-last folded bf16"],
    "guided": ["plain"],
    "weights": ["plain", "channels-last", "checkpoint"],
}
ON_GPU = {
    "saliency": [*OTHERS["saliency"], "channels-last folded compiled", "channels-last folded compiled bf16"],
    "guided": OTHERS["guided"],
    "weights": [*OTHERS["weights"], "channels-last bf16"],
}
PEER, BF16 = "lightstream ", "bf16 "


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs all variants, prints the table, writes the JSON; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--size", default="2048x2048", help="HEIGHTxWIDTH")
    parser.add_argument("--task", default="saliency", choices=sorted(OTHERS))
    parser.add_argument("--budgets", default="200MiB,400MiB,1GiB", help="or tile=SIDE; bf16 before either")
    parser.add_argument("--skip", default="", help="variants to leave out, separated by commas")
    parser.add_argument("--lightstream", default="", metavar="PYTHON:TILE[,TILE...]", help="the peer, tiles in px")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    height, width = map(int, options.size.split("x"))
    if options.variant:
        print(json.dumps(measure(options.variant, options.task, options.net, (height, width), options.threads)))
        return []
    python, _, tiles = options.lightstream.rpartition(":")
    if options.lightstream and not (python and options.task == "weights"):
        parser.error(f"--lightstream={options.lightstream} must be PYTHON:TILE[,TILE...], with --task weights")
    known = ON_GPU if options.device == "cuda" else OTHERS
    others = [v for v in known[options.task] if v not in options.skip.split(",")]
    others += [f"{PEER}{tile}" for tile in tiles.split(",") if tile]
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in [*others, *options.budgets.split(",")]}
    for repeat in range(options.repeats):
        for variant, results in runs.items():
            if options.device == "cpu":
                results.append(_child(variant, options))
            elif repeat == 0:
                try:
                    row = measure(variant, options.task, options.net, (height, width), 1, "cuda", options.repeats)
                except MemoryError as error:
                    print(f"{variant}: {error}")
                    continue
                results.append(row)
                print(f"{variant}: {row['seconds']:.3f} s, {row['bytes'] / 2**20:.0f} MiB", flush=True)
    rows = [{"variant": variant, **_medians(results)} for variant, results in runs.items() if results]
    where = "one GPU" if options.device == "cuda" else f"{options.threads} threads"
    caption = f"{options.task}, {options.net}, {options.size}, float32, {where}, "
    _print(rows, f"{caption}median of {options.repeats}")
    if options.out:
        options.out.write_text(
            json.dumps({"machine": machine(), "options": vars(options), "rows": rows}, indent=2, default=str)
        )
    return rows


def machine() -> dict[str, Any]:
    """What this ran on."""
    import torch

    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def report(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Prints a line a row; writes them with the machine's description where asked."""
    for row in rows:
        print("  ".join(f"{name} {v:.3f}" if isinstance(v, float) else str(v) for name, v in row.items()))
    if out:
        out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def measure(
    variant: str, task: str, name: str, size: tuple[int, int], threads: int, device: str = "cpu", repeats: int = 1
) -> dict[str, float]:
    """One variant in this process: seconds, bytes above the bare process, predicted bytes, overhead, useful GFLOP/s."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    net, weights = ts.nets.build(name).to(device), task == "weights"
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.cuda.empty_cache()
    flops = useful_flops(net, size, weights)
    image = np.random.default_rng(0).random((3, *size), np.float32)
    streamed, plan = None, None
    if variant in ON_GPU[task]:
        call = other(variant, task, net, device)
    else:
        short = "bf16" if variant.startswith(BF16) else None
        text = variant.removeprefix(BF16)
        bound: Any = {"tile": int(text[5:])} if text.startswith("tile=") else {"memory": text}
        streamed = ts.stream(net, **bound, precision=short)
        method = "guided" if task == "guided" else "gradient"
        plan = streamed.plan(image.shape, weights=weights, method=method)
        call = (lambda a: streamed.backward(a, loss)) if weights else lambda a: streamed.saliency(a, method=method)
    # libraries load before the clock starts; on a GPU kernels are chosen and compiled, too
    watched(lambda: call(image if device == "cuda" else np.ascontiguousarray(image[:, :256, :256])), device)
    net.zero_grad()
    results: list[Any] = []
    times, peaks = zip(*(watched(lambda: results.append(call(image)), device) for _ in range(repeats)), strict=True)
    seconds, bytes_ = statistics.median(times), max(peaks)
    error = 0.0
    if "bf16" in variant and task == "saliency":
        want = ts.stream(net, memory="4 GiB").saliency(image).numpy()
        got = results[0].numpy() if streamed else results[0][0].mean(0).cpu().numpy()
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    return {
        "seconds": seconds,
        "bytes": bytes_,
        "predicted_bytes": plan.peak_bytes if plan else 0,
        "overhead": plan.overhead if plan else 1.0,
        "useful_gflops": flops / seconds / 1e9,
        "convolution_gflops": convolution_rate(device),
        "error": error,
    }


def watched(call: Callable[[], Any], device: str = "cpu") -> tuple[float, int]:
    """Seconds that `call` takes, and the bytes that it adds at most: to the process's resident memory, or on a GPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held, started = torch.cuda.memory_allocated(), time.perf_counter()
        try:
            call()
        except torch.cuda.OutOfMemoryError:
            raise MemoryError("does not fit the GPU") from None
        torch.cuda.synchronize()
        return time.perf_counter() - started, torch.cuda.max_memory_allocated() - held
    import psutil

    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        call()
        seconds = time.perf_counter() - started
    finally:
        done.set()  # or a call that fails would leave a process that never ends
        watcher.join()
    return seconds, peak[0] - before


def loss(logits: Any) -> Any:
    """Cross-entropy for class 1."""
    import torch

    return torch.nn.functional.cross_entropy(logits, torch.ones(len(logits), dtype=torch.int64, device=logits.device))


def other(variant: str, task: str, net: Any, device: str = "cpu") -> Callable[[Any], Any]:
    """Plain PyTorch, in the way that `variant` names."""
    import torch
    from torch.fx.experimental.optimization import fuse
    from torch.utils.checkpoint import checkpoint_sequential

    layout = torch.channels_last if "channels-last" in variant else torch.contiguous_format
    if task != "weights":
        net.requires_grad_(False)
    if "folded" in variant:
        net = fuse(net, inplace=False)
    net.to(memory_format=layout)
    forward = net
    if variant == "checkpoint":
        stages = _stages(net)
        forward = lambda x: checkpoint_sequential(stages, len(stages), x, use_reentrant=False)  # noqa: E731
    if task == "guided":
        net.apply(_guide)
    if "compiled" in variant:
        forward = torch.compile(net)

    def call(array: Any) -> Any:
        x = torch.from_numpy(array)[None].to(device).contiguous(memory_format=layout).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled="bf16" in variant):
            logits = forward(x)
        (loss(logits) if task == "weights" else logits[0, 1]).backward()
        return x.grad

    return call


def _guide(module: Any) -> None:
    """Guided back-propagation in plain PyTorch: a hook that clamps what goes back."""
    import torch

    if isinstance(module, torch.nn.ReLU):
        module.inplace = False
        module.register_full_backward_hook(lambda _, inputs, outputs: (inputs[0].clamp(min=0),))


def _stages(net: Any) -> list[Any]:
    """The network as a list of its stages, the grain of checkpointing."""
    import torch

    children = dict(net.named_children())
    stem = [m for n, m in children.items() if n in ("conv1", "bn1", "relu", "maxpool", "stem", "bn")]
    body = [m for n, m in children.items() if n.startswith("layer")] or list(children.get("segments", []))
    ends = [children.get("avgpool") or children["pool"], torch.nn.Flatten(), children["fc"]]
    return [torch.nn.Sequential(*stem), *body, torch.nn.Sequential(*ends)]


def useful_flops(net: Any, size: tuple[int, int], weights: bool) -> int:
    """FLOPs of the un-tiled pass, there and back."""
    from tilestream.engine import trace
    from tilestream.engine.cost import whole_flops

    return whole_flops(trace(net).bind(size), weights)


def convolution_rate(device: str = "cpu") -> float:
    """GFLOP/s of a 3 x 3 convolution, 64 to 64 channels, channels-last: what this machine does at best."""
    import torch

    side = 2048 if device == "cuda" else 128
    x = torch.randn(1, 64, side, side, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.nn.functional.conv2d(x, weight, padding=1)
    wait()
    started = time.perf_counter()
    for _ in range(40):
        torch.nn.functional.conv2d(x, weight, padding=1)
    wait()
    return 40 * 2 * 64 * 64 * 9 * side**2 / (time.perf_counter() - started) / 1e9


def _child(variant: str, options: argparse.Namespace) -> dict[str, float]:
    words = ["--net", options.net, "--size", options.size, "--threads", str(options.threads)]
    if variant.startswith(PEER):
        python, script = options.lightstream.rpartition(":")[0], str(Path(__file__).with_name("peer.py"))
        command = [python, script, *words, "--tile", variant.removeprefix(PEER)]
    else:
        command = [sys.executable, __file__, *words, "--task", options.task, "--variant", variant]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"variant {variant!r} failed: {why}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _medians(results: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in results) for key in results[0]}


def _print(rows: list[dict[str, Any]], caption: str) -> None:
    first = rows[0]
    print(caption)
    heads = ("seconds", "x first", "MiB", "x first", "predicted", "FLOPs", "GFLOP/s", "of peak", "error")
    print(f"{'variant':26}" + "".join(f"{head:>10}" for head in heads))
    for row in rows:
        predicted = f"{row['predicted_bytes'] / 2**20:.0f}" if row["predicted_bytes"] else "-"
        cells = (
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / first['seconds']:.2f}",
            f"{row['bytes'] / 2**20:.0f}",
            f"{row['bytes'] / first['bytes']:.2f}",
            predicted,
            f"{row['overhead']:.2f}",
            f"{row['useful_gflops']:.0f}",
            f"{row['useful_gflops'] / row['convolution_gflops']:.2f}",
            f"{row['error']:.3f}" if row.get("error") else "-",
        )
        print(f"{row['variant']:26}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
