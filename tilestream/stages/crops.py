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
from .saliency import candidates_path, centres_path
from .saliency_config import BORDER_RULE, field_of_view
from .split import chosen, path_of, read_table, write_table


class CropsConfig(StageConfig):
    """Cuts crops around each photograph's centre or candidates, shifted inside at the border."""

    centres: str = Field("saliency", description="the stage whose centres to take")
    per_image: int = Field(
        1, ge=1, description="crops a photograph: its centre and its next candidates, as far as it has them"
    )
    size_px: int = Field(512, ge=16, description="side of a crop")
    select: Literal["all", "training"] = Field(
        "all",
        description="every photograph with a centre; or, for training, paper A's choice: grade 0 (by `healthy`) "
        "and the grades in `unhealthy_grades`",
    )
    healthy: Literal["random", "saliency"] = Field(
        "random", description="centres of grade 0 in the training split, for select=training"
    )
    unhealthy_grades: list[int] = Field(
        [3, 4], description="grades, from 2 on, whose crops are examples of the unhealthy class"
    )
    border_rule: Literal["frame", "circle"] = Field(
        "frame", description=f"for random centres, always in the field of view, {BORDER_RULE}"
    )
    border: float = Field(0.1, ge=0, lt=0.5, description="kappa for random centres, the share left out at each side")
    seed: int = Field(0, ge=0, description="seed of random centres")
    splits: list[str] | None = Field(None, description="only photographs of these splits (default: all)")


def run(config: CropsConfig, context: Context) -> None:
    """Writes crops.zarr (under another stage name S, S.zarr): image (n, 3, size, size) uint8 raw.

    The table, crops.parquet, has a row a crop, by id and rank: position, id, y0_px, x0_px, height, width (the
    photograph's), low, high, padded (shorter than a crop, filled with zeros), label, unhealthy, split, rank (0: around
    the centre).
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
    rows: dict[str, list[Any]] = {}
    for row in table.itertuples():
        rows.setdefault(row.id, []).append(row)
    todo = [id for id in rows if id not in done]

    def make(id: str) -> Job:
        places = [(int(row.position), int(row.y0_px), int(row.x0_px)) for row in rows[id]]
        megapixels = rows[id][0].height * rows[id][0].width / 1e6
        return Job.call(id, cut_all, str(context.store_path), id, str(partial), places, config.size_px, size=megapixels)

    run_jobs(context, context.name, todo, make, lambda id, _: journal.append({"id": id}))
    _describe(partial, table)
    write_table(table_path(context, context.name), table)
    final = crops_path(context, context.name)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


def plan_crops(config: CropsConfig, context: Context) -> pd.DataFrame:
    """Which crops, from where: a row each, in order of id and rank."""
    if min(config.unhealthy_grades, default=0) < 2:
        raise ValueError(f"unhealthy_grades={config.unhealthy_grades} must be grades from 2 on; 0 and 1 are healthy")
    samples, centres = chosen(context, config.splits), _centres(config, context)
    if config.select == "training":
        learnt = (samples["split"] == "train") & (samples["label"].isin([0, *config.unhealthy_grades]))
        samples = samples[learnt | ((samples["split"] == "validation") & samples["label"].notna())]
        if config.healthy == "random":
            # validation photographs at their highest point, as at the decision: with random healthy crops the network
            # that tells places apart, not eyes, would be the best
            healthy = samples[(samples["label"] == 0) & (samples["split"] == "train")]
            centres = pd.concat([centres[~centres["id"].isin(healthy["id"])], _random(config, context, healthy)])
    samples = samples.merge(centres, on="id").sort_values(["id", "rank"], ignore_index=True)
    ids = list(samples["id"].unique())
    known = ensure_extremes(context, read_average(context), ids) if average_path(context).exists() else {}
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
                "rank": row.rank,
            }
        )
    table = pd.DataFrame(rows)
    return table.astype({"label": "Int64", "unhealthy": "Int64"}) if rows else table


def _centres(config: CropsConfig, context: Context) -> pd.DataFrame:
    """id, rank, y_px, x_px: of each photograph as many as are wanted, or as it has."""
    if config.per_image == 1:
        return read_table(centres_path(context, config.centres), "saliency")[["id", "y_px", "x_px"]].assign(rank=0)
    table = read_table(candidates_path(context, config.centres), "saliency")
    most = int(table["rank"].max()) + 1 if len(table) else 0
    if most < config.per_image:
        raise ValueError(
            f"per_image={config.per_image}, but {config.centres} found at most {most} candidates a photograph; run it "
            f"with candidates={config.per_image}"
        )
    return table.loc[table["rank"] < config.per_image, ["id", "rank", "y_px", "x_px"]]


def _random(config: CropsConfig, context: Context, healthy: pd.DataFrame) -> pd.DataFrame:
    """Random centres by the border rule and on the eye, as many a photograph; without a field of view by the frame."""
    rows, framed, store = [], [], context.store
    for row in healthy.itertuples():
        field = field_of_view(store, row.id)
        if config.border_rule == "circle" and field is None:
            framed.append(row.id)
        for rank in range(config.per_image):
            name = f"{row.id}:{rank}" if rank else row.id
            y, x = random_centre((row.height, row.width), config.border, config.seed, name, field, config.border_rule)
            rows.append((row.id, rank, y, x))
    if framed:
        context.say(
            f"{context.name}: {len(framed)} of {len(healthy)} photographs with random centres have no field of view, "
            f"so the frame rule was used for them: {', '.join(framed[:5])}"
        )
    return pd.DataFrame(rows, columns=["id", "rank", "y_px", "x_px"]).astype({"id": object})


def cut_all(store: str, id: str, path: str, places: list[tuple[int, int, int]], size_px: int) -> None:
    """A photograph's crops, each (position, y0, x0), on a worker: read from its chunks, written a chunk each."""
    image, crops = Store(store).image(id), zarr.open_array(f"{path}/image", mode="r+")
    for position, y0, x0 in places:
        crops[position] = cut(image, Region(y0, y0 + size_px, x0, x0 + size_px))


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
    found = centres_path if config.per_image == 1 else candidates_path
    return [found(context, config.centres), path_of(context), average_path(context)]


def writes(config: CropsConfig, context: Context) -> Iterable[Path]:
    return [crops_path(context, context.name), table_path(context, context.name)]


STAGE = Stage("crops", CropsConfig, run, reads, writes)
