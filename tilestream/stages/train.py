"""Trains a network on squashed squares, on crops or on whole photographs, healthy against unhealthy or by grade."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from pydantic import Field, model_validator
from torch import nn

from tilestream.engine import Streamed, stream
from tilestream.methods import unhealthy
from tilestream.nets import build, load_weights, save_model
from tilestream.training import ALONE, EpochRecord, Examples, Group, History, TrainingConfig, check_flips_only, fit

from .base import Context, Stage, StageConfig, digest, write_json
from .crops import read_crops
from .examples import Crops, Photographs, Squares
from .jobs import steps
from .models import locate, own_device
from .preprocess import average_path, ensure_extremes, read_average
from .split import chosen, path_of
from .train_ranks import Crew, over_ranks

CLASSES = {"two": 2, "five": 5}


class TrainConfig(TrainingConfig, StageConfig):
    """Trains a network, healthy (grades 0-1) against unhealthy (2-4), or by grade."""

    examples: Literal["squares", "crops", "photographs"] = Field(
        "squares",
        description="whole photographs squashed, crops, or photographs at full resolution: streamed in the budget "
        "`memory`, flipped at most, with batch normalisation frozen (so give init)",
    )
    labels: Literal["two", "five"] = Field("two", description="classes: healthy and unhealthy, or the five grades")
    crops: str = Field("crops_train", description="the stage whose crops to train on")
    model: str = Field("first", description="name of the model file")
    net: str = Field("ResidualNet", description="network: a name of tilestream.nets or package.module:factory")
    parameters: dict[str, Any] = Field(default_factory=dict, description="arguments of the network, as JSON")
    init: str | None = Field(
        None,
        description="initial weights, of the same network: the name of a model of this run, or the path of a model "
        "file or a safetensors state dict",
    )
    ranks: int | Literal["auto"] = Field(
        1,
        description="processes that share each batch, a worker of the cluster each (auto: all); 1: this one. Workers "
        "must see the run's folder",
    )
    restarts: int = Field(3, ge=0, description="times to go on from the last checkpoint when a rank is lost")
    rank_timeout: float = Field(
        60, gt=0, le=1e6, allow_inf_nan=False, description="seconds that a rank waits for others"
    )
    trust_network: bool = Field(
        False, description="let ranks on several machines talk unencrypted: their network is private"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.ranks != "auto" and self.ranks < 1:
            raise ValueError(f"ranks={self.ranks} must be at least 1, or auto")
        if self.examples == "photographs":
            check_flips_only(self)
            if self.precision == "bf16":
                raise ValueError("precision=bf16 is not for photographs at full resolution; use float32")
        return self


def run(config: TrainConfig, context: Context) -> None:
    """Writes models/NAME.safetensors and training/STAGE.json (history), keeping a checkpoint an epoch for --resume."""
    average, model = read_average(context), model_path(config, context)
    if config.init is not None and locate(context, config.init) == model:
        raise ValueError(
            f"init={config.init!r} is the model that is written; give that another name, as {config.model}2"
        )
    train, validation = (examples(config, context, split) for split in ("train", "validation"))
    net = network(config, context)
    counts = f"{len(train)} for training ({_shares(config, train)}), {len(validation)} for validation"
    context.say(f"{context.name}: {counts}; {sum(p.numel() for p in net.parameters()) / 1e6:.2f} million parameters")
    if config.examples == "photographs":  # a small budget is said before any work
        samples, streamed = chosen(context, ["train", "validation"]), _streamed(config, context, net)
        for height, width in sorted(set(zip(samples["height"], samples["width"], strict=True))):
            streamed.plan((3, int(height), int(width)), weights=True)

    epoch_done = tells_epochs(context, context.name, config.epochs)
    total = config.epochs * -(-len(train) // config.batch_size)
    with steps(context, context.name, total, "batches") as step:
        if config.ranks != 1:
            crew = Crew(config.ranks, config.restarts, config.rank_timeout, config.trust_network)
            over_ranks(crew, context, partial(fitted, config), epoch_done, step)
        # after ranks have trained it finds their last checkpoint, and nothing left to do
        device = torch.device(own_device(context))
        net, history = fitted(config, context, device, on_epoch=epoch_done, on_batch=lambda done, of: step())
    kept = "; the last is kept" if config.keep == "last" else ""
    context.say(f"{context.name}: best epoch {history.best_epoch} by {history.best_by}{kept}")
    write_json(history_path(context, context.name), json.loads(history.model_dump_json()))
    model.parent.mkdir(parents=True, exist_ok=True)
    save_model(
        model,
        net.cpu(),
        architecture=config.net,
        parameters=_parameters(config),
        preprocessing={
            "examples": config.examples,
            "labels": config.labels,
            "size_px": average.shape[-1],
            "average": torch.from_numpy(average),
            "splits_sha256": digest(path_of(context)),
        },
    )


def tells_epochs(context: Context, title: str, epochs: int) -> Callable[[EpochRecord], None]:
    """What says each epoch in a line."""

    def tell(record: EpochRecord) -> None:
        auc = "-" if record.validation_auc is None else f"{record.validation_auc:.3f}"
        context.say(
            f"{title}: epoch {record.epoch}/{epochs} loss {record.train_loss:.4f}, validation loss "
            f"{record.validation_loss:.4f} AUC {auc}, {record.seconds:.1f} s"
        )

    return tell


def fitted(
    config: TrainConfig, context: Context, device: torch.device, group: Group = ALONE, **calls: Any
) -> tuple[nn.Module, History]:
    """The network, trained by this process or by a group, or read from the checkpoint of a training that is done."""
    train, validation = (examples(config, context, split) for split in ("train", "validation"))
    net = network(config, context).to(device)
    settings = TrainingConfig(**{name: getattr(config, name) for name in TrainingConfig.model_fields})
    streamed = _streamed(config, context, net) if config.examples == "photographs" else None
    folder = context.partial_path / "checkpoint"
    return net, fit(net, train, validation, settings, folder, group=group, streamed=streamed, **calls)


def network(config: TrainConfig, context: Context) -> nn.Module:
    """The network before training."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        net = build(config.net, _parameters(config))
    if config.init is not None:
        load_weights(net, locate(context, config.init))
    return net


def examples(config: TrainConfig, context: Context, split: str) -> Examples:
    """The examples of one split, with labels from 0; ValueError when there are none."""
    average = read_average(context)
    found: Examples
    if config.examples == "crops":
        table = read_crops(context, config.crops)
        table = table[table["split"] == split]
        found = Crops(context.run / f"{config.crops}.zarr", table, _labels(config, table), average)
    else:
        samples = chosen(context, [split])
        ids, labels = list(samples["id"]), _labels(config, samples)
        if config.examples == "squares":
            found = Squares(context.store, ids, labels, average)
        else:
            found = Photographs(context.store, ids, labels, average, ensure_extremes(context, average, ids))
    if not len(found):
        raise ValueError(
            f"the {split} split has no {config.examples}; give more photographs or other fractions to 'split'"
        )
    return found


def _labels(config: TrainConfig, table: pd.DataFrame) -> list[int]:
    grades = table["label"].astype(int)
    two: list[int] = unhealthy(grades).tolist()  # refuses what is no grade
    return two if config.labels == "two" else grades.tolist()


def _shares(config: TrainConfig, train: Examples) -> str:
    if config.labels == "two":
        return f"{int(train.labels.sum())} unhealthy"
    return f"by grade {', '.join(map(str, np.bincount(train.labels, minlength=5)))}"


def _parameters(config: TrainConfig) -> dict[str, Any]:
    return {"num_classes": CLASSES[config.labels], **config.parameters}


def _streamed(config: TrainConfig, context: Context, net: nn.Module) -> Streamed:
    return stream(net, memory=int(context.cluster.memory))


def model_path(config: TrainConfig, context: Context) -> Path:
    return context.run / "models" / f"{config.model}.safetensors"


def history_path(context: Context, name: str) -> Path:
    return context.run / "training" / f"{name}.json"


def reads(config: TrainConfig, context: Context) -> Iterable[Path]:
    crops = (
        [context.run / f"{config.crops}{end}" for end in (".zarr", ".parquet")] if config.examples == "crops" else []
    )
    init = [locate(context, config.init)] if config.init else []
    return [path_of(context), average_path(context), *crops, *init]


def writes(config: TrainConfig, context: Context) -> Iterable[Path]:
    return [model_path(config, context), history_path(context, context.name)]


STAGE = Stage(
    "train",
    TrainConfig,
    run,
    reads,
    writes,
    operational=frozenset({"loader_threads", "cache_bytes", "restarts", "rank_timeout", "trust_network"}),
    may_grow=frozenset({"epochs"}),
)
