"""Saliency maps of photographs, tile by tile over the cluster: crop centres, small pictures, maps on request."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import zarr
from pydantic import Field

from tilestream.cluster import Job
from tilestream.engine import SaliencyPass, plan, trace
from tilestream.geometry import TilePlan
from tilestream.store.layout import encode_id

from . import saliency_tasks as tasks
from .base import Context, Stage, StageConfig, digest, replacing
from .jobs import run_jobs
from .models import locate, read_model
from .preprocess import ensure_extremes
from .runner import Journal
from .split import chosen, path_of, write_table


class SaliencyConfig(StageConfig):
    """Computes the input gradient of a network over photographs and finds its highest point inside the border."""

    model: str = Field("first", description="model file, or the name of one of this run's models")
    net: str | None = Field(None, description="package.module:factory, for a file that does not name its network")
    resolution: Literal["full", "square"] = Field(
        "full", description="the photograph as it is, or squashed to the training square"
    )
    method: Literal["gradient"] = Field("gradient", description="what is propagated back")
    reduce: Literal["mean", "absmean", "absmax"] = Field("mean", description="how the three channels become one")
    target: int = Field(1, ge=0, description="the logit that is differentiated")
    border: float = Field(
        0.1, ge=0, lt=0.5, description="kappa, the share of the frame left out at each side (Formula 1)"
    )
    splits: list[str] | None = Field(None, description="only photographs of these splits (default: all)")
    limit: int | None = Field(None, ge=1, description="only the first so many photographs")
    tile_px: int | None = Field(None, description="side of the tiles in px instead of the budget's choice")
    write: bool = Field(False, description="keep the maps at full resolution, as saliency.zarr/ID, a chunk a tile")


def run(config: SaliencyConfig, context: Context) -> None:
    """Writes centres.parquet (id, y_px, x_px, value, probability) and overviews/ID.npy; maps on request.

    Under another stage name S the files are S.parquet and S_overviews. Finished photographs are in the journal.
    """
    samples = chosen(context, config.splits, config.limit)
    model = read_model(context, config.model, config.net)
    average = model.preprocessing.get("average")
    extents = {row.id: (int(row.height), int(row.width)) for row in samples.itertuples()}
    files = _Plans(config, context, model.net)
    if config.resolution == "square" and average is None:
        raise ValueError(f"model={config.model!r} carries no square to squash to; use resolution=full")
    for extent in sorted(set(extents.values())):  # before any work: a small budget, an unknown target are said at once
        if config.resolution == "full":
            work = SaliencyPass(files.network, tasks.read_plan(files.path(extent)), target=config.target)
            if work.one_sweep:
                work.upstream()
    known = {}
    if average is not None and config.resolution == "full":
        known = ensure_extremes(context, np.asarray(average, np.float32), list(samples["id"]))
    path = locate(context, config.model)
    common: dict[str, Any] = {
        "store": str(context.store_path),
        "model": str(path),
        "model_sha256": digest(path),
        "net": config.net,
        "target": config.target,
        "method": config.method,
        "reduce": config.reduce,
        "border": config.border,
    }
    journal = Journal(context.partial_path / "centres.jsonl")
    done = {id: record for id, record in journal.read().items() if id in extents}
    if done:
        context.say(f"{context.name}: {len(done)} of {len(samples)} photographs are done already")

    def make(id: str) -> Job:
        size = extents[id][0] * extents[id][1] / 1e6
        if config.resolution == "square":
            side = int(model.preprocessing["average"].shape[-1])
            return Job.call(id, tasks.squashed, tasks.Task(id=id, plan="", **common), side, size=size)
        target = _create_map(context, id, files, extents[id]) if config.write else None
        task = tasks.Task(id=id, plan=files.path(extents[id]), extremes=known.get(id), write=target, **common)
        return Job(id, tasks.reduction(task), size=size)

    def result(id: str, value: tasks.Result) -> None:
        overview = overview_path(context, context.name, id)
        with replacing(overview) as temporary, temporary.open("wb") as file:
            np.save(file, value.overview)
        record = {"id": id, "y_px": value.peak.y_px, "x_px": value.peak.x_px, "value": value.peak.value}
        if config.write:  # a map appears under its name when it is whole
            final = maps_path(context) / encode_id(id)
            shutil.rmtree(final, ignore_errors=True)
            _map_path(context, id).rename(final)
        done[id] = {**record, "probability": value.probability}
        journal.append(done[id])

    if config.write and not (maps_path(context) / "zarr.json").exists():
        zarr.create_group(maps_path(context))
    missing = [id for id in samples["id"] if id not in done]
    parts = None if config.resolution == "square" else sum(files.tiles(extents[id]) for id in missing)
    run_jobs(context, context.name, missing, make, result, parts)
    table = pd.DataFrame([done[id] for id in samples["id"]], columns=["id", "y_px", "x_px", "value", "probability"])
    write_table(centres_path(context, context.name), table)


class _Plans:
    """One recorded plan for each size of photograph, in the run's folder; an unfinished run's plan is used again."""

    def __init__(self, config: SaliencyConfig, context: Context, net: Any) -> None:
        self.config, self.context, self.network = config, context, trace(net)
        self._plans: dict[tuple[int, int], tuple[str, int]] = {}

    def path(self, extent: tuple[int, int]) -> str:
        if extent not in self._plans:
            self._plans[extent] = self._record(extent)
        return self._plans[extent][0]

    def tiles(self, extent: tuple[int, int]) -> int:
        self.path(extent)
        return self._plans[extent][1]

    def _record(self, extent: tuple[int, int]) -> tuple[str, int]:
        path = self.context.partial_path / f"plan-{extent[0]}x{extent[1]}.json"
        if not path.exists():
            layout = plan(
                self.network,
                extent,
                memory=None if self.config.tile_px else int(self.context.cluster.memory),
                tile=self.config.tile_px,
                channels_out=1 if self.config.reduce == "mean" else self.network.channels,
            )
            self.context.say(f"{self.context.name}: {layout}")
            with replacing(path) as temporary:
                temporary.write_text(layout.to_json())
        layout = TilePlan.from_json(path.read_text())
        # named by content: workers keep plans by path, and a name must never mean two plans
        stamp = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        recorded = self.context.run / "plans" / f"{extent[0]}x{extent[1]}-{stamp}.json"
        if not recorded.exists():
            with replacing(recorded) as temporary:
                temporary.write_bytes(path.read_bytes())
        return str(recorded), len(layout.tiles)


def _create_map(context: Context, id: str, plans: _Plans, extent: tuple[int, int]) -> str:
    """An empty map on disk, chunked as the plan's cells are: each task owns whole chunks."""
    path = _map_path(context, id)
    chunks = tasks.read_plan(plans.path(extent)).tile_px
    zarr.create_array(
        path,
        shape=extent,
        chunks=tuple(map(min, chunks, extent)),
        dtype="f4",
        overwrite=True,
        dimension_names=["y", "x"],
    )
    return str(path)


def _map_path(context: Context, id: str) -> Path:
    return context.partial_path / "maps" / encode_id(id)


def maps_path(context: Context) -> Path:
    return context.run / f"{context.name}.zarr"


def centres_path(context: Context, name: str) -> Path:
    return context.run / ("centres.parquet" if name == "saliency" else f"{name}.parquet")


def overview_path(context: Context, name: str, id: str) -> Path:
    folder = "overviews" if name == "saliency" else f"{name}_overviews"
    return context.run / folder / f"{encode_id(id)}.npy"


def reads(config: SaliencyConfig, context: Context) -> Iterable[Path]:
    return [locate(context, config.model), *([path_of(context)] if config.splits else [])]


def writes(config: SaliencyConfig, context: Context) -> Iterable[Path]:
    folder = overview_path(context, context.name, "x").parent
    maps = [maps_path(context)] if config.write else []
    return [centres_path(context, context.name), folder, *maps]


STAGE = Stage("saliency", SaliencyConfig, run, reads, writes)
