"""Runs one job a photograph over the cluster, with progress, and keeps going when some fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tilestream.cluster import Job, progress, run

from .base import Context


def run_jobs(
    context: Context,
    title: str,
    names: Sequence[str],
    make: Callable[[str], Job],
    on_result: Callable[[str, Any], None],
    parts: int | None = None,
) -> None:
    """Makes and runs a job for each name, a bounded window of them in flight; results come in order of completion.

    A job that fails does not stop the others. Raises RuntimeError at the end if any did, naming the first and how many.
    """
    if not names:
        return
    failures: list[tuple[str, Exception]] = []
    client = context.client()
    workers = len(client.scheduler_info(n_workers=-1)["workers"])
    with progress(title, total_images=len(names), total_parts=parts, console=context.console) as bar:
        run(
            (make(name) for name in names),
            client=client,
            window=2 * workers,
            on_result=lambda job, result: on_result(job.name, result),
            on_error=lambda job, error: failures.append((job.name, error)),
            progress=bar,
        )
    for name, error in failures[1:10]:
        context.say(f"{title}: {name}: {error}")
    if failures:
        name, error = failures[0]
        raise RuntimeError(
            f"{title}: {len(failures)} of {len(names)} photographs failed, the first {name}: {error}; "
            "the others are kept, --resume continues"
        )
