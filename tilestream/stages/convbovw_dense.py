"""The convolutional bag of visual words over photographs: U runs over every patch, streamed at full resolution."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import nn

from tilestream.cluster import Job
from tilestream.engine import Streamed, stream
from tilestream.methods import Extremes, Normalised, Threshold, crop_region, cut, random_centre
from tilestream.methods.preprocessing import Floats
from tilestream.nets import build, save_model
from tilestream.store import Store
from tilestream.training import fit

from . import convbovw
from .base import Context, Stage, digest
from .convbovw import (
    ARCHITECTURE,
    WordsConfig,
    conclude,
    decide,
    keep_history,
    labelled,
    learn,
    stored,
    told,
)
from .jobs import Load, run_jobs
from .models import locate, own_device, read_once, steady
from .preprocess import average_of, average_path, ensure_extremes, read_average
from .runner import Journal
from .saliency_config import field_of_view
from .scores import graded
from .split import path_of
from .train import history_path

BORDER = 0.1
"""Share of the frame at each side, of the field of view where it is known, in which no crop has its centre."""


class ConvbovwDenseConfig(WordsConfig):
    """Learns visual words of patches jointly with the classifier (ConvBoVW), and decides by those of all patches."""

    patch_px: int = Field(46, description="side of the patches that words are of: 46, 62, 78 ... px")
    widths: list[int] = Field([16, 32, 64, 128], min_length=1, description="channels of the convolutions of U")
    side_px: int | None = Field(
        None,
        ge=64,
        description="run over the smallest stored level whose longer side has so many px (default: the photograph "
        "itself)",
    )
    crops: int = Field(4, ge=1, description="crops of a photograph on which it is trained first, un-tiled")
    crop_px: int = Field(512, ge=64, description="side of these crops")
    crop_epochs: int = Field(20, ge=1, description="passes over the crops; batch normalisation learns here")
    rotation_deg: float = Field(0.0, ge=0, le=180, description="rotate crops by a random angle of at most this")
    colour: float = Field(0.0, ge=0, lt=1, description="strength of random brightness and contrast of crops, 0..1")
    epochs: int = Field(
        2, ge=0, description="passes over whole photographs, streamed in the budget `memory`; may be raised on --resume"
    )
    full_learning_rate: float = Field(1e-4, gt=0, description="highest learning rate of these passes")


@dataclass(frozen=True)
class Photographs:
    """Photographs, or a level of theirs, (3, h, w) float32, normalised window by window; labels (n,) int64."""

    store: Store
    ids: Sequence[str]
    labels: np.ndarray
    average: Floats
    known: Mapping[str, Extremes]
    side_px: int | None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Normalised:
        id = self.ids[index]
        return photograph(self.store, id, self.average, self.known[id], self.side_px)


@dataclass(frozen=True)
class Crops:
    """Of each photograph `count` crops, (3, size_px, size_px) float32, with its label; their centres lie on the eye."""

    whole: Photographs
    count: int
    size_px: int
    seed: int

    @property
    def labels(self) -> np.ndarray:
        return np.repeat(self.whole.labels, self.count)

    def __len__(self) -> int:
        return len(self.whole) * self.count

    def __getitem__(self, index: int) -> Floats:
        number, of_it = divmod(index, self.count)
        image, id, store = self.whole[number], self.whole.ids[number], self.whole.store
        height, width = store.levels(id)[0][1:]
        place = random_centre((height, width), BORDER, self.seed, f"{id} {of_it}", field_of_view(store, id))
        y, x = (p * n // whole for p, n, whole in zip(place, image.shape[1:], (height, width), strict=True))
        values: Floats = cut(image, crop_region((image.shape[1], image.shape[2]), (y, x), self.size_px)).astype(
            np.float32
        )
        return values


def run(config: ConvbovwDenseConfig, context: Context) -> None:
    """Writes what `convbovw_sparse` does, training/NAME_crops.json too; training photographs are not predicted.

    The network is trained on crops with their photographs' labels, then on whole photographs by the exact engine, whose
    way back costs the tiles that won a word; both by epochs, with a checkpoint each for --resume. Decisions are made on
    the cluster, a photograph a task; those that are made are in the journal.
    """
    table = graded(context, config.pathological_from)
    if config.decision == "stored":
        model, path = stored(context), locate(context, context.name)
        known = ensure_extremes(context, average_of(model.preprocessing, context.name), list(table["id"]))
        probability = _probabilities(context, model.net, path, list(table["id"]), known)
        decide(context, table, probability, Threshold(**model.preprocessing["threshold"]))
        return
    average = read_average(context)
    known = ensure_extremes(context, average, list(table["id"]))
    parameters = config.network("images", patch_px=config.patch_px, widths=config.widths)
    net = _learnt(config, context, parameters, table, average, known).cpu()
    path = context.partial_path / "network.safetensors"
    kept: dict[str, Any] = {"average": torch.from_numpy(average), "side_px": config.side_px}
    save_model(path, net, architecture=ARCHITECTURE, parameters=parameters, preprocessing=kept)
    table = table[table["split"] != "train"].reset_index(drop=True)
    probability = _probabilities(context, net, path, list(table["id"]), known)
    conclude(context, net, parameters, table, probability, **kept)


def _learnt(
    config: ConvbovwDenseConfig, context: Context, parameters: dict[str, Any], table: pd.DataFrame, average: Floats,
    known: Mapping[str, Extremes],
) -> nn.Module:  # fmt: skip
    wholes = []
    for split in ("train", "validation"):
        found = labelled(table, split)
        labels = found["label"].to_numpy(np.int64)
        wholes.append(Photographs(context.store, list(found["id"]), labels, average, known, config.side_px))
    crops = [Crops(whole, config.crops, config.crop_px, config.seed) for whole in wholes]
    if config.epochs:  # a small budget is said before any work
        untrained = _stream(build(ARCHITECTURE, parameters).eval(), context)
        for shape in sorted({whole[i].shape for whole in wholes for i in range(len(whole))}):
            untrained.plan(shape, weights=True)
    settings = config.training(epochs=config.crop_epochs, rotation_deg=config.rotation_deg, colour=config.colour)
    name, folder = f"{context.name}_crops", context.partial_path / "crops"
    with told(context, name, config.crop_epochs, len(crops[0]), config.batch_size) as calls:
        net, history = learn(parameters, settings, crops[0], crops[1], folder, own_device(context), **calls)
    keep_history(context, name, history)
    if not config.epochs:
        return net
    settings = config.training(epochs=config.epochs, learning_rate=config.full_learning_rate)
    folder = context.partial_path / "photographs"
    with told(context, context.name, config.epochs, len(wholes[0]), config.batch_size) as calls:
        history = fit(net, wholes[0], wholes[1], settings, folder, streamed=_stream(net, context), **calls)
    keep_history(context, context.name, history)
    return net


def _stream(net: nn.Module, context: Context) -> Streamed:
    return stream(net, memory=int(context.cluster.memory))


def photograph(store: Store, id: str, average: Floats, known: Extremes, side_px: int | None) -> Normalised:
    """A photograph as U takes it: the smallest level whose longer side has `side_px`, read in windows."""
    fit = [level for level, shape in enumerate(store.levels(id)) if side_px and max(shape) >= side_px]
    return Normalised(store.image(id, max(fit, default=0)), average, known)


def _probabilities(
    context: Context, net: nn.Module, path: Path, ids: list[str], known: Mapping[str, Extremes]
) -> list[float]:
    """Of label 1, a photograph a task, by the network that is in `path`."""
    device = context.device
    asked = (str(path), digest(path), int(context.cluster.memory), device, context.cluster.threads)
    weights = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in net.state_dict().values()))
    journal = Journal(context.partial_path / f"{weights.hexdigest()[:12]}.jsonl")  # a file's metadata have no order
    done = {id: record["probability"] for id, record in journal.read().items()}
    if done:
        context.say(f"{context.name}: {len(done)} of {len(ids)} photographs are done already")

    def result(id: str, probability: float) -> None:
        done[id] = probability
        journal.append({"id": id, "probability": probability})

    def make(id: str) -> Job:
        return Job.call(id, one, str(context.store_path), id, known[id], *asked)

    run_jobs(context, context.name, [id for id in ids if id not in done], make, result, Load(device=device))
    return [done[id] for id in ids]


def one(store: str, id: str, known: Extremes, path: str, sha256: str, memory: int, device: str, threads: int) -> float:
    """The probability of one photograph, on a worker."""
    steady(device, threads)
    streamed, kept = _streamed(path, sha256, memory, device)
    average = np.asarray(kept["average"], np.float32)
    logits = streamed(photograph(Store(store), id, average, known, kept["side_px"]))
    return float(logits.double().softmax(1)[0, 1])


@lru_cache(maxsize=2)
def _streamed(path: str, sha256: str, memory: int, device: str) -> tuple[Streamed, dict[str, Any]]:
    """The network, streamed, and what is kept with it, once a process."""
    model = read_once(path, sha256)
    return stream(model.net.to(device), memory=memory), model.preprocessing


def reads(config: ConvbovwDenseConfig, context: Context) -> Iterable[Path]:
    needed = average_path(context) if config.decision == "fit" else locate(context, context.name)
    return [path_of(context), needed]


def writes(config: ConvbovwDenseConfig, context: Context) -> Iterable[Path]:
    made = list(convbovw.writes(config, context))
    if config.decision == "stored":
        return made
    whole = history_path(context, context.name)
    return [history_path(context, f"{context.name}_crops"), *(path for path in made if config.epochs or path != whole)]


STAGE = Stage("convbovw_dense", ConvbovwDenseConfig, run, reads, writes, may_grow=frozenset({"epochs"}))
