"""Local descriptors of photographs: the bags that bags of visual words are made of (paper B, 3.3)."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr
from pydantic import Field
from zarr.codecs import ZstdCodec

from tilestream.cluster import Job, Reduction, tile_done
from tilestream.geometry import Extent, Region
from tilestream.methods import Border
from tilestream.methods.descriptors import (
    Bag,
    Channel,
    Dense,
    Method,
    Sift,
    Surf,
    cores,
    describe,
    strongest,
    tile_bytes,
)
from tilestream.store import Store

from .base import Context, Stage, StageConfig, write_json
from .jobs import Load, run_jobs
from .runner import Journal
from .saliency import quarantine_path
from .saliency_config import field_of_view
from .split import chosen, path_of, read_table, write_table

Floats = npt.NDArray[np.float32]
_CHUNK_ROWS = 4096


class DescriptorsConfig(StageConfig):
    """Describes local features of photographs, at keypoints or on a grid, inside their field of view."""

    method: Literal["sift", "surf", "dense"] = Field(
        "sift",
        description="sift: RootSIFT at OpenCV's keypoints; surf: mahotas' SURF (an extra); dense: RootSIFT on a grid",
    )
    side_px: int | None = Field(
        None,
        ge=64,
        description="describe the smallest stored level whose longer side has so many px (default: the photograph "
        "itself): photographs of several cameras at about one resolution",
    )
    channel: Channel = Field("green", description="what is described: the green channel, or the grey levels of all")
    most: int = Field(
        4096, ge=1, le=2**20, description="descriptors a photograph: the strongest; of a grid, a random choice by place"
    )
    border: float = Field(
        0.03, ge=0, lt=0.5, description="share left out at each side of the field of view, or of a frame without one"
    )
    contrast: float = Field(0.01, gt=0, le=1, description="sift: OpenCV's contrastThreshold; the lower, the more")
    threshold: float = Field(0.1, gt=0, description="surf: threshold of mahotas' interest points; the lower, the more")
    min_size_px: float = Field(
        4, ge=0, description="sift, surf: least size of a keypoint, 2 sigma, in px of what is described"
    )
    max_size_px: float = Field(64, ge=4, le=64, description="sift, surf: its largest size; tiles' halos grow with it")
    patch_px: list[int] = Field([32], description="dense: sides of the patches, in px of each scale")
    scales: list[int] = Field([1, 2, 4], description="dense: the image halved to 1 / scale, for each; powers of two")
    step_px: int = Field(32, ge=1, description="dense: the grid's step, in px of each scale")
    tile_px: int = Field(1536, ge=64, description="side of the tiles in px")
    splits: list[str] | None = Field(None, description="only photographs of these splits (default: all)")
    limit: int | None = Field(None, ge=1, description="only the first so many photographs")

    @property
    def by(self) -> Method:
        """How windows are described; ValueError for settings that contradict each other."""
        if self.min_size_px > self.max_size_px:
            raise ValueError(f"min_size_px={self.min_size_px} is above max_size_px={self.max_size_px}; nothing is left")
        if self.method == "dense":
            return Dense(tuple(self.patch_px), tuple(self.scales), self.step_px)
        if self.method == "surf":
            return Surf(self.threshold, self.min_size_px, self.max_size_px)
        return Sift(self.contrast, self.min_size_px, self.max_size_px)


@dataclass(frozen=True)
class Task:
    """One photograph: everything by name, so that it pickles small."""

    store: str
    id: str
    level: int
    method: Method
    channel: Channel
    border: Border
    most: int
    out: str
    start: int
    threads: int


class Bags(Sequence[Floats]):
    """The bags of photographs, read as they are asked for: bags[i] is (n_i, d) float32, of the photograph ids[i]."""

    def __init__(self, path: Path, table: pd.DataFrame) -> None:
        """`table` has id, start and count: a bag's rows in the arrays of `path`."""
        self.path, self.ids = path, list(table["id"])
        self._rows = list(zip(table["start"].astype(int), table["count"].astype(int), strict=True))
        self._descriptors, self._keypoints = (zarr.open_array(path / n, mode="r") for n in ("descriptors", "keypoints"))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Floats:  # type: ignore[override]
        """A bag, the strongest descriptor first; IndexError beyond the last."""
        return self._read(self._descriptors, index)

    def keypoints(self, index: int) -> Floats:
        """Where a bag's descriptors were taken: (n_i, 4) float32, y_px, x_px, size_px (2 sigma; of a grid's patch a
        sixth of its side), angle_deg; px of the photograph, centres of pixels are integers.
        """
        return self._read(self._keypoints, index)

    @property
    def counts(self) -> list[int]:
        """Descriptors a bag."""
        return [count for _, count in self._rows]

    @property
    def dim(self) -> int:
        """Length d of a descriptor."""
        return int(self._descriptors.shape[1])

    @property
    def settings(self) -> dict[str, Any]:
        """What decides how photographs were described."""
        return dict(zarr.open_group(self.path, mode="r").attrs)

    def check(self, name: str, settings: Mapping[str, Any] | None) -> None:
        """ValueError unless the words of the stage `name` were learnt of descriptors made by the same settings."""
        if settings is None:
            raise ValueError(f"{name} does not say of which descriptors its words are; learn them again")
        mine = self.settings
        if other := sorted(key for key in {*mine, *settings} if mine.get(key) != settings.get(key)):
            said = ", ".join(f"{key}={mine.get(key)!r} instead of {settings.get(key)!r}" for key in other)
            raise ValueError(f"{self.path.stem} was made with {said}, by which the words of {name} were learnt; set "
                             "descriptors, or describe photographs as then")  # fmt: skip

    def select(self, ids: Iterable[str]) -> Bags:
        """The bags of these photographs, in this order; ValueError for one that has none."""
        rows = dict(zip(self.ids, self._rows, strict=True))
        wanted = list(ids)
        if lost := [id for id in wanted if id not in rows]:
            raise ValueError(f"id={lost[0]!r} has no bag in {self.path.name} ({len(lost)} lack one); describe it first")
        table = pd.DataFrame([(id, *rows[id]) for id in wanted], columns=["id", "start", "count"])
        return Bags(self.path, table)

    def _read(self, array: zarr.Array[Any], index: int) -> Floats:
        start, count = self._rows[index]
        found: Floats = np.asarray(array[start : start + count], np.float32)
        return found


def read_descriptors(context: Context, name: str = "descriptors") -> Bags:
    """The bags that the stage `name` made in this run; ValueError where it has not run."""
    return Bags(zarr_path(context, name), read_table(table_path(context, name), "descriptors"))


def run(config: DescriptorsConfig, context: Context) -> None:
    """Writes descriptors.zarr: descriptors (n, d) and keypoints (n, 4), float32, and descriptors.parquet: id, start,
    count, the rows of each photograph, the strongest first. Between bags lie rows without content: a bag begins at a
    chunk, for a chunk belongs to one task. `read_descriptors` reads them.

    Under another stage name S the files are S.zarr and S.parquet. Finished photographs are in the journal. Photographs
    at which worker processes die are left out, and told in quarantine/S.json: [{id, reason}].
    """
    samples = chosen(context, config.splits, config.limit)
    if not len(samples):
        raise ValueError(f"splits={config.splits}: no photograph is in them")
    method, store, threads = config.by, context.store, context.cluster.threads
    tiles = {id: _tiles(store, id, config, context) for id in samples["id"]}  # id: level, its extent, bands of tiles
    rows = min(config.most, _CHUNK_ROWS)
    room = -(-config.most // rows) * rows
    starts = {id: index * room for index, id in enumerate(samples["id"])}
    out = context.partial_path / "bags.zarr"
    journal = Journal(context.partial_path / "descriptors.jsonl")
    if not (out / "keypoints" / "zarr.json").exists():
        journal.path.unlink(missing_ok=True)  # it speaks of bags that a killed run had moved to their place already
        _create(out, room * len(samples), rows, method.dim, config)
    done = {id: record for id, record in journal.read().items() if id in starts}
    if done:
        context.say(f"{context.name}: {len(done)} of {len(samples)} photographs are done already")
    missing = [id for id in samples["id"] if id not in done]
    framed = [id for id in missing if field_of_view(store, id) is None]
    if framed:
        context.say(
            f"{context.name}: {len(framed)} photographs have no field of view, so the border is the frame's for them: "
            f"{', '.join(framed[:5])}"
        )
    place = str(context.store_path)

    def make(id: str) -> Job:
        level, extent, bands = tiles[id]
        photograph = store.levels(id)[0][1:]
        border = Border(extent, config.border, field_of_view(store, id), photograph)
        task = Task(id=id, store=place, level=level, method=method, channel=config.channel, border=border,
                    most=config.most, out=str(out), start=starts[id], threads=threads)  # fmt: skip
        size = photograph[0] * photograph[1] / 1e6
        return Job(id, reduction(task, bands), size=size, tiles=sum(map(len, bands)))

    def result(id: str, count: int) -> None:
        done[id] = {"id": id, "start": starts[id], "count": count}
        journal.append(done[id])

    def poison(id: str, reason: str) -> None:
        done[id] = {"id": id, "quarantined": reason}
        journal.append(done[id])

    most = max(len(bands) for _, _, bands in tiles.values())
    load = Load(tasks=most, held_bytes=most * config.most * 4 * (method.dim + 5),
                tiles=sum(len(band) for id in missing for band in tiles[id][2]))  # fmt: skip
    run_jobs(context, context.name, missing, make, result, load, poison)
    _finish(context, out, [done[id] for id in samples["id"]])


def _tiles(
    store: Store, id: str, config: DescriptorsConfig, context: Context
) -> tuple[int, Extent, list[list[Region]]]:
    """The level to describe, its extent, and its tiles in bands: rows of them."""
    extents, budget = [(height, width) for _, height, width in store.levels(id)], int(context.cluster.memory)
    fit = [level for level, extent in enumerate(extents) if config.side_px and max(extent) >= config.side_px]
    level = max(fit, default=0)
    extent = extents[level]
    needed = tile_bytes(config.by, min(config.tile_px, max(extent)))
    if needed > budget:
        raise ValueError(
            f"tile_px={config.tile_px} takes {needed / 2**20:.0f} MiB a tile, memory is {budget / 2**20:.0f} MiB; use "
            "smaller tiles, a smaller max_size_px, or --memory"
        )
    return level, extent, [list(band) for _, band in groupby(cores(extent, config.tile_px), lambda core: core.y0)]


def reduction(task: Task, bands: list[list[Region]]) -> Reduction:
    """A photograph's bag: bands of tiles give their strongest descriptors, the strongest of all are written."""
    return Reduction(tuple(bands), partial(_band, task), {0: tuple(range(len(bands)))}, partial(_write, task), _only)


def _band(task: Task, tiles: list[Region]) -> Mapping[int, Bag]:
    """The strongest of a row of tiles, on a worker, one tile in memory at a time."""
    cv2.setNumThreads(task.threads)
    image = Store(task.store).image(task.id, task.level)

    def each() -> Iterable[Bag]:
        for core in tiles:
            yield describe(task.method, image, core, task.border, task.channel)
            tile_done()

    return {0: strongest(each(), task.method.dim, task.most)}


def _write(task: Task, _: int, bands: list[Bag]) -> int:
    """Writes a photograph's bag, whole chunks of its own; returns how many descriptors it has."""
    bag = strongest(bands, task.method.dim, task.most)
    scale = [
        whole / n for n, whole in zip(task.border.extent, task.border.photograph or task.border.extent, strict=True)
    ]
    keypoints = bag.keypoints.astype(np.float64)
    keypoints[:, :2] = (keypoints[:, :2] + 0.5) * scale - 0.5
    keypoints[:, 2] *= np.sqrt(scale[0] * scale[1])
    group, rows = zarr.open_group(task.out, mode="r+"), slice(task.start, task.start + len(keypoints))
    for name, values in (("descriptors", bag.descriptors), ("keypoints", keypoints.astype(np.float32))):
        array = group[name]
        assert isinstance(array, zarr.Array)
        array[rows] = values
    return len(keypoints)


def _only(counts: list[int]) -> int:
    return counts[0]


def _create(path: Path, count: int, rows: int, dim: int, config: DescriptorsConfig) -> None:
    settings = config.model_dump(mode="json", exclude={"tile_px", "splits", "limit"})
    group = zarr.create_group(path, overwrite=True, attributes=settings)
    for name, width, second in (("descriptors", dim, "component"), ("keypoints", 4, "place")):
        group.create_array(
            name,
            shape=(count, width),
            chunks=(rows, width),
            dtype="f4",
            compressors=ZstdCodec(level=3, checksum=True),
            dimension_names=["descriptor", second],
        )
    group["keypoints"].attrs["place"] = ["y_px", "x_px", "size_px", "angle_deg"]


def _finish(context: Context, out: Path, records: list[dict[str, int | str]]) -> None:
    """Bags in their place, their table, and what was lost."""
    rows = [record for record in records if "quarantined" not in record]
    lost = [{"id": record["id"], "reason": record["quarantined"]} for record in records if "quarantined" in record]
    if not rows:
        raise RuntimeError(f"{context.name}: worker processes die at every photograph; the first: {lost[0]['reason']}")
    if lost:
        context.say(
            f"{context.name}: {len(lost)} photographs are quarantined: {', '.join(str(r['id']) for r in lost[:5])}"
        )
    write_json(quarantine_path(context, context.name), lost)
    table = pd.DataFrame(rows, columns=["id", "start", "count"])
    write_table(table_path(context, context.name), table)
    final = zarr_path(context, context.name)
    shutil.rmtree(final, ignore_errors=True)
    out.rename(final)
    bare = table.loc[table["count"] == 0, "id"]
    said = f"; {len(bare)} have none: {', '.join(bare[:5])}" if len(bare) else ""
    context.say(
        f"{context.name}: {int(table['count'].sum())} descriptors of {len(table)} photographs, "
        f"{int(table['count'].median())} in the middle, {int(table['count'].max())} at most{said}"
    )


def zarr_path(context: Context, name: str) -> Path:
    return context.run / f"{name}.zarr"


def table_path(context: Context, name: str) -> Path:
    return context.run / f"{name}.parquet"


def reads(config: DescriptorsConfig, context: Context) -> Iterable[Path]:
    return [path_of(context)] if config.splits else []


def writes(config: DescriptorsConfig, context: Context) -> Iterable[Path]:
    name = context.name
    return [zarr_path(context, name), table_path(context, name), quarantine_path(context, name)]


STAGE = Stage("descriptors", DescriptorsConfig, run, reads, writes)
