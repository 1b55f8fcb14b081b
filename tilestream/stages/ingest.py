"""Photographs from a folder and a CSV into a store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyvips
from pydantic import Field

from tilestream.cluster import Job
from tilestream.store import Store, create_store, find_photographs, ingest_photograph, read_labels, write_labels

from .base import Context, Stage, StageConfig
from .jobs import run_jobs


class IngestConfig(StageConfig):
    """Stores photographs as chunked Zarr, with their labels."""

    folder: Path = Field(
        description="folder with the photographs; a relative one is looked for below the run's folder, too"
    )
    labels: Path | None = Field(None, description="CSV with a row a photograph")
    id_column: str = Field("image", description="its column with the photographs' names, with or without ending")
    label_column: str | None = Field(None, description="its column with the grades")
    patient_column: str | None = Field(
        None, description="its column with the patients (default: every photograph its own)"
    )


def run(config: IngestConfig, context: Context) -> None:
    """Ingests what is not in the store yet; quarantined photographs are recorded there with their reason."""
    if context.store_path is None:
        raise ValueError("ingest needs a store; give --store PATH")
    folder, table = located(config.folder, context), None
    if config.labels is not None:
        csv = located(config.labels, context)
        table = read_labels(
            csv, id_column=config.id_column, label_column=config.label_column, patient_column=config.patient_column
        )
    sources = {source.id: source for source in find_photographs(folder, table)}
    if not sources:
        raise ValueError(f"folder={str(folder)!r} holds no photographs (.jpeg, .jpg, .png, .tif, .tiff, .webp)")
    store = create_store(context.store_path)
    if table is not None:
        write_labels(store, table)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()

    def done(name: str, result: dict[str, Any]) -> None:
        outcomes[result["status"]] += 1
        if result["status"] == "quarantined":
            reasons[result["reason"]] += 1
            context.say(f"ingest: {result['id']} quarantined: {result['reason']}")

    run_jobs(context, "ingest", list(sources), lambda id: Job.call(id, one, str(store), sources[id]), done)
    left = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    context.say(
        f"ingest: {len(sources)} photographs = {outcomes['committed']} committed + {outcomes['skipped']} there already "
        f"+ {outcomes['quarantined']} quarantined{f' ({left})' if left else ''}"
    )
    if conflicts := reasons["conflicting_source"]:  # labels, too, would speak of bytes that are not those stored
        raise ValueError(
            f"{conflicts} photographs of folder={str(folder)!r} are not those stored in {str(store)!r} under the same "
            "names; ingest them into a new store"
        )
    if not Store(store).ids:
        raise ValueError(
            f"no photograph of folder={str(folder)!r} could be ingested; 'tilestream info {store}' says why"
        )


def one(store: str, source: Any) -> dict[str, Any]:
    """One photograph, on a worker; libvips' own threads would compete with the other workers."""
    pyvips.concurrency_set(1)
    return ingest_photograph(store, source)


def located(path: Path, context: Context) -> Path:
    """A path as it is, or below the run's folder where it is not there but lies in the run."""
    inside = context.run / path
    return inside if not path.exists() and inside.exists() else path.absolute()


def reads(config: IngestConfig, context: Context) -> Iterable[Path]:
    return [located(config.folder, context), *([located(config.labels, context)] if config.labels else [])]


def writes(config: IngestConfig, context: Context) -> Iterable[Path]:
    return [context.store_path / "commits"] if context.store_path else []


STAGE = Stage("ingest", IngestConfig, run, reads, writes, uses_store=False)
