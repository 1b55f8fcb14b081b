"""Trains a network on squashed squares or on crops, healthy against unhealthy."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from tilestream.methods import unhealthy
from tilestream.nets import build, load_weights, save_model
from tilestream.training import Examples, TrainingConfig, fit

from .base import Context, Stage, StageConfig, digest, write_json
from .crops import read_crops
from .examples import Crops, Squares
from .jobs import steps
from .preprocess import average_path, read_average
from .split import chosen, path_of


class TrainConfig(TrainingConfig, StageConfig):
    """Trains a network, healthy (grades 0-1) against unhealthy (2-4)."""

    examples: Literal["squares", "crops"] = Field("squares", description="whole photographs squashed, or crops")
    crops: str = Field("crops_train", description="the stage whose crops to train on")
    model: str = Field("first", description="name of the model file")
    net: str = Field("ResidualNet", description="network: a name of tilestream.nets or package.module:factory")
    parameters: dict[str, Any] = Field(default_factory=dict, description="arguments of the network, as JSON")
    init: Path | None = Field(
        None, description="initial weights: a model file or safetensors state dict of the same network"
    )


def run(config: TrainConfig, context: Context) -> None:
    """Writes models/NAME.safetensors and training/STAGE.json (history), keeping a checkpoint an epoch for --resume."""
    average = read_average(context)
    train, validation = (examples(config, context, split) for split in ("train", "validation"))
    parameters = {"num_classes": 2, **config.parameters}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        net = build(config.net, parameters)
    if config.init is not None:
        load_weights(net, config.init)
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = TrainingConfig(**{name: getattr(config, name) for name in TrainingConfig.model_fields})
    counts = f"{len(train)} for training ({int(train.labels.sum())} unhealthy), {len(validation)} for validation"
    context.say(f"{context.name}: {counts}; {sum(p.numel() for p in net.parameters()) / 1e6:.2f} million parameters")

    def epoch_done(record: Any) -> None:
        auc = "-" if record.validation_auc is None else f"{record.validation_auc:.3f}"
        context.say(
            f"{context.name}: epoch {record.epoch}/{config.epochs} loss {record.train_loss:.4f}, validation loss "
            f"{record.validation_loss:.4f} AUC {auc}, {record.seconds:.1f} s"
        )

    total = config.epochs * -(-len(train) // config.batch_size)
    with steps(context, context.name, total, "batches") as step:
        history = fit(
            net, train, validation, settings, context.partial_path / "checkpoint",
            on_epoch=epoch_done, on_batch=lambda done, of: step(),
        )  # fmt: skip
    context.say(f"{context.name}: best epoch {history.best_epoch} by {history.best_by}")
    write_json(history_path(context, context.name), json.loads(history.model_dump_json()))
    model = model_path(config, context)
    model.parent.mkdir(parents=True, exist_ok=True)
    save_model(
        model,
        net.cpu(),
        architecture=config.net,
        parameters=parameters,
        preprocessing={
            "examples": config.examples,
            "size_px": average.shape[-1],
            "average": torch.from_numpy(average),
            "splits_sha256": digest(path_of(context)),
        },
    )


def examples(config: TrainConfig, context: Context, split: str) -> Examples:
    """The examples of one split, with two-class labels; ValueError when there are none."""
    average = read_average(context)
    samples = chosen(context, [split])
    if config.examples == "squares":
        ids, labels = list(samples["id"]), unhealthy(samples["label"].astype(int))
        found: Examples = Squares(context.store, ids, labels.tolist(), average)
    else:
        table = read_crops(context, config.crops)
        table = table[table["split"] == split]
        found = Crops(context.run / f"{config.crops}.zarr", table, table["unhealthy"].tolist(), average)
    if not len(found):
        raise ValueError(
            f"the {split} split has no {config.examples}; give more photographs or other fractions to 'split'"
        )
    return found


def model_path(config: TrainConfig, context: Context) -> Path:
    return context.run / "models" / f"{config.model}.safetensors"


def history_path(context: Context, name: str) -> Path:
    return context.run / "training" / f"{name}.json"


def reads(config: TrainConfig, context: Context) -> Iterable[Path]:
    crops = (
        [context.run / f"{config.crops}{end}" for end in (".zarr", ".parquet")] if config.examples == "crops" else []
    )
    return [path_of(context), average_path(context), *crops, *([config.init] if config.init else [])]


def writes(config: TrainConfig, context: Context) -> Iterable[Path]:
    return [model_path(config, context), history_path(context, context.name)]


STAGE = Stage(
    "train",
    TrainConfig,
    run,
    reads,
    writes,
    operational=frozenset({"loader_threads", "cache_bytes"}),
    may_grow=frozenset({"epochs"}),
)
