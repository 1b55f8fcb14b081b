"""Kills at random: do results stay what they are?

    python benchmarks/kills.py STORE MODELS --runs 10 --kills 10 --out kills.json

A pipeline (predict: no training) runs over the photographs of a store with fixed models, on a cluster of a scheduler
and two workers started by hand. Once it is left in peace; then, `--runs` times, something is ended or stopped every
few seconds, at least `--kills` times a run: workers by SIGKILL, SIGTERM or SIGSTOP and SIGCONT, alone or with their
nannies; the driver by SIGKILL, SIGINT or SIGTERM, and the scheduler, after which the run goes on with --resume. Each
run must make the bytes of the undisturbed one, and must not do again what its journal held.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import zarr

LIMIT_S, STOP_S = 3600.0, 30.0
TABLES = ("centres.parquet", "crops.parquet", "predictions.parquet", "metrics.json")


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs all, prints a line a run; returns them, or leaves with status 1 at the first difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("models", type=Path, help="folder with the models of a run")
    parser.add_argument("--pipeline", default="predict")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two kills, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary, Cluster(Path(temporary)) as cluster:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        rows = [Disturbed(options, cluster, folder / "undisturbed", None).finish()]
        for number in range(options.runs):
            rng = random.Random(f"{options.seed} {number}")
            rows.append(Disturbed(options, cluster, folder / f"run-{number}", rng).finish())
            row = {**rows[-1], "equal": rows[-1]["digests"] == rows[0]["digests"]}
            print(json.dumps({name: value for name, value in row.items() if name != "digests"}), flush=True)
            if not row["equal"]:
                sys.exit(f"run {number} (seed {options.seed}) differs: {rows[-1]['digests']} from {rows[0]['digests']}")
    if options.out:
        from engine import machine  # its neighbour

        options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))
    return rows


class Cluster:
    """A scheduler and two workers with nannies, on loopback, as one would start them by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scheduler, self.workers = folder, None, list[subprocess.Popen[bytes]]()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """The scheduler; workers find it when it is there."""
        log = (self.folder / "scheduler.log").open("ab")
        words = ["--host", "127.0.0.1", "--port", self.address.rpartition(":")[2]]
        page = ["--dashboard-address", "127.0.0.1:0", "--preload", "tilestream.cluster.dashboard"]
        self.scheduler = _dask(["scheduler", *words, *page], log)
        for _ in range(2):
            self.start_worker()

    def start_worker(self) -> None:
        log = (self.folder / "workers.log").open("ab")
        place = ["--local-directory", str(self.folder), "--host", "127.0.0.1", "--no-dashboard"]
        self.workers.append(_dask(["worker", self.address, "--nthreads", "1", *place], log))

    def processes(self) -> list[psutil.Process]:
        """Worker processes, the nannies' children."""
        found = []
        for nanny in self.workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(nanny.pid).children()
                found += [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        return found

    def stop(self) -> None:
        for process in [*self.workers, self.scheduler]:
            if process is not None:
                family = _family(process.pid)
                for each in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                process.wait()
        self.workers, self.scheduler = [], None


def _dask(words: list[str], log: Any) -> subprocess.Popen[bytes]:
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    return []


class Disturbed:
    """One run, disturbed by `rng`'s choice (None: left in peace) until it is done."""

    def __init__(self, options: argparse.Namespace, cluster: Cluster, run: Path, rng: random.Random | None) -> None:
        self.cluster, self.run, self.rng, self.options = cluster, run, rng, options
        self.command = [
            sys.executable, "-m", "tilestream", "run", options.pipeline, "--out", str(run),
            "--store", str(options.store), "--models", str(options.models), "--memory", options.memory,
            "--scheduler", cluster.address, "--workers", "1", "--resume",
            *(word for setting in options.set for word in ("--set", setting)),
        ]  # fmt: skip
        self.kills: Counter[str] = Counter()
        self.finished: dict[str, int] = {}
        self.statuses: list[int] = []
        self.last_restart = 0

    def finish(self) -> dict[str, Any]:
        """Runs until the driver leaves with 0."""
        started = time.monotonic()
        actions = self.actions()
        driver = self.drive()
        while driver.poll() is None or driver.returncode != 0:
            if time.monotonic() - started > LIMIT_S:
                raise TimeoutError(f"not done in {LIMIT_S:g} s; see {self.run}.log")
            if driver.poll() is not None:
                self.restarted(driver)
                driver = self.drive()
            if self.rng is None:
                time.sleep(0.2)
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(self.rng.expovariate(1 / self.options.every))
                continue
            known, name = self.work_done(), self.rng.choice(sorted(actions))
            if not name.startswith(("worker", "nanny")):
                if known == self.last_restart:  # what never gets to work never ends
                    continue
                self.last_restart = known
            if driver.poll() is None and actions[name](driver):
                self.kills[name] += 1
        again = [id for id, when in self.finished.items() if _mtime(self.run, id) != when]
        if again:
            sys.exit(f"{self.run}: done again though it was finished: {again}")
        count = sum(self.kills.values())
        if self.rng is not None and count < self.options.kills:
            sys.exit(f"{self.run}: only {count} kills before it was done; give more photographs, or a smaller --every")
        return {
            "run": self.run.name, "seconds": round(time.monotonic() - started, 1),
            "kills": count, "by": dict(self.kills),
            "drivers": 1 + len(self.statuses), "statuses": self.statuses, "digests": digests(self.run),
        }  # fmt: skip

    def work_done(self) -> int:
        """Lines of all journals of unfinished work, and stages finished, as one number that changes with either."""
        journals = (self.run / "journal").glob("*.partial-*/*.jsonl")
        stages = len(list((self.run / "journal").glob("*.json")))
        with contextlib.suppress(FileNotFoundError):
            return 10**6 * stages + sum(path.read_bytes().count(b"\n") for path in journals)
        return self.last_restart

    def drive(self) -> subprocess.Popen[bytes]:
        with Path(f"{self.run}.log").open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def restarted(self, driver: subprocess.Popen[bytes]) -> None:
        """What was finished must stay so; a run that failed of itself is a failure of the test."""
        self.statuses.append(driver.returncode)
        if driver.returncode not in (-signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM, 130, 143, 2):
            sys.exit(f"{self.run}: the driver left with status {driver.returncode}; see {self.run}.log")
        for journal in (self.run / "journal").glob("saliency.partial-*/centres.jsonl"):
            for line in journal.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    self.finished.setdefault(json.loads(line)["id"], _mtime(self.run, json.loads(line)["id"]))

    def actions(self) -> dict[str, Callable[[subprocess.Popen[bytes]], bool]]:
        """By name what is done to the cluster or the driver; each says whether there was something to do it to."""
        return {
            "worker SIGKILL": lambda driver: self.hit(signal.SIGKILL),
            "worker SIGTERM": lambda driver: self.hit(signal.SIGTERM),
            "worker SIGSTOP": lambda driver: self.pause(),
            "nanny SIGKILL": lambda driver: self.replace(signal.SIGKILL),
            "nanny SIGTERM": lambda driver: self.replace(signal.SIGTERM),
            "driver SIGKILL": lambda driver: self.end(driver, signal.SIGKILL),
            "driver SIGINT": lambda driver: self.end(driver, signal.SIGINT),
            "driver SIGTERM": lambda driver: self.end(driver, signal.SIGTERM),
            "scheduler SIGKILL": self.lose_scheduler,
        }

    def choose(self, among: list[Any]) -> Any:
        assert self.rng
        return self.rng.choice(among) if among else None

    def hit(self, number: int) -> bool:
        worker = self.choose(self.cluster.processes())
        if worker is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(number)
        return True

    def pause(self) -> bool:
        assert self.rng
        worker = self.choose(self.cluster.processes())
        if worker is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.suspend()
            time.sleep(self.rng.uniform(0.5, 3))
            worker.resume()
        return True

    def replace(self, number: int) -> bool:
        """A nanny goes, with its worker, and another comes."""
        nanny = self.choose(self.cluster.workers)
        nanny.send_signal(number)
        nanny.wait(60)
        self.cluster.workers.remove(nanny)
        self.cluster.start_worker()
        return True

    def end(self, driver: subprocess.Popen[bytes], number: int) -> bool:
        """A driver that is told to stop does so in time, with the status that says so."""
        lock = self.run / "journal" / "lock"
        starting = (
            not lock.exists() or f"process {driver.pid} on" not in lock.read_text()
        )  # Python itself may be loading
        driver.send_signal(number)
        driver.wait(STOP_S)
        expected = -number if starting or number == signal.SIGKILL else 128 + number
        if driver.returncode not in (expected, 128 + number, 0):
            sys.exit(f"{self.run}: status {driver.returncode} after signal {number}; see {self.run}.log")
        return True

    def lose_scheduler(self, driver: subprocess.Popen[bytes]) -> bool:
        self.cluster.stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(STOP_S)
        self.cluster.start()
        return True


def _mtime(run: Path, id: str) -> int:
    return (run / "overviews" / f"{id}.npy").stat().st_mtime_ns


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of what the run has made, crops as pixels."""
    found = {name: _sha(run / name) for name in TABLES if (run / name).exists()}
    pixels = zarr.open_array(run / "crops.zarr" / "image", mode="r")
    hashes = hashlib.sha256()
    for crop in _crops(pixels):
        hashes.update(crop)
    maps = hashlib.sha256("".join(_sha(path) for path in sorted((run / "overviews").iterdir())).encode()).hexdigest()
    return {**found, "crops": hashes.hexdigest(), "overviews": maps}


def _crops(pixels: Any) -> Iterator[bytes]:
    for index in range(pixels.shape[0]):
        yield pixels[index].tobytes()


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
