"""Ranks: tasks that run at the same time, one on each of several workers, and talk to each other."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from distributed import Client, Future, KilledWorker, Worker, get_worker

from .connect import said_lost
from .security import is_loopback

_POLL_S = 0.5
_SETTLE_S = 5.0
_ANSWER_S = 5.0
_RESULT_S = 30.0
_ENDED = object()


@dataclass(frozen=True)
class Rank:
    """What a rank is told: its number of `count`, the host that its own worker listens on, where rank 0 listens."""

    number: int
    count: int
    host: str
    address: tuple[str, int]
    """Host and a free port of rank 0's worker."""
    worker: str
    worker_id: str
    topic: str

    def wanted(self) -> bool:
        """Whether anybody waits for this rank; one that nobody waits for has to end by itself. For the task's thread.

        It is no longer wanted when another rank is lost, and when the driver is stopped or gone.
        """
        worker = get_worker()
        task = worker.state.tasks.get(worker.get_current_task())
        return task is not None and task.state == "executing"

    def tell(self, message: Any) -> None:
        """Sends the driver a message, for its `on_message`."""
        get_worker().log_event(self.topic, {"rank": self.number, "message": message})


class RankLost(RuntimeError):
    """A rank ended with its worker, or was silent for too long: the work may be begun again."""


class _RestartedError(Exception):
    """The worker is a new one under the old address."""


def run_ranks(
    client: Client,
    function: Callable[[Rank], Any],
    count: int,
    *,
    resources: Mapping[str, float] | None = None,
    on_message: Callable[[int, Any], None] | None = None,
    echoes: type[Exception] | tuple[type[Exception], ...] = (),
    in_clear: bool = False,
    grace_s: float = 30.0,
) -> list[Any]:
    """What `function(rank)` returns on `count` workers at once, in order of rank; all of them or none.

    Each rank takes one task thread (and `resources`) of a worker of its own. When one fails the others are told (see
    `Rank.wanted`), and this returns when they have ended; the workers of those that have not after `grace_s` seconds,
    and those that do not answer (stopped, swapped out), are restarted. Errors of the types `echoes` are how a rank says
    that it has lost another one: they are raised only if no rank is found that ended by itself.
    `on_message(number, message)` is called in this thread.

    Ranks listen on their workers' own addresses. What they say to each other is not encrypted by Dask: beyond this
    machine it takes `in_clear`.

    Raises ValueError for fewer workers than `count`, or for ranks beyond this machine without `in_clear`; RankLost
    when a worker died; what a rank raised, with a note that names it; ConnectionError when the scheduler is lost.
    """
    with said_lost():
        ranks = _place(client, count, resources, in_clear)
    events: SimpleQueue[tuple[int, Any]] = SimpleQueue()
    client.subscribe_topic(ranks[0].topic, lambda event: events.put((event[1]["rank"], event[1]["message"])))
    futures: list[Future] = []
    try:
        for rank in ranks:
            futures.append(
                client.submit(_run, function, rank, key=f"{rank.topic}-{rank.number}", workers=[rank.worker],
                              allow_other_workers=False, resources=dict(resources or {}) or None, priority=1)
            )  # fmt: skip
            futures[-1].add_done_callback(lambda _, number=rank.number: events.put((number, _ENDED)))
        return _watch(client, ranks, futures, events, on_message or (lambda number, message: None), echoes)
    except Exception:
        if client.status == "running":
            with said_lost():
                _end(client, ranks, futures, grace_s)
        raise
    finally:
        if client.status == "running":
            client.cancel(futures)
            client.unsubscribe_topic(ranks[0].topic)


def _place(client: Client, count: int, resources: Mapping[str, float] | None, in_clear: bool) -> list[Rank]:
    needs = dict(resources or {})
    chosen = [
        address
        for address, worker in _workers(client).items()
        if worker["status"] == "running" and all(worker["resources"].get(n, 0) >= needs[n] for n in needs)
    ]
    if not 1 <= count <= len(chosen):
        offering = f" that offer {needs}" if needs else ""
        raise ValueError(f"ranks={count} must be in [1, {len(chosen)}], the workers{offering}; start more")
    chosen = sorted(chosen)[:count]
    found = client.sync(_asked, client, chosen, _RESULT_S, _here)
    for number, address in enumerate(chosen):
        if isinstance(found[address], Exception | None):
            raise _lost(number, count, address)
        if not in_clear and not is_loopback(found[address][1]):
            raise ValueError(f"ranks would talk unencrypted between machines, as {address}; allow it (in_clear) where "
                             "their network is private")  # fmt: skip
    topic = f"tilestream-ranks-{uuid.uuid4().hex}"
    (_, host, port) = found[chosen[0]]
    return [Rank(number, count, found[address][1], (host, port), address, found[address][0], topic)
            for number, address in enumerate(chosen)]  # fmt: skip


def _here(dask_worker: Worker) -> tuple[str, str, int]:
    """On a worker: which process it is, the host that others reach it by, and a port of it that is free."""
    host = urlsplit(dask_worker.address).hostname
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as free:
        free.bind((host, 0))
        return dask_worker.id, host, free.getsockname()[1]


def _run(function: Callable[[Rank], Any], rank: Rank) -> Any:
    if get_worker().id != rank.worker_id:
        raise _RestartedError
    return function(rank)


def _watch(
    client: Client, ranks: Sequence[Rank], futures: Sequence[Future], events: SimpleQueue[tuple[int, Any]],
    on_message: Callable[[int, Any], None], echoes: type[Exception] | tuple[type[Exception], ...],
) -> list[Any]:  # fmt: skip
    """The results; raises what ended the first rank that ended by itself."""
    results: dict[int, Any] = {}
    heard: dict[int, BaseException] = {}  # echoes
    looked_s = failed_s = float("-inf")
    while len(results) < len(ranks):
        with suppress(Empty):
            number, message = events.get(timeout=_POLL_S)
            if message is not _ENDED:
                on_message(number, message)
            elif futures[number].status == "finished":
                results[number] = _result(futures[number], ranks[number])
            elif futures[number].cancelled():
                raise ConnectionError("the scheduler is gone or has cancelled our tasks; see its log, then run again")
            else:
                error = futures[number].exception()
                if isinstance(error, KilledWorker | _RestartedError):
                    raise _lost(number, len(ranks), ranks[number].worker) from None
                if not isinstance(error, echoes):
                    error.add_note(f"in rank {number} of {len(ranks)}, on {ranks[number].worker}")
                    raise error
                failed_s = failed_s if heard else time.monotonic()
                heard[number] = error
        if time.monotonic() - looked_s < _POLL_S:
            continue
        there = _workers(client)
        for rank in ranks:
            if rank.number not in results and rank.worker not in there:
                raise _lost(rank.number, len(ranks), rank.worker)
        if heard and (len(results) + len(heard) == len(ranks) or time.monotonic() - failed_s > _SETTLE_S):
            number, error = next(iter(heard.items()))
            raise RankLost(f"rank {number} of {len(ranks)}, on {ranks[number].worker}: {error}")
        looked_s = time.monotonic()
    return [results[rank.number] for rank in ranks]


def _end(client: Client, ranks: Sequence[Rank], futures: Sequence[Future], grace_s: float) -> None:
    """Cancels ranks, and returns when none runs any more, or the workers of those that do not stop are restarted."""
    client.cancel(futures)
    keys = [future.key for future in futures]
    until_s = time.monotonic() + grace_s
    while True:
        there = set(_workers(client))
        mine = [rank.worker for rank in ranks if rank.worker in there]
        held = client.sync(_asked, client, mine, _ANSWER_S, _holds, keys)
        late = time.monotonic() > until_s
        over = [address for address, holds in held.items() if holds is None or (holds is True and late)]
        if over:
            with suppress(ValueError):  # a worker without a nanny cannot be restarted; its rank ends by itself
                client.restart_workers(over, timeout=30, raise_for_error=False)
        if late or not any(holds is True for holds in held.values()):
            return
        time.sleep(0.1)


async def _asked(
    client: Client, addresses: Sequence[str], timeout_s: float, function: Callable[..., Any], *args: Any
) -> dict[str, Any]:
    """What a function returns or raises on each worker; None where none comes in time: `Client.run` waits for ever."""

    async def one(address: str) -> Any:
        call = client.run(function, *args, workers=[address], on_error="return")  # on the client's loop, a coroutine
        with suppress(TimeoutError):
            return (await asyncio.wait_for(call, timeout_s)).get(address)

    return dict(zip(addresses, await asyncio.gather(*map(one, addresses)), strict=True))


def _holds(keys: Sequence[str], dask_worker: Worker) -> bool:
    return any(key in dask_worker.state.tasks for key in keys)


def _workers(client: Client) -> dict[str, Any]:
    with said_lost():
        found: dict[str, Any] = client.scheduler_info(n_workers=-1)
    if "workers" not in found:  # what a client says that has given up
        raise ConnectionError("the scheduler is gone; see its log, then run again")
    workers: dict[str, Any] = found["workers"]
    return workers


def _result(future: Future, rank: Rank) -> Any:
    try:
        return future.result(_RESULT_S)
    except TimeoutError:  # it went with its worker
        raise _lost(rank.number, rank.count, rank.worker) from None


def _lost(number: int, count: int, address: str) -> RankLost:
    return RankLost(f"rank {number} of {count} is lost with its worker {address}; see that worker's log")
