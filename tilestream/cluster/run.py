"""Run jobs with a bounded window of them in flight, on a cluster or in this process."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

from dask.delayed import Delayed
from dask.system import CPU_COUNT
from distributed import Client, KilledWorker, as_completed, get_worker

from .progress import Progress
from .reduction import Reduction, graph

TOPIC = "tilestream-progress"
_STRIKES = 3


@dataclass(frozen=True)
class Job:
    """One image's work: a name for messages, its reduction, its size in megapixels."""

    name: str
    reduction: Reduction
    size: float = 0.0

    @property
    def n_parts(self) -> int:
        """The tile tasks that it takes."""
        return self.reduction.n_parts

    @classmethod
    def call(cls, name: str, function: Callable[..., Any], *args: Any, size: float = 0.0) -> Job:
        """A job of one task, whose result is function(*args)."""
        one = Reduction((args,), partial(_call, function), {0: (0,)}, _only_piece, _only_value)
        return cls(name, one, size)


def run(
    jobs: Iterable[Job],
    *,
    client: Client | None = None,
    scheduler: Literal["synchronous", "threads"] | None = None,
    window: int,
    on_result: Callable[[Job, Any], None],
    on_error: Callable[[Job, Exception], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Run every job, at most `window` of them in flight, on a client's cluster or on a scheduler of this process.

    Jobs are drawn from the iterable when there is room, so their graphs never exist all at once, and results are let
    go after `on_result`, which is called in this thread in order of completion (earlier jobs have priority, no more).
    A job that raises goes to `on_error` and the rest goes on; without `on_error` its exception is raised. A job
    whose workers die (memory, a crash) is submitted again three times before it counts as failed: its result is the
    same, since pieces are combined in order of part. Whatever ends the run early, Ctrl-C too,
    cancels what is in flight.

    Raises ValueError unless exactly one of `client` and `scheduler` is given and `window` >= 1, ConnectionError when
    the scheduler is lost.
    """
    if (client is None) == (scheduler is None):
        raise ValueError(f"client={client}, scheduler={scheduler}: give one of them")
    if window < 1:
        raise ValueError(f"window={window} must be at least 1")
    backend: _Backend
    if client is not None:
        backend = _Cluster(client, progress)
    else:
        backend = _Threads(window, progress) if scheduler == "threads" else _Synchronous(progress)
    flights: dict[str, _Flight] = {}
    source = enumerate(jobs)

    def submit(flight: _Flight) -> None:
        token = f"{flight.job.name}-{uuid.uuid4().hex}"  # unique: Dask takes equal keys for equal work
        flights[token] = flight
        if progress is not None:
            progress.start(token, flight.job.n_parts)
        backend.submit(token, flight)

    def settle(token: str, outcome: Callable[[], Any]) -> None:
        flight = flights.pop(token)
        try:
            result = outcome()
        except Exception as error:
            if isinstance(error, KilledWorker) and flight.strikes < _STRIKES:
                if progress is not None:
                    progress.drop(token)
                submit(replace(flight, strikes=flight.strikes + 1))
                return
            if on_error is None:
                error.add_note(f"in job {flight.job.name!r}")
                raise
            on_error(flight.job, error)
            failed = True
        else:
            on_result(flight.job, result)
            failed = False
        if progress is not None:
            progress.finish(token, flight.job.size, failed=failed)

    try:
        while True:
            while len(flights) < window and (drawn := next(source, None)) is not None:
                submit(_Flight(*drawn))
            if not flights:
                return
            settle(*backend.next())
    finally:
        if progress is not None:
            for token in flights:
                progress.drop(token)
        backend.close()


@dataclass(frozen=True)
class _Flight:
    serial: int
    job: Job
    strikes: int = 0


class _Backend(Protocol):
    def submit(self, token: str, flight: _Flight) -> None: ...

    def next(self) -> tuple[str, Callable[[], Any]]:
        """Waits for a job to end: its token, and a call that returns its result or raises."""

    def close(self) -> None:
        """Cancels what is in flight."""


class _Cluster:
    def __init__(self, client: Client, progress: Progress | None) -> None:
        self.client, self.progress = client, progress
        self.tokens: dict[str, tuple[str, Any]] = {}  # key -> token, future
        self.completed = as_completed(loop=client.loop)
        if progress is not None:
            client.subscribe_topic(TOPIC, lambda event: progress.tick(event[1]))

    def submit(self, token: str, flight: _Flight) -> None:
        tick = None if self.progress is None else partial(_log_tile, token)
        lazy = graph(flight.job.reduction, token, tick)
        future = self.client.get(lazy.dask, lazy.key, sync=False, priority=-flight.serial)
        self.tokens[future.key] = token, future
        self.completed.add(future)

    def next(self) -> tuple[str, Callable[[], Any]]:
        future = next(self.completed)
        token, _ = self.tokens.pop(future.key)
        if future.cancelled():
            raise ConnectionError("the scheduler is gone or has cancelled our tasks; see its log, then run again")
        return token, partial(_take, future)

    def close(self) -> None:
        futures = [future for _, future in self.tokens.values()]
        self.completed.clear()
        if self.client.status == "running":
            if futures:
                self.client.cancel(futures)
            if self.progress is not None:
                self.client.unsubscribe_topic(TOPIC)


class _Synchronous:
    """One job after another in this thread, where a debugger can follow."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.waiting: deque[tuple[str, Delayed]] = deque()

    def submit(self, token: str, flight: _Flight) -> None:
        self.waiting.append((token, graph(flight.job.reduction, token, _local_tick(self.progress, token))))

    def next(self) -> tuple[str, Callable[[], Any]]:
        token, lazy = self.waiting.popleft()
        return token, partial(lazy.compute, scheduler="synchronous")

    def close(self) -> None:
        self.waiting.clear()


class _Threads:
    """Dask's threaded scheduler: a thread drives each job in flight, the tiles of all share one pool."""

    def __init__(self, window: int, progress: Progress | None) -> None:
        self.progress = progress
        self.drivers = ThreadPoolExecutor(window, "tilestream-job")
        self.pool = ThreadPoolExecutor(CPU_COUNT, "tilestream-tile")
        self.tokens: dict[Future[Any], str] = {}

    def submit(self, token: str, flight: _Flight) -> None:
        lazy = graph(flight.job.reduction, token, _local_tick(self.progress, token))
        self.tokens[self.drivers.submit(lazy.compute, scheduler="threads", pool=self.pool)] = token

    def next(self) -> tuple[str, Callable[[], Any]]:
        done, _ = wait(self.tokens, return_when=FIRST_COMPLETED)
        future = done.pop()
        return self.tokens.pop(future), future.result

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)  # ends the driving threads early, too
        self.drivers.shutdown(wait=True, cancel_futures=True)


def _local_tick(progress: Progress | None, token: str) -> Callable[[], None] | None:
    return None if progress is None else partial(progress.tick, token)


def _take(future: Any) -> Any:
    try:
        return future.result()
    finally:
        future.release()  # at once: a failure's traceback would keep it, and all its tasks on the cluster, alive


def _log_tile(token: str) -> None:
    get_worker().log_event(TOPIC, token)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[int, Any]:
    return {0: function(*arguments)}


def _only_piece(destination: int, pieces: list[Any]) -> Any:
    return pieces[0]


def _only_value(values: list[Any]) -> Any:
    return values[0]
