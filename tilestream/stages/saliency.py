"""Saliency maps of photographs, tile by tile over the cluster: crop centres, small pictures, maps on request."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd
import zarr
from pydantic import Field

from tilestream.cluster import Job, prepared, tell
from tilestream.engine import SaliencyPass
from tilestream.methods import crop_region
from tilestream.store.layout import encode_id

from . import saliency_tasks as tasks
from .base import Context, Stage, StageConfig, digest, replacing, write_json
from .jobs import Load, run_jobs
from .models import locate, read_model
from .preprocess import ensure_extremes
from .runner import Journal
from .saliency_plans import Plans, Shares
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
    granularity: Literal["auto", "image", "band", "tile"] = Field(
        "auto",
        description="what one task computes: a whole image, a row of tiles, a tile, or what should be fastest",
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="bf16 is faster where workers have it; its error is measured and said"
    )
    write: bool = Field(False, description="keep the maps at full resolution, as saliency.zarr/ID, a chunk a tile")


def run(config: SaliencyConfig, context: Context) -> None:
    """Writes centres.parquet (id, y_px, x_px, value, probability) and overviews/ID.npy; maps on request.

    Under another stage name S the files are S.parquet and S_overviews. Finished photographs are in the journal.
    Photographs at which worker processes die are left out, and told in quarantine/S.json: [{id, reason}].
    """
    samples = chosen(context, config.splits, config.limit)
    model = read_model(context, config.model, config.net)
    average = model.preprocessing.get("average")
    extents = {row.id: (int(row.height), int(row.width)) for row in samples.itertuples()}
    files = Plans(config, context, model.net)
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
    path, device = locate(context, config.model), context.device
    common: dict[str, Any] = {
        "store": str(context.store_path),
        "model": str(path),
        "model_sha256": digest(path),
        "net": config.net,
        "target": config.target,
        "method": config.method,
        "reduce": config.reduce,
        "border": config.border,
        "precision": config.precision,
        "device": device,
        "threads": context.cluster.threads,
    }
    _same_machine(context, device)
    journal = Journal(context.partial_path / "centres.jsonl")
    done = {id: record for id, record in journal.read().items() if id in extents}
    if done:
        context.say(f"{context.name}: {len(done)} of {len(samples)} photographs are done already")
    missing = [id for id in samples["id"] if id not in done]
    chosen_by = Shares(config, context, files, [extents[id] for id in missing])

    def make(id: str) -> Job:
        size = extents[id][0] * extents[id][1] / 1e6
        if config.resolution == "square":
            side = int(model.preprocessing["average"].shape[-1])
            return Job.call(id, tasks.squashed, tasks.Task(id=id, plan="", **common), side, size=size)
        target = _create_map(context, id, files, extents[id]) if config.write else None
        share = chosen_by.of(extents[id])
        task = tasks.Task(
            id=id, plan=files.path(extents[id]), extremes=known.get(id), write=target, granularity=share, **common
        )
        return Job(id, tasks.reduction(task), size=size, tiles=files.tiles(extents[id]))

    pictures = _Pictures(context)

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
        pictures.show(id, value, extents[id])

    def poison(id: str, reason: str) -> None:
        done[id] = {"id": id, "quarantined": reason}
        journal.append(done[id])

    if config.write and not (maps_path(context) / "zarr.json").exists():
        zarr.create_group(maps_path(context))
    with prepared(context.client(), [partial(tasks.prepare, tasks.Task(id="", plan="", **common))] if missing else []):
        if config.precision == "bf16" and missing:
            _say_error(context, tasks.Task(id=missing[0], plan="", extremes=known.get(missing[0]), **common))
        run_jobs(context, context.name, missing, make, result, chosen_by.load(device), poison)
    rows = [done[id] for id in samples["id"] if "quarantined" not in done[id]]
    lost = [{"id": id, "reason": done[id]["quarantined"]} for id in samples["id"] if "quarantined" in done[id]]
    if not rows:
        raise RuntimeError(f"{context.name}: worker processes die at every photograph; the first: {lost[0]['reason']}")
    if lost:
        context.say(f"{context.name}: {len(lost)} photographs are quarantined: {', '.join(r['id'] for r in lost[:5])}")
    write_json(quarantine_path(context, context.name), lost)
    table = pd.DataFrame(rows, columns=["id", "y_px", "x_px", "value", "probability"])
    write_table(centres_path(context, context.name), table)


def _same_machine(context: Context, device: str) -> None:
    """Unfinished work goes on with what it was begun with: other threads or devices change last bits."""
    path, mine = context.partial_path / "machine.json", {"threads": context.cluster.threads, "device": device}
    if not path.exists():
        write_json(path, mine)
    for name, was in json.loads(path.read_text()).items():
        if was != mine[name]:
            raise ValueError(
                f"{name}={mine[name]}, but the unfinished work was done with {name}={was}, and results would mix; give "
                f"--{name} {was}, or leave out --resume to start afresh"
            )


def _say_error(context: Context, task: tasks.Task) -> None:
    """How far bf16 is from float32, measured on a worker on the middle of one photograph."""

    def said(id: str, found: tuple[float, float]) -> None:
        distance, moved_px = found
        context.say(
            f"{context.name}: bf16 differs from float32 by {distance:.1%} of the map's norm in the middle of {id}; its "
            f"highest point there lies {moved_px:.0f} px away"
        )

    run_jobs(context, "bf16", [task.id], lambda id: Job.call(id, tasks.distance_to_float32, task), said,
             Load(device=task.device))  # fmt: skip


class _Pictures:
    """The latest map for who watches the dashboard, small, every other second at most."""

    def __init__(self, context: Context) -> None:
        self.context, self.shown_s = context, float("-inf")

    def show(self, id: str, value: tasks.Result, extent: tuple[int, int]) -> None:
        if time.monotonic() - self.shown_s < 2 or not self.context.page.endswith("tilestream"):
            return
        self.shown_s = time.monotonic()
        values = value.overview[:: max(1, value.overview.shape[0] // 400), :: max(1, value.overview.shape[1] // 400)]
        finite = values[np.isfinite(values)]
        low, high = np.quantile(finite, [0.02, 0.999]) if finite.size else (0.0, 1.0)
        grey = (255 * np.clip((values - low) / max(high - low, 1e-30), 0, 1)).astype(np.uint8)
        colours = cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO)
        region = crop_region(extent, (value.peak.y_px, value.peak.x_px), 512)
        edges = (region.y0 / extent[0], region.x0 / extent[1], region.y1 / extent[0], region.x1 / extent[1])
        crop = [min(1.0, max(0.0, edge)) for edge in edges]
        png = base64.b64encode(cv2.imencode(".png", colours)[1].tobytes()).decode()
        fields = {"stage": self.context.name, "id": id, "png": png, "crop": crop, "value": value.peak.value}
        tell(self.context.client(), "picture", **self.context.labels, **fields)


def _create_map(context: Context, id: str, plans: Plans, extent: tuple[int, int]) -> str:
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


def quarantine_path(context: Context, name: str) -> Path:
    return context.run / "quarantine" / f"{name}.json"


def overview_path(context: Context, name: str, id: str) -> Path:
    folder = "overviews" if name == "saliency" else f"{name}_overviews"
    return context.run / folder / f"{encode_id(id)}.npy"


def reads(config: SaliencyConfig, context: Context) -> Iterable[Path]:
    return [locate(context, config.model), *([path_of(context)] if config.splits else [])]


def writes(config: SaliencyConfig, context: Context) -> Iterable[Path]:
    folder = overview_path(context, context.name, "x").parent
    maps = [maps_path(context)] if config.write else []
    return [centres_path(context, context.name), folder, quarantine_path(context, context.name), *maps]


STAGE = Stage("saliency", SaliencyConfig, run, reads, writes, operational=frozenset({"granularity"}))
