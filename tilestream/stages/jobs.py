"""Runs one job a photograph over the cluster, with progress, and keeps going when some fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tilestream.cluster import GPU, Job, Poison, Progress, progress, run, tell

from .base import Context


@dataclass(frozen=True)
class Load:
    """What the jobs ask of a cluster: tasks a job, bytes that a job's results hold on workers, tiles of all jobs."""

    tasks: int = 1
    held_bytes: int = 0
    tiles: int | None = None
    device: str = "cpu"


def window(load: Load, slots: int, memory: int) -> int:
    """Photographs in flight: two tasks for each that can run at a time, as long as workers can hold what they make.

    One more than that where a photograph has several tasks: its last ones leave slots to the next.
    """
    wanted = -(-2 * slots // load.tasks) + (load.tasks > 1)
    return max(1, min(wanted, slots * memory // load.held_bytes) if load.held_bytes else wanted)  # workers may restart


@contextmanager
def shown(
    context: Context, title: str, images: int | None, tiles: int | None = None, unit: str = "images"
) -> Iterator[Progress]:
    """Progress in the run's way: a bar, plain lines, or JSON."""
    with progress(
        title, total_images=images, total_parts=tiles, unit=unit, console=context.console,
        as_json=context.cluster.as_json, labels=context.labels,
    ) as bar:  # fmt: skip
        yield bar


@contextmanager
def steps(context: Context, title: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """Progress of what this process does by itself: a call a step. Who watches the run's cluster sees it, too."""
    with shown(context, title, total, unit=unit) as bar:

        def step() -> None:
            bar.start("step", 1)
            bar.finish("step", 0.0)
            if context.running is not None:
                bar.publish(context.running)

        yield step
        if context.running is not None:
            bar.publish(context.running, ended=True)


def run_jobs(
    context: Context,
    title: str,
    names: Sequence[str],
    make: Callable[[str], Job],
    on_result: Callable[[str, Any], None],
    load: Load = Load(),
    on_poison: Callable[[str, str], None] | None = None,
    unit: str = "images",
) -> None:
    """Makes and runs a job for each name, a bounded window of them in flight; results come in order of completion.

    A job that fails does not stop the others. Raises RuntimeError at the end if any did, naming the first and how many;
    a job that ends worker processes is no failure where `on_poison(name, reason)` takes it.
    """
    if not names:
        return
    failures: list[tuple[str, Exception]] = []
    client = context.client()

    def failed(job: Job, error: Exception) -> None:
        if on_poison is None or not isinstance(error, Poison):
            failures.append((job.name, error))
            return
        context.say(f"{title}: {job.name} is quarantined: {error}")
        tell(client, "quarantine", **context.labels, stage=title, id=job.name, reason=str(error))
        on_poison(job.name, str(error))

    with shown(context, title, len(names), load.tiles, unit) as bar:
        run(
            (make(name) for name in names),
            client=client,
            window=window(load, context.slots, int(context.cluster.memory)),
            on_result=lambda job, result: on_result(job.name, result),
            on_error=failed,
            progress=bar,
            resources={GPU: 1} if load.device == "cuda" else None,
            stall_s=context.cluster.stall_timeout,
        )
    for name, error in failures[1:10]:
        context.say(f"{title}: {name}: {error}")
    if failures:
        name, error = failures[0]
        raise RuntimeError(
            f"{title}: {len(failures)} of {len(names)} {unit} failed, the first {name}: {error}; "
            "the others are kept, --resume continues"
        )
