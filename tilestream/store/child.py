"""Ingest in a process that may die alone: decoders are old C code, and photographs come from anywhere.

The process lives as long as its worker and takes one photograph after the other. It has a limit of memory; a
photograph that takes too long, or that kills it twice, goes to the quarantine with that reason.
"""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import IO, Any

from tilestream.store import layout
from tilestream.store.ingest import Settings, ingest_photograph, quarantine
from tilestream.store.sources import Source


@dataclass(frozen=True)
class Limits:
    """Of one photograph: seconds, bytes that the process may allocate, a tenth of the px a side that libvips takes."""

    seconds: float = 600
    memory: int = 4 * 2**30
    side_px: int = 100_000


_children = threading.local()


def ingest_guarded(store: str, source: Source, settings: Settings, limits: Limits) -> dict[str, Any]:
    """`ingest_photograph` in this thread's child process. Raises what it raises."""
    found: tuple[Limits, Child] | None = getattr(_children, "one", None)
    if found is None or found[0] != limits:
        if found:
            found[1].end()
        _children.one = found = limits, Child(limits)
    files, why = layout.open_store(store), ("", "")
    for _ in range(2):  # what killed the process once may have been somebody else
        try:
            result = found[1].call((store, source, settings))
        except TimeoutError:
            why = "too_slow", f"not done in {limits.seconds:g} s; --time-limit raises it"
            break
        except EOFError as died:
            limit = f"the limit of memory is {limits.memory / 2**20:.0f} MiB, --memory-limit raises it"
            why = "decoder_died", f"its process {died}; {limit}"
            continue
        if isinstance(result, MemoryError):
            why = "too_much_memory", f"more than {limits.memory / 2**20:.0f} MiB; --memory-limit raises it"
            break
        if isinstance(result, BaseException):
            raise result
        return result  # type: ignore[no-any-return]
    return quarantine(files, source, *why)


class Child:
    """The process, started when it is first needed and again after it died."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.process: subprocess.Popen[bytes] | None = None

    def call(self, job: tuple[str, Source, Settings]) -> Any:
        """What `ingest_photograph` returned or raised. Raises TimeoutError, and EOFError when the process died."""
        process = self.process or self._start()
        assert process.stdin
        assert process.stdout
        try:
            _send(process.stdin, job)
            if not select.select([process.stdout], [], [], self.limits.seconds)[0]:
                raise TimeoutError
            return _receive(process.stdout)
        except TimeoutError:
            self.end()
            raise
        except (EOFError, BrokenPipeError):
            code = process.wait()
            self.end()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with status {code}"
            raise EOFError(how) from None
        except BaseException:  # Ctrl-C: an answer that nobody has read must not be taken for the next one's
            self.end()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        words = {
            "VIPS_MAX_COORD": 10 * self.limits.side_px,
            "VIPS_CONCURRENCY": 1,
            "MALLOC_ARENA_MAX": 1,
        }
        environment = {**os.environ, **{name: str(value) for name, value in words.items()}}
        command = [sys.executable, "-c", f"import {__name__} as child; child.serve({self.limits.memory})"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        return self.process

    def end(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe:
                    pipe.close()
        self.process = None

    def __del__(self) -> None:
        self.end()


def serve(memory: int) -> None:
    """The child's side: jobs from standard input, results to standard output, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    jobs, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no result
    resource.setrlimit(resource.RLIMIT_DATA, (memory + _data_bytes(), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            job = _receive(jobs)
        except EOFError:
            return
        try:
            result: Any = ingest_photograph(*job)
        except Exception as error:
            result = error
        _send(results, result)


def _data_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def _send(pipe: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    head = pipe.read(8)
    data = pipe.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else b""
    if len(head) < 8 or not data:
        raise EOFError
    return pickle.loads(data)
