"""Training over a cluster: one rank a worker; when one is lost, all begin again from the last checkpoint."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from tilestream.cluster import GPU, Rank, RankLost, run_ranks
from tilestream.training import EpochRecord, PeerLost, joined

from .base import ClusterConfig, Context, set_threads


@dataclass(frozen=True)
class Crew:
    """How many ranks train, and what happens when one is lost."""

    ranks: int | Literal["auto"]
    restarts: int
    timeout_s: float
    trusted: bool


@dataclass(frozen=True)
class _Task:
    """What each rank does; everything by name, so that it pickles small."""

    work: Callable[..., Any]
    run: Path
    store: Path | str | None
    cluster: ClusterConfig
    name: str
    attempt: str
    device: str
    timeout_s: float
    seen: str


def over_ranks(
    crew: Crew,
    context: Context,
    work: Callable[..., Any],
    on_epoch: Callable[[EpochRecord], None],
    on_batch: Callable[[], None],
) -> None:
    """Calls `work(context, device, group, on_epoch=..., on_batch=...)` on each rank; what it makes is its checkpoint.

    Raises ValueError when a worker does not see the run's folder, RuntimeError when ranks were lost too often.
    """
    client, device = context.client(), context.device
    count = _offering(context, device) if crew.ranks == "auto" else crew.ranks

    def heard(_: int, record: str | None) -> None:
        on_epoch(EpochRecord.model_validate_json(record)) if record else on_batch()

    for restarts in range(crew.restarts + 1):
        seen = context.partial_path / f"ranks-{uuid.uuid4().hex}"  # a new name: file systems remember what is not there
        seen.touch()
        task = _Task(
            work, context.run, context.store_path, context.cluster, context.name, context.attempt, device,
            crew.timeout_s, seen.name,
        )  # fmt: skip
        try:
            run_ranks(
                client, partial(_rank, task), count, resources={GPU: 1} if device == "cuda" else None,
                on_message=heard, echoes=PeerLost, in_clear=crew.trusted,
                grace_s=min(30.0, crew.timeout_s),
            )  # fmt: skip
            return
        except RankLost as error:
            if restarts == crew.restarts:
                raise RuntimeError(f"{error}; restarts={restarts} were in vain, --resume continues") from None
            with suppress(TimeoutError):
                client.wait_for_workers(count, timeout=context.cluster.start_timeout)
            count = min(count, _offering(context, device))
            if not count:
                raise ConnectionError(f"{error}; no worker is left, start some, then --resume continues") from None
            context.say(f"{context.name}: {error}; {count} ranks go on from the last checkpoint")
        finally:
            seen.unlink(missing_ok=True)


def _offering(context: Context, device: str) -> int:
    return sum(device == "cpu" or bool(worker["resources"].get(GPU)) for worker in context.workers().values())


def _rank(task: _Task, rank: Rank) -> None:
    """One rank, on its worker."""
    context = Context(task.run, task.store, task.cluster, name=task.name, attempt=task.attempt)
    if not (context.partial_path / task.seen).exists():
        raise ValueError(
            f"worker {rank.worker} does not see {context.partial_path}; put the run's folder on a file system that all "
            "workers share, under one path, or train in one process (ranks=1)"
        )
    set_threads(task.cluster.threads)
    device = torch.device(task.device)

    def batch(done: int, of: int) -> None:
        if not rank.wanted():
            raise PeerLost("nobody waits for this rank any more")
        if rank.number == 0:
            rank.tell(None)

    def epoch(record: EpochRecord) -> None:
        if rank.number == 0:
            rank.tell(record.model_dump_json())

    with joined(rank.number, rank.count, rank.address, rank.host, device, task.timeout_s) as group:
        task.work(context, device, group, on_epoch=epoch, on_batch=batch)
