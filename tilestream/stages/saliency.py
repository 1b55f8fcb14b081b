"""Saliency maps of photographs, tile by tile over the cluster: crop centres, small pictures, maps on request."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import zarr

from tilestream.cluster import Job, prepared, tell
from tilestream.methods import FieldOfView, crop_region
from tilestream.nets import fully_convolutional
from tilestream.store.layout import encode_id

from . import saliency_tasks as tasks
from . import saliency_whole as whole
from .base import Context, Stage, digest, replacing, write_json
from .jobs import Load, run_jobs
from .models import locate, read_model
from .preprocess import ensure_extremes
from .runner import Journal
from .saliency_config import SaliencyConfig, field_of_view
from .saliency_plans import Plans, Shares, Whole, check_target, takes_whole
from .split import chosen, path_of, write_table


def run(config: SaliencyConfig, context: Context) -> None:
    """Writes centres.parquet (id, y_px, x_px, value, probability), candidates.parquet (id, rank, y_px, x_px, value) and
    overviews/ID.npy; maps on request. Rank 0 is the centre; a network that returns a map has no probability (NaN).

    Under another stage name S the files are S.parquet, S_candidates.parquet and S_overviews. Finished photographs are
    in the journal. Photographs at which worker processes die are left out, and told in quarantine/S.json: [{id,
    reason}].
    """
    samples = chosen(context, config.splits, config.limit)
    model = read_model(context, config.model, config.net)
    average = model.preprocessing.get("average")
    extents = {row.id: (int(row.height), int(row.width)) for row in samples.itertuples()}
    square, side = config.resolution == "square", 0 if average is None else int(average.shape[-1])
    if square and not side:
        raise ValueError(f"model={config.model!r} carries no square to squash to; use resolution=full")
    if square and config.write:
        raise ValueError("write=true keeps maps at full resolution, which resolution=square does not compute")
    net = model.net if config.window_px is None else fully_convolutional(model.net, config.window_px)
    plans = make_plans(config, context, net, sorted({(side, side)} if square else set(extents.values())))
    known = {}
    if average is not None and not square:
        known = ensure_extremes(context, np.asarray(average, np.float32), list(samples["id"]))
    path, device = locate(context, config.model), context.device
    common: dict[str, Any] = {
        "store": str(context.store_path),
        "model": str(path),
        "model_sha256": digest(path),
        "net": config.net,
        "target": config.target,
        "method": config.method,
        "noise": config.noise_of(255.0 if average is None else 1.0),
        "reduce": config.reduce,
        "border": config.border,
        "search": config.search,
        "precision": config.precision,
        "window_px": config.window_px,
        "device": device,
        "threads": context.cluster.threads,
        **(plans.budget if isinstance(plans, Whole) else {}),
    }
    _same_machine(context, device)
    journal = Journal(context.partial_path / "centres.jsonl")
    done = {id: record for id, record in journal.read().items() if id in extents}
    if done:
        context.say(f"{context.name}: {len(done)} of {len(samples)} photographs are done already")
    missing = [id for id in samples["id"] if id not in done]
    chosen_by = Shares(config, context, plans, [extents[id] for id in missing])
    store, fields = context.store, dict[str, FieldOfView | None]()

    def make(id: str) -> Job:
        size = extents[id][0] * extents[id][1] / 1e6
        fields[id] = field_of_view(store, id) if config.border_rule == "circle" else None
        task = tasks.Task(id=id, plan="", circle=fields[id], extremes=known.get(id), **common)
        if square:
            return Job.call(id, whole.square, task, side, size=size)
        task = replace(task, write=_create_map(context, id, plans, extents[id]) if config.write else None)
        if isinstance(plans, Whole):
            job = Job.call(id, whole.photograph, task, size=size)
            return replace(job, tiles=plans.tiles(extents[id]))
        task = replace(task, plan=plans.path(extents[id]), granularity=chosen_by.of(extents[id]))
        return Job(id, tasks.reduction(task), size=size, tiles=plans.tiles(extents[id]))

    pictures = _Pictures(context)

    def result(id: str, value: tasks.Result) -> None:
        overview = overview_path(context, context.name, id)
        with replacing(overview) as temporary, temporary.open("wb") as file:
            np.save(file, value.overview)
        if config.write:  # a map appears under its name when it is whole
            final = maps_path(context) / encode_id(id)
            shutil.rmtree(final, ignore_errors=True)
            _map_path(context, id).rename(final)
        centres = [{"y_px": c.y_px, "x_px": c.x_px, "value": c.value} for c in value.candidates]
        framed = fields.pop(id) is None and config.border_rule == "circle"
        done[id] = {"id": id, "candidates": centres, "probability": value.probability, "framed": framed}
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
    _write_tables(config, context, [done[id] for id in samples["id"]])


def make_plans(config: SaliencyConfig, context: Context, net: Any, extents: list[tuple[int, int]]) -> Plans | Whole:
    """How images of these extents are cut; before any work a small budget and an unknown target are said."""
    plans: Plans | Whole = Plans(config, context, net)
    for extent in extents[:1]:
        check_target(config, plans.network, extent)
    if takes_whole(config, plans.network):
        plans = Whole(config, context, net)
    for extent in extents:
        if isinstance(plans, Whole) or config.resolution == "full":
            plans.tiles(extent)
    return plans


def _write_tables(config: SaliencyConfig, context: Context, records: list[dict[str, Any]]) -> None:
    """Centres, candidates and quarantine, from the journal's records in order of id."""
    rows = [record for record in records if "quarantined" not in record]
    lost = [{"id": record["id"], "reason": record["quarantined"]} for record in records if "quarantined" in record]
    if not rows:
        raise RuntimeError(f"{context.name}: worker processes die at every photograph; the first: {lost[0]['reason']}")
    if lost:
        context.say(f"{context.name}: {len(lost)} photographs are quarantined: {', '.join(r['id'] for r in lost[:5])}")
    if framed := [row["id"] for row in rows if row["framed"]]:
        context.say(
            f"{context.name}: {len(framed)} of {len(rows)} photographs have no field of view, so the frame rule was "
            f"used for them: {', '.join(framed[:5])}"
        )
    write_json(quarantine_path(context, context.name), lost)
    centres = [{"id": r["id"], **r["candidates"][0], "probability": r["probability"]} for r in rows]
    table = pd.DataFrame(centres, columns=["id", "y_px", "x_px", "value", "probability"])
    write_table(centres_path(context, context.name), table.astype({"probability": "float64"}))
    ranks = [{"id": r["id"], "rank": rank, **centre} for r in rows for rank, centre in enumerate(r["candidates"])]
    table = pd.DataFrame(ranks, columns=["id", "rank", "y_px", "x_px", "value"])
    write_table(candidates_path(context, context.name), table)
    if len(table) < config.candidates * len(rows):
        fewer = int((table.groupby("id").size() < config.candidates).sum())
        context.say(
            f"{context.name}: {fewer} of {len(rows)} photographs have fewer than {config.candidates} candidates"
        )


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

    run_jobs(context, "bf16", [task.id], lambda id: Job.call(id, whole.distance_to_float32, task), said,
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


def _create_map(context: Context, id: str, plans: Plans | Whole, extent: tuple[int, int]) -> str:
    """An empty map on disk, chunked as the plan's cells are: each task owns whole chunks."""
    path = _map_path(context, id)
    chunks = (whole.BOX_PX, whole.BOX_PX) if isinstance(plans, Whole) else plans.layout(extent).tile_px
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


def candidates_path(context: Context, name: str) -> Path:
    return context.run / ("candidates.parquet" if name == "saliency" else f"{name}_candidates.parquet")


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
    tables = [centres_path(context, context.name), candidates_path(context, context.name)]
    return [*tables, folder, quarantine_path(context, context.name), *maps]


STAGE = Stage("saliency", SaliencyConfig, run, reads, writes, operational=frozenset({"granularity"}))
