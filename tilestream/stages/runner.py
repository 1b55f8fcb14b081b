"""Runs one stage: skips it when nothing changed, keeps unfinished work for --resume, records time and memory."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch

from .base import Context, Stage, StageConfig, digest, holder, write_json

_KEPT_S = 2.0
"""Seconds from one record of a stage's time to the next."""


class Journal:
    """Finished items of a stage, a JSON line each, synced; what a kill tore off is left out when it is read."""

    def __init__(self, path: Path) -> None:
        self.path, self._whole = path, False
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, dict[str, Any]]:
        """The records by id."""
        records: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    record = json.loads(line)
                    records[record["id"]] = record
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record, on disk before this returns; half a line that a kill left is cut off first."""
        if not self._whole:
            data = self.path.read_bytes() if self.path.exists() else b""
            if data and not data.endswith(b"\n"):
                os.truncate(self.path, data.rfind(b"\n") + 1)
            self._whole = True
        with self.path.open("ab") as file:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


class Meter:
    """Wall time of a stage, and the peak resident memory of this process and of its largest local worker.

    It is kept in `path` every few seconds, and what that holds of a killed beginning of the stage counts, too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Meter:
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.driver_bytes, self.worker_bytes = (before.get(f"peak_{of}_bytes", 0) for of in ("driver", "worker"))
        self._process, self._done = psutil.Process(), threading.Event()
        self._started_s = time.monotonic() - before.get("wall_s", 0.0)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        kept_s, ended = time.monotonic(), False
        while not ended:
            self.driver_bytes = max(self.driver_bytes, self._process.memory_info().rss)
            for size in self._children():
                self.worker_bytes = max(self.worker_bytes, size)
            ended = self._done.wait(0.1)
            now_s = time.monotonic()
            self.wall_s = now_s - self._started_s
            if ended or now_s - kept_s >= _KEPT_S:
                kept_s = now_s
                write_json(self.path, self.record())

    def _children(self) -> Iterator[int]:
        for child in self._process.children(recursive=True):
            try:
                yield child.memory_info().rss
            except psutil.NoSuchProcess:
                continue

    def record(self) -> dict[str, Any]:
        """What timings.json holds for a stage."""
        return {
            "wall_s": round(self.wall_s, 3),
            "peak_bytes": max(self.driver_bytes, self.worker_bytes),
            "peak_driver_bytes": self.driver_bytes,
            "peak_worker_bytes": self.worker_bytes,
        }


def execute(name: str, stage: Stage, config: StageConfig, context: Context, held: ExitStack | None = None) -> bool:
    """Runs a stage under `name`; False when it was skipped: configuration and inputs are those of its last run.

    Unfinished work of a killed run with the same configuration and inputs is continued if `context.resume`, else
    removed. The run's folder is held while the stage runs, or until `held` is closed.
    """
    context.name = name
    mark = fingerprint(stage, config, context)
    record_path = context.run / "journal" / f"{name}.json"
    if _unchanged(record_path, mark, {os.path.relpath(p, context.run) for p in stage.writes(config, context)}, context):
        context.say(f"{name}: unchanged, skipped")
        return False
    with ExitStack() as own:
        (held or own).enter_context(locked(context))
        _claim(stage, config, context)
        context.say(f"{name}: {stage.verb}")
        with Meter(context.partial_path / "timing.json") as meter:
            stage.run(config, context)
        _record(record_path, mark, stage, config, context)
        shutil.rmtree(context.partial_path)
        _record_time(context.run / "timings.json", name, meter.record())
    peaks = f"driver {meter.driver_bytes / 2**20:.0f} MiB"
    if meter.worker_bytes:
        peaks += f", largest worker {meter.worker_bytes / 2**20:.0f} MiB"
    context.say(f"{name}: done in {meter.wall_s:.1f} s, peak memory {peaks}")
    return True


def _claim(stage: Stage, config: StageConfig, context: Context) -> None:
    """Makes the folder for unfinished work, or takes a killed run's."""
    mark = fingerprint(stage, config, context, stage.may_grow)
    for partial in (context.run / "journal").glob(f"{glob.escape(context.name)}.partial-*"):
        claim = partial / "fingerprint"
        if context.resume and claim.exists() and claim.read_text() == mark:
            context.attempt = partial.name.rpartition("-")[2]
            return
        why = "inputs or configuration changed" if context.resume else "--resume was not given"
        context.say(f"{context.name}: unfinished work of an earlier run is removed: {why}")
        shutil.rmtree(partial)
    context.attempt = uuid.uuid4().hex[:8]
    context.partial_path.mkdir(parents=True)
    (context.partial_path / "fingerprint").write_text(mark)


@contextmanager
def locked(context: Context) -> Iterator[None]:
    """Keeps a second process out of a run's folder; ValueError names the holder. A holder that dies lets go."""
    if context.holding:
        yield
        return
    run = context.run
    (run / "journal").mkdir(parents=True, exist_ok=True)
    with (run / "journal" / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run {str(run)!r} is in use by {file.read()}; wait for it or give another folder"
            ) from None
        file.truncate(0)
        file.write(f"{holder()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        context.holding = True
        try:
            yield
        finally:
            context.holding = False


def _record(path: Path, mark: str, stage: Stage, config: StageConfig, context: Context) -> None:
    versions = {"torch": torch.__version__, "numpy": numpy.__version__, "threads": context.cluster.threads}
    outputs = {os.path.relpath(p, context.run): digest(p) for p in stage.writes(config, context)}
    settings = config.model_dump(mode="json")
    write_json(
        path,
        {"fingerprint": mark, "stage": stage.verb, "config": settings, "outputs": outputs, "versions": versions},
    )


def fingerprint(stage: Stage, config: StageConfig, context: Context, leave_out: frozenset[str] = frozenset()) -> str:
    """A hash of what the stage's result depends on: settings, versions, the files it reads, the store's photographs."""
    parts: dict[str, Any] = {
        "verb": stage.verb,
        "versions": [version("tilestream"), torch.__version__],
        "config": config.model_dump(mode="json", exclude=set(stage.operational | leave_out)),
        "reads": {_name(path, context): digest(path) for path in stage.reads(config, context)},
    }
    if stage.uses_store:
        samples = context.store.samples()
        parts["store"] = hashlib.sha256(samples.to_csv(index=False).encode()).hexdigest()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _name(path: Path, context: Context) -> str:
    """A file as fingerprints name it: by its place in the run, or by name alone, so that folders may move."""
    return str(path.relative_to(context.run)) if path.is_relative_to(context.run) else path.name


def _unchanged(record_path: Path, mark: str, outputs: set[str], context: Context) -> bool:
    """Whether the last run made the same from the same, in the same places (another store is another place)."""
    if not record_path.exists():
        return False
    record = json.loads(record_path.read_text())
    return (
        record["fingerprint"] == mark
        and record["outputs"].keys() == outputs
        and all(digest(context.run / path) == value for path, value in record["outputs"].items())
    )


def _record_time(path: Path, name: str, record: dict[str, Any]) -> None:
    timings = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**timings, name: record})
