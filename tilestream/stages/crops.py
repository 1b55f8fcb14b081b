"""Crops of full-resolution photographs around their centres."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import zarr
from pydantic import Field
from zarr.codecs import ZstdCodec

from tilestream.cluster import Job
from tilestream.geometry import Region
from tilestream.methods import crop_region, cut, random_centre, unhealthy
from tilestream.store import Store

from .base import Context, Stage, StageConfig
from .jobs import run_jobs
from .preprocess import average_path, ensure_extremes, read_average
from .runner import Journal
from .saliency import centres_path
from .split import chosen, path_of, read_table, write_table


class CropsConfig(StageConfig):
    """Cuts a crop around each centre, shifted inside at the border."""

    centres: str = Field("saliency", description="the stage whose centres to take")
    size_px: int = Field(512, ge=16, description="side of a crop")
    select: Literal["all", "training"] = Field(
        "all",
        description="every photograph with a centre; or, for training, paper A's choice: grade 0 (by `healthy`) "
        "and the grades in `unhealthy_grades`",
    )
    healthy: Literal["random", "saliency"] = Field("random", description="centres of grade 0 for select=training")
    unhealthy_grades: list[int] = Field(
        [3, 4], description="grades, from 2 on, whose crops are examples of the unhealthy class"
    )
    border: float = Field(0.1, ge=0, lt=0.5, description="random centres obey the same border rule")
    seed: int = Field(0, ge=0, description="seed of random centres")
    splits: list[str] | None = Field(None, description="only photographs of these splits (default: all)")


def run(config: CropsConfig, context: Context) -> None:
    """Writes crops.zarr (under another stage name S, S.zarr): image (n, 3, size, size) uint8 raw.

    The table, crops.parquet, has a row a crop: position, id, y0_px, x0_px, height, width (the photograph's), low, high,
    padded, label, unhealthy, split.
    """
    table = plan_crops(config, context)
    if not len(table):
        raise ValueError("no photograph to crop: none is selected and has a centre")
    partial = context.partial_path / "crops.zarr"
    journal = Journal(context.partial_path / "crops.jsonl")
    if not (partial / "image" / "zarr.json").exists():
        journal.path.unlink(missing_ok=True)  # it speaks of crops that a killed run had moved to their place already
        _create(partial, len(table), config.size_px)
    done = set(journal.read())
    todo = [id for id in table["id"] if id not in done]
    rows = {row.id: row for row in table.itertuples()}

    def make(id: str) -> Job:
        row = rows[id]
        args = (
            str(context.store_path),
            id,
            str(partial),
            int(row.position),
            int(row.y0_px),
            int(row.x0_px),
            config.size_px,
        )
        return Job.call(id, one, *args, size=row.height * row.width / 1e6)

    run_jobs(context, context.name, todo, make, lambda id, _: journal.append({"id": id}))
    _describe(partial, table)
    write_table(table_path(context, context.name), table)
    final = crops_path(context, context.name)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


def plan_crops(config: CropsConfig, context: Context) -> pd.DataFrame:
    """Which crops, from where: a row each, in order of id."""
    if min(config.unhealthy_grades, default=0) < 2:
        raise ValueError(f"unhealthy_grades={config.unhealthy_grades} must be grades from 2 on; 0 and 1 are healthy")
    centres = read_table(centres_path(context, config.centres), "saliency")
    samples = chosen(context, config.splits).merge(centres[["id", "y_px", "x_px"]], on="id", how="left")
    if config.select == "training":
        learnt = (samples["split"] == "train") & (samples["label"].isin([0, *config.unhealthy_grades]))
        samples = samples[learnt | ((samples["split"] == "validation") & samples["label"].notna())]
        if config.healthy == "random":
            drawn = samples["label"] == 0
            for index, row in samples[drawn].iterrows():
                y, x = random_centre((row["height"], row["width"]), config.border, config.seed, row["id"])
                samples.loc[index, ["y_px", "x_px"]] = y, x
    samples = samples[samples["y_px"].notna()].reset_index(drop=True)
    known = (
        ensure_extremes(context, read_average(context), list(samples["id"])) if average_path(context).exists() else {}
    )
    rows: list[dict[str, Any]] = []
    for position, row in enumerate(samples.itertuples()):
        region = crop_region((row.height, row.width), (int(row.y_px), int(row.x_px)), config.size_px)
        rows.append(
            {
                "position": position,
                "id": row.id,
                "y0_px": region.y0,
                "x0_px": region.x0,
                "height": row.height,
                "width": row.width,
                "low": known[row.id].low if known else 0.0,
                "high": known[row.id].high if known else 255.0,
                "padded": min(row.height, row.width) < config.size_px,
                "label": row.label,
                "unhealthy": None if pd.isna(row.label) else int(unhealthy(row.label)),
                "split": row.split,
            }
        )
    table = pd.DataFrame(rows)
    return table.astype({"label": "Int64", "unhealthy": "Int64"}) if rows else table


def one(store: str, id: str, path: str, position: int, y0: int, x0: int, size_px: int) -> None:
    """One crop, on a worker: read from its photograph's chunks, written as a chunk of its own."""
    crop = cut(Store(store).image(id), Region(y0, y0 + size_px, x0, x0 + size_px))
    zarr.open_array(f"{path}/image", mode="r+")[position] = crop


def _create(path: Path, count: int, size_px: int) -> None:
    zarr.create_group(path, overwrite=True).create_array(
        "image",
        shape=(count, 3, size_px, size_px),
        chunks=(1, 3, size_px, size_px),
        dtype="u1",
        compressors=ZstdCodec(level=3, checksum=True),
        config={"write_empty_chunks": True},
        dimension_names=["crop", "c", "y", "x"],
    )


def _describe(path: Path, table: pd.DataFrame) -> None:
    """The table's places as coordinates, for readers that open the crops alone."""
    group = zarr.open_group(path, mode="r+")
    group.attrs["ids"] = table["id"].tolist()
    for name in ("y0_px", "x0_px"):
        group.create_array(name, data=table[name].to_numpy(np.int64), dimension_names=["crop"], overwrite=True)


def read_crops(context: Context, name: str) -> pd.DataFrame:
    """The table of a crops stage."""
    return read_table(table_path(context, name), "crops")


def crops_path(context: Context, name: str) -> Path:
    return context.run / f"{name}.zarr"


def table_path(context: Context, name: str) -> Path:
    return context.run / f"{name}.parquet"


def reads(config: CropsConfig, context: Context) -> Iterable[Path]:
    return [centres_path(context, config.centres), path_of(context), average_path(context)]


def writes(config: CropsConfig, context: Context) -> Iterable[Path]:
    return [crops_path(context, context.name), table_path(context, context.name)]


STAGE = Stage("crops", CropsConfig, run, reads, writes)
