"""The training set's average image, and each photograph's exact extremes after subtracting it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import Field

from tilestream.cluster import Job
from tilestream.methods import Extremes, average_image, extremes, resize_square
from tilestream.methods.preprocessing import Floats
from tilestream.store import Store

from .base import Context, Stage, StageConfig, replacing
from .jobs import run_jobs
from .models import locate, read_model
from .runner import Journal
from .split import chosen, path_of, write_table


class PreprocessConfig(StageConfig):
    """Computes what the normalisation of this run needs."""

    size_px: int = Field(1024, ge=16, le=1024, description="side of the squares that the first network is trained on")
    model: str | None = Field(None, description="take the average image of this model instead (new photographs)")


def run(config: PreprocessConfig, context: Context) -> None:
    """Writes average.npy, (3, size_px, size_px) float32 in grey levels, and extremes.parquet: id, low, high."""
    if config.model is None:
        store, ids = context.store, list(chosen(context, ["train"])["id"])
        average = average_image(resize_square(np.asarray(store.square(id)[:]), config.size_px) for id in ids)
    else:
        average = average_of(read_model(context, config.model).preprocessing, config.model)
    with replacing(average_path(context)) as temporary, temporary.open("wb") as file:
        np.save(file, average)
    ensure_extremes(context, average, list(context.store.ids))


def average_of(preprocessing: dict[str, object], model: str) -> Floats:
    """The average image that a model file carries."""
    average = preprocessing.get("average")
    if average is None:
        raise ValueError(f"model={model!r} carries no average image; it was not trained by tilestream")
    return np.asarray(average, np.float32)


def average_path(context: Context) -> Path:
    return context.run / "average.npy"


def read_average(context: Context) -> Floats:
    """The run's average image; ValueError when there is none yet."""
    if not average_path(context).exists():
        raise ValueError("this run has no average.npy; run 'tilestream preprocess' first")
    average: Floats = np.load(average_path(context))
    return average


def ensure_extremes(context: Context, average: Floats, ids: Sequence[str]) -> dict[str, Extremes]:
    """The extremes of these photographs: those in extremes.parquet if they belong to `average`; others are added.

    An id alone does not make a photograph: the run's folder may have seen another store, or other bytes under the id.
    """
    path, stamp = context.run / "extremes.parquet", _stamp(average)
    samples = context.store.samples()
    sources = dict(zip(samples["id"], samples["source_sha256"], strict=True))
    known: dict[str, Extremes] = {}
    if path.exists():
        table = pd.read_parquet(path)
        if table.attrs.get("average") == stamp and "source_sha256" in table:
            rows = table[table["source_sha256"] == table["id"].map(sources)]
            known = {row.id: Extremes(row.low, row.high) for row in rows.itertuples()}
    journal = Journal(context.partial_path / f"extremes-{stamp[:12]}.jsonl")
    known.update({id: Extremes(r["low"], r["high"]) for id, r in journal.read().items()})
    missing = [id for id in ids if id not in known]
    if missing:
        file = context.partial_path / f"average-{stamp[:12]}.npy"  # workers read it once, by name
        with replacing(file) as temporary, temporary.open("wb") as out:
            np.save(out, average)

        def done(id: str, result: Extremes) -> None:
            known[id] = result
            journal.append({"id": id, "low": result.low, "high": result.high})

        job = {id: (str(context.store_path), id, str(file)) for id in missing}
        run_jobs(context, "extremes", missing, lambda id: Job.call(id, one, *job[id]), done)
        file.unlink()
    if missing or not path.exists():
        records = [(id, e.low, e.high, sources[id]) for id, e in sorted(known.items())]
        table = pd.DataFrame(records, columns=["id", "low", "high", "source_sha256"])
        table.attrs["average"] = stamp
        write_table(path, table)
    return {id: known[id] for id in ids}


def one(store: str, id: str, average_file: str) -> Extremes:
    """One photograph's extremes, on a worker."""
    return extremes(Store(store).image(id), np.load(average_file))


def _stamp(average: Floats) -> str:
    return hashlib.sha256(np.ascontiguousarray(average).tobytes()).hexdigest()


def reads(config: PreprocessConfig, context: Context) -> Iterable[Path]:
    return [path_of(context)] if config.model is None else [locate(context, config.model)]


def writes(config: PreprocessConfig, context: Context) -> Iterable[Path]:
    return [average_path(context), context.run / "extremes.parquet"]


STAGE = Stage("preprocess", PreprocessConfig, run, reads=reads, writes=writes)
