"""Who works on a store: one `ingest` or `gc` at a time. Whoever dies loses the lease in a minute, or at once here."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

from tilestream.store.files import Files
from tilestream.store.layout import to_json

BEAT_S, EXPIRES_S = 10.0, 60.0
FOLDER = "leases"
_FIELDS = {"work", "host", "pid", "born", "beat"}


@contextlib.contextmanager
def lease(files: Files, work: str) -> Iterator[None]:
    """Holds the store for `work`. Raises ValueError that names the holder when somebody else does.

    Leases are numbered files; the next number is made exclusively once all others are released or expired.
    """
    number = 1 + max([0, *(int(name) for name in _names(files))])
    holder = {"work": work, "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
    own = f"{number:06d}"
    if not files.create(f"{FOLDER}/{own}.json", to_json({**holder, "beat": time.time()})):
        _refuse(files, work, own="")
        raise ValueError(f"{files.location}: somebody else has just begun to work on this store; try again")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the next beat may come through
                if _read(files, own) is not None:  # or it was taken for dead, and somebody else holds the store
                    files.write(f"{FOLDER}/{own}.json", to_json({**holder, "beat": time.time()}))

    thread = threading.Thread(target=beat, daemon=True)
    try:
        _refuse(files, work, own)  # whoever else came at the same moment
        thread.start()
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()
        for name in [*_dead(files), own]:
            files.remove(f"{FOLDER}/{name}.json")


def _names(files: Files) -> list[str]:
    names = (entry.name.removesuffix(".json") for entry in files.entries(FOLDER))
    return sorted(name for name in names if name.isdigit())


def _read(files: Files, name: str) -> dict[str, Any] | None:
    try:
        found = json.loads(files.read(f"{FOLDER}/{name}.json"))
    except (FileNotFoundError, ValueError):  # gone, or never finished
        return None
    return found if isinstance(found, dict) and found.keys() >= _FIELDS else None


def _alive(holder: dict[str, Any]) -> bool:
    if holder["host"] == socket.gethostname() and _born(holder["pid"]) != holder["born"]:
        return False
    return time.time() - float(holder["beat"]) < EXPIRES_S


def _born(pid: int) -> float | None:
    """When a process was started, in a unit of its own that setting the clock does not move."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return float(file.read().rpartition(")")[2].split()[19])
    except OSError:
        pass
    try:
        return round(psutil.Process(pid).create_time(), 1)
    except psutil.Error:
        return None


def _dead(files: Files) -> list[str]:
    return [name for name in _names(files) if (holder := _read(files, name)) and not _alive(holder)]


def _refuse(files: Files, work: str, own: str) -> None:
    for name in _names(files):
        holder = _read(files, name)
        if name != own and holder and _alive(holder):
            who = f"'{holder['work']}' (process {holder['pid']} on {holder['host']})"
            raise ValueError(f"{files.location}: {who} is at work on this store; '{work}' has to wait until it is done")
