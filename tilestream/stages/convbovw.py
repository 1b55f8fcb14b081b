"""The convolutional bag of visual words over descriptors: U and D, trained jointly, tell normal from pathological.

What the form over photographs shares with it stands here, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import Field
from torch import nn

from tilestream.methods import Threshold, fit_threshold
from tilestream.nets import Model, build, save_model
from tilestream.training import History, TrainingConfig, fit, predict

from .base import Context, Stage, StageConfig, digest, write_json
from .descriptors import Bags, read_descriptors, table_path, zarr_path
from .jobs import steps
from .models import locate, own_device, read_model
from .scores import graded, predictions_of, same_splits, write_predictions
from .split import path_of
from .train import history_path, tells_epochs

ARCHITECTURE = "ConvBoVW"


class WordsConfig(StageConfig):
    """What both forms are told: the network and its training."""

    pathological_from: int = Field(
        1, ge=1, le=4, description="grades from here on are pathological, those below normal"
    )
    words: int = Field(100, ge=2, description="visual words, M")
    hidden: int = Field(256, ge=1, description="width of the layer before the words")
    dropout: float = Field(0.3, ge=0, lt=1, description="share of that layer left out at random in training")
    pooling: Literal["max", "mean", "sum"] = Field("max", description="of each word, over a photograph")
    batch_size: int = Field(8, ge=1, description="photographs a step, at most")
    learning_rate: float = Field(1e-3, gt=0, description="highest learning rate; it falls by half a cosine")
    weight_decay: float = Field(1e-4, ge=0, description="decay of weights (not of biases and batch norm)")
    patience: int = Field(0, ge=0, description="stop after so many epochs without a better validation AUC; 0 = never")
    seed: int = Field(0, ge=0, lt=2**32, description="seeds initial weights, order and dropout")
    decision: Literal["fit", "stored"] = Field(
        "fit", description="learn all from this run's photographs, or take what an old run has learnt (--models)"
    )

    def network(self, instances: str, **others: Any) -> dict[str, Any]:
        """Parameters of the network."""
        names = ("words", "hidden", "dropout", "pooling")
        return {"instances": instances, **{name: getattr(self, name) for name in names}, **others}

    def training(self, **others: Any) -> TrainingConfig:
        names = ("batch_size", "learning_rate", "weight_decay", "patience", "seed")
        return TrainingConfig(**{**{name: getattr(self, name) for name in names}, **others})


class ConvbovwSparseConfig(WordsConfig):
    """Learns visual words of descriptors jointly with the classifier (ConvBoVW), and decides by them."""

    descriptors: str = Field("descriptors", description="the stage whose descriptors to take")
    epochs: int = Field(30, ge=1, description="passes over the training photographs; may be raised on --resume")


@dataclass(frozen=True)
class Described:
    """Bags of descriptors with labels (n,) int64, as `fit` takes them."""

    bags: Bags
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, index: int) -> npt.NDArray[np.float32]:
        return self.bags[index]


def run(config: ConvbovwSparseConfig, context: Context, checkpoint: str = "checkpoint") -> None:
    """Writes NAME_predictions.parquet: id, label (0 normal, 1 pathological, NA if unknown), probability, decision,
    grade, split; models/NAME.safetensors, with the threshold; and training/NAME.json, the history.

    Epoch and threshold are chosen on validation photographs; a checkpoint an epoch is kept for --resume. Photographs
    without a bag are left out; of an empty bag no word is there.
    """
    table, bags = described(config, context)
    if config.decision == "stored":
        model = stored(context)
        bags.check(context.name, model.preprocessing.get("descriptors"))
        decide(context, table, _probability(config, model.net, bags), Threshold(**model.preprocessing["threshold"]))
        return
    parameters = config.network("descriptors", features=bags.dim)
    train, validation = (part(table, bags, split) for split in ("train", "validation"))
    with told(context, context.name, config.epochs, len(train), config.batch_size) as calls:
        net, history = learn(parameters, sparse_training(config, context), train, validation,
                             context.partial_path / checkpoint, own_device(context), **calls)  # fmt: skip
    keep_history(context, context.name, history)
    conclude(context, net, parameters, table, _probability(config, net, bags), descriptors=bags.settings)


def described(config: ConvbovwSparseConfig, context: Context) -> tuple[pd.DataFrame, Bags]:
    """Photographs that have a bag, as `graded` says, and their bags."""
    bags, table = read_descriptors(context, config.descriptors), graded(context, config.pathological_from)
    if len(lost := table.loc[~table["id"].isin(bags.ids), "id"]):
        context.say(f"{context.name}: {len(lost)} photographs have no bag and are left out: {', '.join(lost[:5])}")
    table = table[table["id"].isin(bags.ids)].reset_index(drop=True)
    return table, bags.select(table["id"])


def labelled(table: pd.DataFrame, split: str) -> pd.DataFrame:
    """The photographs of a split whose label is known; ValueError unless both classes are there."""
    found = table[(table["split"] == split) & table["label"].notna()]
    if len(labels := found["label"].unique().tolist()) < 2:
        raise ValueError(f"the {split} photographs have labels {labels}, both classes are needed; "
                         "set pathological_from, or split anew")  # fmt: skip
    return found


def part(table: pd.DataFrame, bags: Bags, split: str) -> Described:
    """The bags of a split, with their labels."""
    found = labelled(table, split)
    return Described(bags.select(found["id"]), found["label"].to_numpy(np.int64))


def sparse_training(config: ConvbovwSparseConfig, context: Context) -> TrainingConfig:
    """Bags are kept in half of the memory that a task has."""
    return config.training(epochs=config.epochs, flips=False, cache_bytes=int(context.cluster.memory) // 2)


def learn(
    parameters: dict[str, Any], training: TrainingConfig, train: Any, validation: Any, folder: Path, device: str,
    **calls: Any,
) -> tuple[nn.Module, History]:  # fmt: skip
    """U and D, trained jointly from initial weights that the seed alone decides."""
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        net = build(ARCHITECTURE, parameters)
    net.to(device)
    return net, fit(net, train, validation, training, folder, **calls)


@contextmanager
def told(context: Context, title: str, epochs: int, count: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """What `fit` is to call while it trains on `count` examples."""
    with steps(context, title, epochs * -(-count // batch_size), "batches") as step:
        yield {"on_epoch": tells_epochs(context, title, epochs), "on_batch": lambda done, of: step()}


def keep_history(context: Context, name: str, history: History) -> None:
    context.say(f"{name}: best epoch {history.best_epoch} by {history.best_by}")
    write_json(history_path(context, name), json.loads(history.model_dump_json()))


def _probability(config: WordsConfig, net: nn.Module, bags: Bags) -> npt.NDArray[np.float32]:
    return predict(net, Described(bags, np.zeros(len(bags), np.int64)), config.batch_size)[:, 1]


def conclude(
    context: Context, net: nn.Module, parameters: dict[str, Any], table: pd.DataFrame, probability: npt.ArrayLike,
    **kept: Any,
) -> None:  # fmt: skip
    """Fits the threshold on validation photographs, keeps it with the network and what `kept` holds, and decides."""
    fixed = labelled(table, "validation")
    threshold = fit_threshold(np.asarray(probability)[fixed.index], fixed["label"].astype(int))
    if threshold.origin == "prior":
        context.say(f"{context.name}: validation scores do not rise with the labels; the threshold is 0.5")
    path = model_path(context)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept |= {"threshold": asdict(threshold), "splits_sha256": digest(path_of(context))}
    save_model(path, net.cpu(), architecture=ARCHITECTURE, parameters=parameters, preprocessing=kept)
    decide(context, table, probability, threshold)


def decide(context: Context, table: pd.DataFrame, probability: npt.ArrayLike, threshold: Threshold) -> None:
    write_predictions(context, table, probability, threshold)
    ill = int(threshold.decide(probability).sum())
    context.say(f"{context.name}: {len(table)} photographs, {ill} pathological ({ill / len(table):.0%})")


def stored(context: Context) -> Model:
    """This stage's model of an old run, or of this one; ValueError where it was trained on other splits."""
    model = read_model(context, context.name)
    same_splits(context, context.name, model.preprocessing)
    return model


def model_path(context: Context) -> Path:
    return context.run / "models" / f"{context.name}.safetensors"


def reads(config: ConvbovwSparseConfig, context: Context) -> Iterable[Path]:
    model = [locate(context, context.name)] if config.decision == "stored" else []
    return [path_of(context), zarr_path(context, config.descriptors), table_path(context, config.descriptors), *model]


def writes(config: WordsConfig, context: Context) -> Iterable[Path]:
    made = [model_path(context), history_path(context, context.name)] if config.decision == "fit" else []
    return [predictions_of(context, context.name), *made]


STAGE = Stage("convbovw_sparse", ConvbovwSparseConfig, run, reads, writes, may_grow=frozenset({"epochs"}))
