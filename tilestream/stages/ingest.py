"""Photographs from a folder and a CSV into a store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, Field

from tilestream.cluster import Job
from tilestream.store import (
    Format,
    Limits,
    Settings,
    Store,
    create_store,
    ingest_guarded,
    is_url,
    lease,
    open_store,
    write_labels,
    write_series,
)
from tilestream.store.adapters import Adapter, read_collection
from tilestream.store.duplicates import duplicate_notes
from tilestream.store.labels import Columns

from .base import Context, Stage, StageConfig
from .jobs import run_jobs


class IngestConfig(StageConfig):
    """Stores photographs as chunked Zarr, with their labels."""

    folder: Path = Field(
        description="folder with the photographs; a relative one is looked for below the run's folder, too"
    )
    adapter: Adapter = Field("csv", description="form of the data set: any CSV, one folder a class, or a published one")
    labels: Path | None = Field(
        None, description="CSV with a row a photograph (default: the one in the folder, where the adapter has one)"
    )
    id_column: str | None = Field(
        None, description="its column with the photographs' names (default: image, or the data set's own)"
    )
    label_column: str | None = Field(None, description="its column with the grades")
    patient_column: str | None = Field(
        None, description="its column with the patients (default: every photograph its own)"
    )
    eye_column: str | None = Field(None, description="its column with the eyes: left or right, L or R, OS or OD")
    chunks: int = Field(512, ge=64, description="side of a chunk in px")
    shards: int = Field(8192, ge=64, description="side of the square in px whose area a shard holds at most")
    codec: Literal["zstd", "lz4", "jpegxl"] = Field("zstd", description="lossless compression; jpegxl is an extra")
    max_megapixels: float = Field(4096, gt=0, description="larger photographs are quarantined")
    max_side: int = Field(100_000, ge=1, description="photographs with a longer side, in px, are quarantined")
    time_limit: float = Field(600, gt=0, le=1e6, allow_inf_nan=False, description="seconds for one photograph")
    memory_limit: ByteSize = Field(ByteSize(4 * 2**30), description="bytes that one photograph may take while read")


def run(config: IngestConfig, context: Context) -> None:
    """Ingests what is not in the store yet; quarantined photographs are recorded there with their reason."""
    if context.store_path is None:
        raise ValueError("ingest needs a store; give --store PATH")
    folder, csv = located(config.folder, context), config.labels and located(config.labels, context)
    named = (config.id_column, config.label_column, config.patient_column, config.eye_column)
    found = read_collection(folder, config.adapter, csv, Columns(*(name or "" for name in named)))
    sources, table = {source.id: source for source in found.sources}, found.labels
    if not sources:
        raise ValueError(f"folder={str(folder)!r} holds no photographs (.jpeg, .jpg, .png, .tif, .tiff, .webp)")
    settings, limits = _settings(config)
    store = create_store(context.store_path)
    with lease(open_store(store), "ingest"):
        _ingest(sources, table, store, settings, limits, context)


def _settings(config: IngestConfig) -> tuple[Settings, Limits]:
    settings = Settings(Format(config.chunks, config.shards, config.codec), config.max_megapixels, config.max_side)
    return settings, Limits(config.time_limit, config.memory_limit, config.max_side)


def _ingest(
    sources: dict[str, Any], table: Any, store: Any, settings: Settings, limits: Limits, context: Context
) -> None:
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    started, megapixels = time.perf_counter(), 0.0

    def done(name: str, result: dict[str, Any]) -> None:
        nonlocal megapixels
        outcomes[result["status"]] += 1
        megapixels += result["megapixels"] * (result["status"] == "committed")
        if result["status"] == "quarantined":
            reasons[result["reason"]] += 1
            context.say(f"ingest: {result['id']} quarantined: {result['reason']}")

    job = {id: (str(store), source, settings, limits) for id, source in sources.items()}
    run_jobs(context, "ingest", list(sources), lambda id: Job.call(id, ingest_guarded, *job[id]), done)
    write_series(store)
    left = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    context.say(
        f"ingest: {len(sources)} photographs = {outcomes['committed']} committed + {outcomes['skipped']} there already "
        f"+ {outcomes['quarantined']} quarantined{f' ({left})' if left else ''}; "
        f"{megapixels / (time.perf_counter() - started):.1f} megapixels/s"
    )
    if conflicts := reasons["conflicting_source"]:  # labels, too, would speak of bytes that are not those stored
        raise ValueError(
            f"{conflicts} photographs are not those stored in {str(store)!r} under the same names; "
            "ingest them into a new store"
        )
    if table is not None:
        _replace_labels(store, table, context)
    for note in duplicate_notes(Store(store).samples()):
        context.say(f"ingest: {note}")
    if not Store(store).ids:
        raise ValueError(f"no photograph could be ingested; 'tilestream info {store}' says why")


def _replace_labels(store: Any, table: Any, context: Context) -> None:
    """Labels come last: those of other photographs under stored names must not be taken for theirs."""
    before = Store(store).samples()
    write_labels(store, table)
    after = Store(store).samples()
    lost = int((before["label"].notna() & after["label"].isna()).sum())
    if lost:
        context.say(f"ingest: warning: {lost} stored photographs are not in these labels, and have none any more")


def located(path: Path, context: Context) -> Path:
    """A path as it is, or below the run's folder where it is not there but lies in the run."""
    inside = context.run / path
    return inside if not path.exists() and inside.exists() else path.absolute()


def reads(config: IngestConfig, context: Context) -> Iterable[Path]:
    return [located(config.folder, context), *([located(config.labels, context)] if config.labels else [])]


def writes(config: IngestConfig, context: Context) -> Iterable[Path]:
    place = context.store_path
    return [] if place is None or is_url(place) else [Path(place) / "commits"]


STAGE = Stage("ingest", IngestConfig, run, reads, writes, uses_store=False)
