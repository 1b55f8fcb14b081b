"""Run jobs with a bounded window of them in flight, on a cluster or in this process."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol

from dask.delayed import Delayed
from dask.system import CPU_COUNT
from distributed import Client, KilledWorker, get_worker
from distributed.comm import CommClosedError

from .progress import TOPIC, Progress
from .reduction import Reduction, graph

_STRIKES = 3
_POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """One image's work: a name for messages, its reduction, its size in megapixels, its tiles (default: its parts)."""

    name: str
    reduction: Reduction
    size: float = 0.0
    tiles: int | None = None

    @property
    def n_parts(self) -> int:
        """The tiles that are computed."""
        return self.reduction.n_parts if self.tiles is None else self.tiles

    @classmethod
    def call(cls, name: str, function: Callable[..., Any], *args: Any, size: float = 0.0) -> Job:
        """A job of one task, whose result is function(*args)."""
        one = Reduction((args,), partial(_call, function), {0: (0,)}, _only_piece, _only_value)
        return cls(name, one, size)


class Poison(RuntimeError):
    """A job that ends or blocks worker processes when nothing else runs: the cause is its image, or its network."""


class _StalledError(Exception):
    """Nothing of the job has been done for too long."""


def run(
    jobs: Iterable[Job],
    *,
    client: Client | None = None,
    scheduler: Literal["synchronous", "threads"] | None = None,
    window: int,
    on_result: Callable[[Job, Any], None],
    on_error: Callable[[Job, Exception], None] | None = None,
    progress: Progress | None = None,
    resources: Mapping[str, float] | None = None,
    stall_s: float = 600.0,
) -> None:
    """Run every job, at most `window` of them in flight, on a client's cluster or on a scheduler of this process.

    Jobs are drawn from the iterable when there is room, so their graphs never exist all at once, and results are let
    go after `on_result`, which is called in this thread in order of completion (earlier jobs have priority, no more).
    A job that raises goes to `on_error` and the rest goes on; without `on_error` its exception is raised. Whatever ends
    the run early, Ctrl-C too, cancels what is in flight; what had been done by then still goes to `on_result`.

    On a cluster every task takes `resources` of its worker. The death of a worker strikes all whose tasks it held, so a
    job that has lost too many (Dask's `allowed-failures`) is put aside and tried again, twice, when nothing else is in
    flight: if workers still die, it is `Poison`. A job whose result comes has the same one however often it was tried,
    since pieces are combined in order of part. When nothing at all is done for `stall_s` seconds, workers that hold
    our tasks are restarted and their jobs put aside in the same way.

    Raises ValueError unless exactly one of `client` and `scheduler` is given and `window` >= 1, ConnectionError when
    the scheduler is lost, or when for `stall_s` there is no worker that could take the tasks.
    """
    if (client is None) == (scheduler is None):
        raise ValueError(f"client={client}, scheduler={scheduler}: give one of them")
    if window < 1:
        raise ValueError(f"window={window} must be at least 1")
    backend: _Backend
    if client is not None:
        backend = _Cluster(client, progress, resources, stall_s)
    else:
        backend = _Threads(window, progress) if scheduler == "threads" else _Synchronous(progress)
    flights: dict[str, _Flight] = {}
    suspects: deque[_Flight] = deque()
    source = enumerate(jobs)

    def submit(flight: _Flight) -> None:
        token = f"{flight.job.name}-{uuid.uuid4().hex}"  # unique: Dask takes equal keys for equal work
        flights[token] = flight
        if progress is not None:
            progress.start(token, flight.job.n_parts)
        backend.submit(token, flight)

    def settle(token: str, outcome: Callable[[], Any]) -> None:
        flight = flights.pop(token)
        failed = False
        try:
            result = outcome()
        except CommClosedError:
            raise ConnectionError("the scheduler is gone; see its log, then run again") from None
        except Exception as error:
            if isinstance(error, KilledWorker | _StalledError):
                strikes = flight.strikes + 1
                if strikes < _STRIKES:
                    suspects.append(replace(flight, strikes=strikes))
                    if progress is not None:
                        progress.drop(token)
                    return
                error = Poison(_reason(error))
            if on_error is None:
                error.add_note(f"in job {flight.job.name!r}")
                raise error from None
            on_error(flight.job, error)
            failed = True
        else:
            on_result(flight.job, result)
        if progress is not None:
            progress.finish(token, flight.job.size, failed=failed)

    try:
        while True:
            while len(flights) < window and (drawn := next(source, None)) is not None:
                submit(_Flight(*drawn))
            if not flights and suspects:
                submit(suspects.popleft())  # alone, so that a death is its own
            if not flights:
                return
            settle(*backend.next())
    except KeyboardInterrupt:
        for token, outcome in backend.done():
            settle(token, outcome)
        raise
    finally:
        if progress is not None:
            for token in flights:
                progress.drop(token)
        backend.close()


def _reason(error: Exception) -> str:
    if isinstance(error, KilledWorker):
        return (
            f"its tasks ended {error.allowed_failures + 1} worker processes in a row while nothing else ran; see the "
            f"log of the last, {error.last_worker.address}, for the cause (a crash, or its limit of memory)"
        )
    return f"{error} while nothing else ran"


@dataclass(frozen=True)
class _Flight:
    serial: int
    job: Job
    strikes: int = 0


Ended = tuple[str, Callable[[], Any]]
"""A job that has ended: its token, and a call that returns its result or raises."""


class _Backend(Protocol):
    def submit(self, token: str, flight: _Flight) -> None: ...

    def next(self) -> Ended:
        """Waits for a job to end."""

    def done(self) -> list[Ended]:
        """Jobs that have ended already."""

    def close(self) -> None:
        """Cancels what is in flight."""


class _Cluster:
    def __init__(
        self, client: Client, progress: Progress | None, resources: Mapping[str, float] | None, stall_s: float
    ) -> None:
        self.client, self.progress, self.resources, self.stall_s = client, progress, resources, stall_s
        self.futures: dict[str, Any] = {}  # by token
        self.ended: SimpleQueue[Any] = SimpleQueue()
        self.stalled: list[Ended] = []
        self.moved_s = time.monotonic()
        client.subscribe_topic(TOPIC, self._heard)

    def _heard(self, event: tuple[float, Any]) -> None:
        message = event[1]
        if message.get("action") == "tick" and message["token"] in self.futures:
            self.moved_s = time.monotonic()
            if self.progress is not None:
                self.progress.tick(message["token"])

    def submit(self, token: str, flight: _Flight) -> None:
        each = flight.job.size / flight.job.n_parts
        lazy = graph(flight.job.reduction, token, partial(_log_tile, token, each))
        future = self.client.get(
            lazy.dask, lazy.key, sync=False, priority=-flight.serial, resources=self.resources or None
        )
        self.futures[token] = future
        future.add_done_callback(lambda future: self.ended.put((token, future)))

    def next(self) -> Ended:
        while True:
            if self.stalled:
                return self.stalled.pop()
            if self.progress is not None:
                self.progress.publish(self.client)
            try:
                token, future = self.ended.get(timeout=_POLL_S)
            except Empty:
                self._watch()
                continue
            if (mine := self.futures.get(token)) is None or mine is not future:
                continue  # it was put aside
            del self.futures[token]
            self.moved_s = time.monotonic()
            if future.cancelled():
                raise ConnectionError("the scheduler is gone or has cancelled our tasks; see its log, then run again")
            return token, partial(_take, future, self.stall_s)

    def done(self) -> list[Ended]:
        found: list[Ended] = []
        while not self.ended.empty():
            token, future = self.ended.get()
            if self.futures.pop(token, None) is future and future.status == "finished":
                found.append((token, partial(_take, future)))
        return found

    def _watch(self) -> None:
        """When nothing has moved for too long: no worker is left, or those that hold our tasks hang."""
        if self.client.status != "running":
            raise ConnectionError("the scheduler is gone; see its log, then run again")
        if time.monotonic() - self.moved_s < self.stall_s:
            return
        holding: dict[str, list[str]] = {}  # ours alone: others may use the cluster, too
        for worker, keys in self.client.processing().items():
            if mine := [str(key) for key in keys if any(_in_key(token, key) for token in self.futures)]:
                holding[worker] = mine
        if not holding:
            needs = f" with the resources {dict(self.resources)}" if self.resources else ""
            raise ConnectionError(
                f"for {self.stall_s:g} s no worker{needs} has been there to take the tasks; start some, then run again"
            )
        held = [key for keys in holding.values() for key in keys]
        stuck = [token for token in self.futures if any(_in_key(token, key) for key in held)]
        self.client.cancel([self.futures.pop(token) for token in stuck])  # first: or they would go to the new workers
        with suppress(ValueError):  # a worker without a nanny cannot be restarted, only left alone
            self.client.restart_workers(list(holding), timeout=30, raise_for_error=False)
        for token in stuck:
            where = ", ".join(worker for worker, keys in holding.items() if any(_in_key(token, key) for key in keys))
            self.stalled.append((token, partial(_stall, f"nothing was done on {where} for {self.stall_s:g} s")))
        self.moved_s = time.monotonic()

    def close(self) -> None:
        if self.client.status == "running":
            if self.futures:
                self.client.cancel(list(self.futures.values()))
            self.client.unsubscribe_topic(TOPIC)
            if self.progress is not None:
                self.progress.publish(self.client, ended=True)


class _Synchronous:
    """One job after another in this thread, where a debugger can follow."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.waiting: deque[tuple[str, Delayed]] = deque()

    def submit(self, token: str, flight: _Flight) -> None:
        self.waiting.append((token, graph(flight.job.reduction, token, _local_tick(self.progress, token))))

    def next(self) -> Ended:
        token, lazy = self.waiting.popleft()
        return token, partial(lazy.compute, scheduler="synchronous")

    def done(self) -> list[Ended]:
        return []

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

    def next(self) -> Ended:
        done, _ = wait(self.tokens, return_when=FIRST_COMPLETED)
        future = done.pop()
        return self.tokens.pop(future), future.result

    def done(self) -> list[Ended]:
        ended = [future for future in self.tokens if future.done() and not future.exception()]
        return [(self.tokens.pop(future), future.result) for future in ended]

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)  # ends the driving threads early, too
        self.drivers.shutdown(wait=True, cancel_futures=True)


def _local_tick(progress: Progress | None, token: str) -> Callable[[], None] | None:
    return None if progress is None else partial(progress.tick, token)


def _in_key(token: str, key: Any) -> bool:
    """Whether a task's key is of a job's graph: by the random end of the token, for names may be written otherwise."""
    return token.rpartition("-")[2] in str(key)


def _take(future: Any, limit_s: float | None = None) -> Any:
    try:
        return future.result(limit_s)
    except TimeoutError:  # it was lost with its workers, and nobody computes it again
        raise _StalledError(f"its result could not be fetched for {limit_s:g} s") from None
    finally:
        future.release()  # at once: a failure's traceback would keep it, and all its tasks on the cluster, alive


def _stall(reason: str) -> Any:
    raise _StalledError(reason)


def _log_tile(token: str, megapixels: float) -> None:
    get_worker().log_event(TOPIC, {"action": "tick", "token": token, "megapixels": megapixels})


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[int, Any]:
    return {0: function(*arguments)}


def _only_piece(destination: int, pieces: list[Any]) -> Any:
    return pieces[0]


def _only_value(values: list[Any]) -> Any:
    return values[0]
