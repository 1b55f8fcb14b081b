"""What Dask costs, what a second worker gains, and whether memory stays flat over a large data set.

    python benchmarks/cluster.py STORE MODEL --count 8 --out cluster.json        # saliency of photographs of a store
    python benchmarks/cluster.py --stub 10000 --out window.json                  # a network that does nothing

Saliency: the engine in a plain loop in one process of one thread, against one worker and two workers of one thread on
Dask, a whole photograph, a row of tiles or a tile a task, one after the other, `--repeats` times, medians. Clusters are
warm: each has had one photograph. Stub: the scheduler, the driver and a worker are processes of their own; their
resident memory after a tenth of the images, and after all.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from kills import Cluster  # its neighbour
from rich.console import Console

from tilestream.cluster import Job, Progress, connect, run
from tilestream.engine import highest, highest_of, plan
from tilestream.geometry import GRANULARITIES, interior
from tilestream.stages import saliency_tasks as tasks
from tilestream.stages.base import set_threads
from tilestream.stages.granularity import choose
from tilestream.store import Store


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs what is asked for, prints a line each; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, default=1024, help="MiB a task")
    parser.add_argument("--stub", type=int, help="images of a network that does nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.stub:
        rows = stub(options.stub)
    elif options.store is None or options.model is None:
        parser.error("give a store and a model file, or --stub N")
    else:
        rows = saliency(options)
    from engine import report  # its neighbour

    report(rows, options.out)
    return rows


def saliency(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a variant: seconds a photograph, of the plain loop's, bytes between workers."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        works = _works(options, Path(folder))
        variants: dict[str, Callable[[], dict[str, float]]] = {
            "plain loop": lambda: plain(works),
            "two plain loops at once": lambda: at_once(works),
        }
        for workers in (1, 2):
            for granularity in GRANULARITIES:
                some = [replace(work, granularity=granularity) for work in works]
                variants[f"{workers} workers, {granularity}"] = lambda w=workers, s=some: on_dask(s, w)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        for _ in range(options.repeats):  # interleaved: what else the machine does hits all alike
            for name, call in variants.items():
                found[name].append(call())
    rows = []
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        spread = [run["seconds_each"] for run in runs]
        rows.append({"variant": name, **middle, "fastest": min(spread), "slowest": max(spread)})
    for row in rows:
        row["of_plain"] = row["seconds_each"] / rows[0]["seconds_each"]
    one = {row["variant"][1:]: row for row in rows if row["variant"].startswith("1")}
    for row in rows:
        if row["variant"].startswith("2"):
            row["gain_of_second"] = one[row["variant"][1:]]["seconds_each"] / row["seconds_each"]
    return rows


def _works(options: argparse.Namespace, folder: Path) -> list[tasks.Task]:
    """The tasks, with a recorded plan; photographs of the first one's size."""
    store = Store(options.store)
    extent = store.levels(store.ids[0])[0][1:]
    ids = [id for id in store.ids if store.levels(id)[0][1:] == extent][: options.count]
    digest = hashlib.sha256(options.model.read_bytes()).hexdigest()
    net, _ = tasks.network(str(options.model.absolute()), digest, None)
    layout = plan(net, extent, memory=options.memory << 20)
    (folder / "plan.json").write_text(layout.to_json())
    print(
        f"{len(ids)} photographs, {layout}; chosen for 2 workers: {choose(layout, len(ids), 2, options.memory << 20)}"
    )
    one = tasks.Task(str(store.path), "", str(options.model.absolute()), digest, str(folder / "plan.json"))
    return [replace(one, id=id) for id in ids]


def plain(works: list[tasks.Task]) -> dict[str, float]:
    """The engine in a loop of this process, finding the same: the highest point and the small picture of each map."""
    _loop(works[:1])
    started = time.perf_counter()
    _loop(works)
    return {"seconds_each": (time.perf_counter() - started) / len(works), "moved_bytes": 0.0}


def _loop(works: list[tasks.Task]) -> None:
    work = tasks.saliency_pass(works[0])
    border = interior(work.plan.image, works[0].border)
    for task in works:
        cells: list[Any] = []

        def write(cell: Any, values: Any, cells: list[Any] = cells) -> None:
            cells.append((highest(values, cell, border), tasks.overview(values, cell)))

        work.run(tasks.source(task), write)
        highest_of([peak for peak, _ in cells])


def at_once(works: list[tasks.Task]) -> dict[str, float]:
    """What two processes of this machine can do without Dask: half the photographs each."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=set_threads, initargs=(1,)) as pool:
        list(pool.map(plain, [works[:1], works[:1]]))
        started = time.perf_counter()
        list(pool.map(_loop, [works[::2], works[1::2]]))
        return {"seconds_each": (time.perf_counter() - started) / len(works), "moved_bytes": 0.0}


def on_dask(works: list[tasks.Task], workers: int) -> dict[str, float]:
    """The same on new workers of one thread."""

    def moved(dask_worker: Any) -> int:
        return int(dask_worker.transfer_outgoing_bytes_total)

    with connect(workers=workers, setup=[lambda: set_threads(1)], say=lambda line: None) as client:

        def go(some: list[tasks.Task]) -> float:
            started = time.perf_counter()
            run(
                (Job(task.id, tasks.reduction(task)) for task in some),
                client=client,
                window=2 * workers,
                on_result=lambda job, result: None,
            )
            return time.perf_counter() - started

        client.run(tasks.prepare, works[0])
        go(works[:workers])
        before = sum(client.run(moved).values())
        seconds = go(works)
        return {
            "seconds_each": seconds / len(works),
            "moved_bytes": (sum(client.run(moved).values()) - before) / len(works),
        }


def stub(images: int, tiles: int = 4) -> list[dict[str, Any]]:
    """Images of some tiles each that do nothing: seconds a task, memory of each process on the way."""
    from tilestream.cluster import Reduction

    job = Reduction(tuple(range(tiles)), _nothing, {0: tuple(range(tiles))}, _first, _first_value)
    tasks_each = tiles + 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)) as cluster:
        assert cluster.scheduler
        with connect(cluster.address, workers=2, timeout_s=60, say=lambda line: None) as client:
            processes = {"scheduler": psutil.Process(cluster.scheduler.pid), "driver": psutil.Process()}
            processes |= {f"worker {i}": process for i, process in enumerate(cluster.processes())}
            started, bar = time.perf_counter(), Progress("stub", images, tiles * images, "images", lambda: None)

            def done(finished: Job, result: Any) -> None:
                if (bar.images + 1) % max(1, images // 10) == 0:
                    sizes = {f"{name}_mib": process.memory_info().rss / 2**20 for name, process in processes.items()}
                    seconds = time.perf_counter() - started
                    count = bar.images + 1
                    rows.append({"images": count, "ms_a_task": 1e3 * seconds / count / tasks_each, **sizes})
                    Console(stderr=True).print(f"{count} of {images}")

            jobs = (Job(f"image-{index}", job, size=1.0) for index in range(images))
            run(jobs, client=client, window=8, on_result=done, progress=bar)
    return rows


def _nothing(part: int) -> dict[int, int]:
    return {0: part}


def _first(destination: int, pieces: list[int]) -> int:
    return pieces[0]


def _first_value(values: list[int]) -> int:
    return values[0]


if __name__ == "__main__":
    main()
