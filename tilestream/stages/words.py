"""What a bag of visual words has learnt: where its words are, and on which photographs (paper B, 4.2, Figs. 4, 5)."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr
from pydantic import Field
from scipy.stats import false_discovery_control, fisher_exact
from zarr.codecs import ZstdCodec

from tilestream.cluster import Job
from tilestream.methods.metrics import wilson
from tilestream.nets import Model
from tilestream.report.words import word_map
from tilestream.store.layout import encode_id

from . import words_tasks as tasks
from .base import Context, Stage, StageConfig, digest
from .convbovw import ARCHITECTURE, labelled
from .descriptors import Bags, read_descriptors, table_path, zarr_path
from .jobs import Load, run_jobs
from .models import read_model
from .preprocess import average_of, ensure_extremes
from .report_gallery import small, spread
from .runner import Journal
from .scores import graded
from .split import path_of, write_table
from .words_tasks import Task

Floats = npt.NDArray[np.float32]
LEARNERS = ("bovw", "convbovw_sparse", "search", "convbovw_dense")
"""Stages that learn words."""
MARKED = 8
"""Words that are marked on a map, at most."""


class LearntConfig(StageConfig):
    """Looks at visual words: the patches where they are most, the photographs that have them, maps of them."""

    model: str = Field(
        "convbovw_sparse", description="the stage that learnt them: bovw, convbovw_sparse, search or convbovw_dense"
    )
    descriptors: str = Field("descriptors", description="the stage whose descriptors they are of, if they are of any")
    pathological_from: int = Field(
        1, ge=1, le=4, description="grades from here on are pathological, those below normal"
    )
    split: str = Field("test", description="the photographs in which words are looked for")
    limit: int | None = Field(None, ge=1, description="only the first so many of them")
    training: int = Field(
        200, ge=1, description="normal training photographs, at most: a word is active where it is more than in these"
    )
    tolerated: float = Field(0.0, ge=0, lt=1, description="share of them that it may be active in all the same")
    patches: int = Field(8, ge=1, le=100, description="patches a word, at most one a photograph")
    shown_px: int = Field(64, ge=8, le=512, description="side of a patch as it is kept")
    context: float = Field(2.0, ge=1, description="side of what it shows, in sides of what the word is of")
    maps: int = Field(6, ge=0, description="photographs of which a map of words is drawn")
    width_px: int = Field(640, ge=64, le=2048, description="width of a map")


@dataclass(frozen=True)
class Words:
    """The words of a model: its file, their weights in D (None for a dictionary), bags or extremes by photograph."""

    path: Path
    count: int
    weights: Floats | None
    bags: Bags | None
    model: Model | None


def run(config: LearntConfig, context: Context) -> None:
    """Writes words.parquet, a row a word; words_patches.parquet and words_patches.zarr, the patches where each is most
    in the photographs of `split`; and words_maps/ID.png. Under another stage name S the files are S.parquet ...

    words.parquet: word, weight (of D, for pathological less for normal; NaN for a dictionary), threshold, activation
    (the highest), active_normal of normal photographs and normal_share with its Wilson interval (normal_low,
    normal_high), the same for pathological ones, p (Fisher's exact test, two-sided), p_adjusted (Benjamini and
    Hochberg's, over all words), pathological_only: active in no normal photograph and p_adjusted below 0.05.
    words_patches.parquet: word, rank, id, label, activation, y_px, x_px, side_px. Photographs that are done are in the
    journal.
    """
    words, table = _read(config, context), graded(context, config.pathological_from)
    if words.bags is not None:
        table = table[table["id"].isin(words.bags.ids)].reset_index(drop=True)
    training = labelled(table, "train")
    normal = training[training["label"] == 0].head(config.training)
    counted = table[(table["split"] == config.split) & table["label"].notna()].reset_index(drop=True)
    counted = counted.head(config.limit) if config.limit else counted
    if not len(counted):
        raise ValueError(f"split={config.split!r} has no photograph with a label, and words of {config.model}")
    task = _tasks(context, words, list(dict.fromkeys([*normal["id"], *counted["id"]])))
    found = _activations(context, words, task, [*normal["id"], *counted["id"]])
    before, here = (np.stack([found[id][:, 0] for id in part["id"]]) for part in (normal, counted))
    thresholds = np.quantile(before, 1 - config.tolerated, axis=0, method="higher")
    learnt = active(here, counted["label"].to_numpy(np.int64), thresholds, words.weights)
    most = highest(found, counted, config.patches)
    _write_patches(config, context, most, words.count)
    maps = _draw(config, context, [task(id) for id in spread(counted, config.maps)["id"]], found, learnt)
    shutil.rmtree(maps_path(context, context.name), ignore_errors=True)
    maps.rename(maps_path(context, context.name))
    write_table(patches_path(context, context.name), most)
    write_table(words_path(context, context.name), learnt)
    alone = learnt.loc[learnt["pathological_only"], "word"].tolist()
    context.say(f"{context.name}: {len(learnt)} words, {len(alone)} on pathological photographs only: {alone[:10]}")


def active(
    activation: Floats, labels: npt.NDArray[np.int64], thresholds: Floats, weights: Floats | None = None
) -> pd.DataFrame:
    """words.parquet, as `run` says: from activations (photographs, words), labels 0 or 1, and thresholds (words,)."""
    there, rows = activation > thresholds, []
    totals = {"normal": labels == 0, "pathological": labels == 1}
    for word in range(activation.shape[1]):
        row: dict[str, Any] = {"word": word, "weight": np.nan if weights is None else float(weights[word])}
        row |= {"threshold": float(thresholds[word]), "activation": float(activation[:, word].max())}
        counts = {name: int(there[which, word].sum()) for name, which in totals.items()}
        for name, count in counts.items():
            total = int(totals[name].sum())
            low, high = wilson(count, total) or (np.nan, np.nan)
            share = count / total if total else np.nan
            row |= {f"active_{name}": count, name: total, f"{name}_share": share}
            row |= {f"{name}_low": low, f"{name}_high": high}
        row["p"] = float(fisher_exact([[row[f"active_{n}"], row[n] - row[f"active_{n}"]] for n in totals]).pvalue)
        rows.append(row)
    table = pd.DataFrame(rows)
    table["p_adjusted"] = false_discovery_control(table["p"])
    table["pathological_only"] = (table["active_normal"] == 0) & (table["p_adjusted"] < 0.05)
    return table


def striking(words: pd.DataFrame) -> pd.DataFrame:
    """Rows of words.parquet, the best signs of pathological photographs first: by p, then by weight."""
    less = words["pathological_share"] < words["normal_share"]
    order = words.assign(less=less, lighter=-words["weight"].fillna(0)).sort_values(["less", "p", "lighter", "word"])
    return order.drop(columns=["less", "lighter"]).reset_index(drop=True)


def highest(found: dict[str, Floats], photographs: pd.DataFrame, count: int) -> pd.DataFrame:
    """words_patches.parquet: of each word the `count` photographs that have it most; of equals the first ones."""
    values, rows = np.stack([found[id] for id in photographs["id"]]), []  # (photographs, words, 4)
    ids, labels = photographs["id"].to_numpy(), photographs["label"].to_numpy(np.int64)
    for word in range(values.shape[1]):
        order = np.argsort(-values[:, word, 0], kind="stable")[:count]
        kept = [i for i in order if values[i, word, 0] > 0]
        rows += [(word, rank, ids[i], labels[i], *values[i, word].tolist()) for rank, i in enumerate(kept)]
    return pd.DataFrame(rows, columns=["word", "rank", "id", "label", "activation", "y_px", "x_px", "side_px"])


def _read(config: LearntConfig, context: Context) -> Words:
    """The words, from the file of the stage that learnt them."""
    path = model_path(context, config.model)
    if path.suffix == ".json":
        kept, described = json.loads(path.read_text()), read_descriptors(context, config.descriptors)
        described.check(config.model, kept.get("descriptors"))
        return Words(path, len(kept["dictionary"]["words_"]), None, described, None)
    model = read_model(context, config.model)
    if model.architecture != ARCHITECTURE:
        raise ValueError(f"model={config.model!r} is a {model.architecture}, which has no words; name a stage that "
                         "learns words")  # fmt: skip
    net: Any = model.net
    weights = (net.classifier.weight[1] - net.classifier.weight[0]).detach().numpy()
    images = model.parameters["instances"] == "images"
    bags = None if images else read_descriptors(context, config.descriptors)
    if bags is not None:
        bags.check(config.model, model.preprocessing.get("descriptors"))
    return Words(path, len(weights), weights, bags, model)


def _tasks(context: Context, words: Words, ids: list[str]) -> Callable[[str], Task]:
    """Makes the task of a photograph."""
    known, device = {}, "cpu"
    if words.bags is None:
        assert words.model is not None
        known = ensure_extremes(context, average_of(words.model.preprocessing, words.path.stem), ids)
        device = context.device
    common: dict[str, Any] = {
        "store": str(context.store_path), "model": str(words.path), "sha256": digest(words.path),
        "words": words.count, "memory": int(context.cluster.memory), "device": device,
        "threads": context.cluster.threads,
    }  # fmt: skip
    return lambda id: Task(id=id, bag=words.bags and words.bags.select([id]), extremes=known.get(id), **common)


def _activations(context: Context, words: Words, task: Callable[[str], Task], ids: list[str]) -> dict[str, Floats]:
    """By photograph (words, 4): how much each word is there, and the place where most."""
    journal = Journal(context.partial_path / "words.jsonl")
    found = {id: _decoded(record["values"]).reshape(-1, 4) for id, record in journal.read().items()}
    if found:
        context.say(f"{context.name}: {len(found)} of {len(set(ids))} photographs are done already")

    def result(id: str, value: tuple[Floats, Floats]) -> None:
        found[id] = np.column_stack(value)
        journal.append({"id": id, "values": base64.b64encode(found[id].tobytes()).decode()})

    missing = [id for id in dict.fromkeys(ids) if id not in found]
    load = Load(device=task(ids[0]).device)
    run_jobs(context, context.name, missing, lambda id: Job.call(id, tasks.activations, task(id)), result, load)
    return found


def _decoded(text: str) -> Floats:
    return np.frombuffer(base64.b64decode(text), np.float32)


def _write_patches(config: LearntConfig, context: Context, most: pd.DataFrame, count: int) -> None:
    """words_patches.zarr: (words, patches, 3, shown_px, shown_px) uint8, cut over the cluster, a photograph a task."""
    pixels = np.zeros((count, config.patches, 3, config.shown_px, config.shown_px), np.uint8)
    parts = dict(list(most.groupby("id")))

    def make(id: str) -> Job:
        rows = parts[id]
        places = list(zip(rows["y_px"], rows["x_px"], rows["side_px"] * config.context, strict=True))
        return Job.call(id, tasks.patches, str(context.store_path), id, places, config.shown_px)

    def result(id: str, found: tasks.Pixels) -> None:
        pixels[parts[id]["word"], parts[id]["rank"]] = found

    run_jobs(context, f"{context.name} patches", list(parts), make, result)
    zarr.create_array(
        zarr_of(context, context.name), data=pixels, chunks=(1, *pixels.shape[1:]),
        compressors=ZstdCodec(level=3, checksum=True), dimension_names=["word", "rank", "c", "y", "x"], overwrite=True,
    )  # fmt: skip


def _draw(
    config: LearntConfig, context: Context, asked: list[Task], found: dict[str, Floats], learnt: pd.DataFrame
) -> Path:
    """Maps of photographs: where words are active, and the word that is there most at each place."""
    folder, order = context.partial_path / "maps", striking(learnt)["word"].to_numpy()
    folder.mkdir(exist_ok=True)
    by_id = {task.id: task for task in asked}

    def result(id: str, value: tuple[npt.NDArray[np.uint16], Floats]) -> None:
        picture, extent = small(context, id, config.width_px)
        active = [word for word in order if found[id][word, 0] > learnt["threshold"][word]]
        marks = {int(word): found[id][word, 1:].tolist() for word in active[:MARKED]}
        data = word_map(picture, extent, *value, marks, round_places=by_id[id].bag is not None)
        (folder / f"{encode_id(id)}.png").write_bytes(data)

    load = Load(device=asked[0].device if asked else "cpu")
    run_jobs(
        context, f"{context.name} maps", list(by_id), lambda id: Job.call(id, tasks.winners, by_id[id]), result, load
    )
    return folder


def model_path(context: Context, name: str) -> Path:
    """The file that a stage has learnt: a network's, or a dictionary's."""
    network, dictionary = (context.models_path / f"{name}{end}" for end in (".safetensors", ".json"))
    return dictionary if dictionary.exists() and not network.exists() else network


def count_of(context: Context, name: str) -> int | None:
    """How many words a stage has learnt; None where it has left no file."""
    path = model_path(context, name)
    if not path.exists():
        return None
    if path.suffix == ".json":
        return len(json.loads(path.read_text())["dictionary"]["words_"])
    return int(read_model(context, name).parameters["words"])


def words_path(context: Context, name: str) -> Path:
    return context.run / f"{name}.parquet"


def patches_path(context: Context, name: str) -> Path:
    return context.run / f"{name}_patches.parquet"


def zarr_of(context: Context, name: str) -> Path:
    return context.run / f"{name}_patches.zarr"


def maps_path(context: Context, name: str) -> Path:
    return context.run / f"{name}_maps"


def reads(config: LearntConfig, context: Context) -> Iterable[Path]:
    described = [part(context, config.descriptors) for part in (zarr_path, table_path)]
    return [path_of(context), model_path(context, config.model), *described]


def writes(config: LearntConfig, context: Context) -> Iterable[Path]:
    return [part(context, context.name) for part in (words_path, patches_path, zarr_of, maps_path)]


STAGE = Stage("words", LearntConfig, run, reads, writes)
