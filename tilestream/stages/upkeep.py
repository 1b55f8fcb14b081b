"""Checking a store, and clearing it of what nobody committed."""

from __future__ import annotations

from typing import Any

from tilestream.cluster import Job
from tilestream.store import Damage, collect, lease, open_store, verify_photograph, verify_tables

from .base import Context
from .jobs import run_jobs


def verify(context: Context) -> list[Damage]:
    """Every file of every photograph against its hash, on the cluster; says what is wrong, and how much is not."""
    store = context.store
    ids, found = store.ids, verify_tables(store.path)

    def done(name: str, result: Any) -> None:
        for damage in result:
            context.say(f"verify: {damage}")
            found.append(damage)

    for damage in found:
        context.say(f"verify: {damage}")
    run_jobs(context, "verify", ids, lambda id: Job.call(id, verify_photograph, store.path, id), done)
    hit = len({damage.id for damage in found} & set(ids))
    context.say(f"verify: {len(ids)} photographs, {hit} of them damaged")
    return sorted(found, key=str)


def clear(context: Context, older_s: float) -> None:
    """Removes attempts that nobody committed, if they are older than that."""
    location = context.store.path
    with lease(open_store(location), "gc"):
        garbage = collect(location, older_s)
    young = f"; {garbage.young} younger than {older_s:g} s stay, they may still be written" if garbage.young else ""
    context.say(f"gc: {len(garbage.removed)} orphans removed, {garbage.bytes / 2**20:.1f} MiB{young}")
