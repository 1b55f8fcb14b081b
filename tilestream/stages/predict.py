"""Probabilities and decisions: the crop network on each photograph's crop, the naive network beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from tilestream.methods import Threshold, fit_threshold, unhealthy
from tilestream.nets import Model
from tilestream.training import predict

from .base import Context, Stage, StageConfig, digest, write_json
from .crops import crops_path, read_crops, table_path
from .examples import Crops, Squares
from .jobs import steps
from .models import locate, read_model
from .preprocess import average_of, ensure_extremes
from .split import chosen, path_of, write_table


class PredictConfig(StageConfig):
    """Decides for each photograph, healthy or unhealthy. Labels are not needed."""

    crops: str | None = Field("crops", description="the stage whose crops to classify; null: only the naive network")
    model: str = Field("crops", description="model for the crops")
    naive: str | None = Field("first", description="model for the squashed squares, beside it; null: none")
    decision: Literal["fit", "stored"] = Field(
        "fit", description="thresholds: fitted on the validation photographs, or those stored with the models"
    )
    batch_size: int = Field(16, ge=1, description="examples at a time")


def run(config: PredictConfig, context: Context) -> None:
    """Writes predictions.parquet: id, label (0/1, NA if unknown), probability, decision, grade, split, and naive_*.

    Fitted thresholds go to models/decision.json."""
    if config.crops is None and config.naive is None:
        raise ValueError("crops and naive are both null; give at least one network to predict with")
    torch.manual_seed(0)
    samples = chosen(context, None)
    table = samples[["id", "label", "split"]].rename(columns={"label": "grade"})
    scores: dict[str, pd.Series] = {}
    if config.crops is not None:
        scores["saliency"] = _crop_scores(config, context)
        table = table[table["id"].isin(scores["saliency"].index)]
    if config.naive is not None:
        scores["naive"] = _square_scores(config, context, list(table["id"]))
    known = table["grade"].notna()
    table["label"] = pd.array([None if pd.isna(g) else int(unhealthy(g)) for g in table["grade"]], dtype="Int64")
    thresholds = {}
    for name, values in scores.items():
        prefix = "naive_" if name == "naive" and "saliency" in scores else ""
        table[f"{prefix}probability"] = values.reindex(table["id"]).to_numpy()
        if config.decision == "fit":
            fitting = table[(table["split"] == "validation") & known]
            thresholds[name] = fit_threshold(fitting[f"{prefix}probability"], fitting["label"].astype(int))
        else:
            thresholds[name] = stored_threshold(context, name)
        table[f"{prefix}decision"] = thresholds[name].decide(table[f"{prefix}probability"])
        if thresholds[name].origin == "prior":
            context.say(f"{context.name}: {name}: validation scores do not rise with the labels; the threshold is 0.5")
    if config.decision == "fit":
        write_json(decision_path(context), {n: {"value": t.value, "origin": t.origin} for n, t in thresholds.items()})
    first = ["id", "label", "probability", "decision", "grade", "split"]
    table = table[[*first, *(c for c in table.columns if c not in first)]]
    table.attrs["model"] = next(iter(scores))  # whose columns have no prefix
    write_table(predictions_path(context), table)
    share = table["decision"].mean()
    context.say(f"{context.name}: {len(table)} photographs, {int(table['decision'].sum())} unhealthy ({share:.0%})")


def _crop_scores(config: PredictConfig, context: Context) -> pd.Series:
    assert config.crops is not None
    crops = read_crops(context, config.crops)
    model = read_model(context, config.model)
    _same_splits(context, config.model, model)
    average = average_of(model.preprocessing, config.model)
    known = ensure_extremes(context, average, list(crops["id"]))  # the model's, whatever average the crops were cut by
    crops = crops.assign(low=[known[id].low for id in crops["id"]], high=[known[id].high for id in crops["id"]])
    examples = Crops(crops_path(context, config.crops), crops, [0] * len(crops), average)
    return pd.Series(_unhealthy(model.net, examples, config.batch_size, context), index=crops["id"])


def _square_scores(config: PredictConfig, context: Context, ids: list[str]) -> pd.Series:
    assert config.naive is not None
    model = read_model(context, config.naive)
    _same_splits(context, config.naive, model)
    examples = Squares(context.store, ids, [0] * len(ids), average_of(model.preprocessing, config.naive))
    return pd.Series(_unhealthy(model.net, examples, config.batch_size, context), index=ids)


def _same_splits(context: Context, name: str, model: Model) -> None:
    """Refuses a model of other splits than this run's: its training photographs may be in this run's test set."""
    learnt = model.preprocessing.get("splits_sha256")
    if path_of(context).exists() and learnt is not None and learnt != digest(path_of(context)):
        raise ValueError(f"model={name!r} was trained on other splits than this run's splits.parquet; train it again")


def _unhealthy(net: torch.nn.Module, examples: Any, batch_size: int, context: Context) -> np.ndarray:
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    with steps(context, context.name, -(-len(examples) // batch_size), "batches") as step:
        return predict(net, examples, batch_size, on_batch=step)[:, 1].astype(np.float64)


def stored_threshold(context: Context, name: str) -> Threshold:
    """A threshold of the run whose models are used; ValueError when it has none."""
    path = context.models_path / "decision.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    if name not in stored:
        raise ValueError(f"{path} has no threshold for {name}; fit one (decision=fit) on photographs with labels")
    return Threshold(**stored[name])


def decision_path(context: Context) -> Path:
    return context.run / "models" / "decision.json"


def predictions_path(context: Context) -> Path:
    return context.run / "predictions.parquet"


def reads(config: PredictConfig, context: Context) -> Iterable[Path]:
    models = [locate(context, name) for name in (config.model if config.crops else None, config.naive) if name]
    crops = [crops_path(context, config.crops), table_path(context, config.crops)] if config.crops else []
    stored = [context.models_path / "decision.json"] if config.decision == "stored" else []
    return [path_of(context), *models, *crops, *stored]


def writes(config: PredictConfig, context: Context) -> Iterable[Path]:
    return [predictions_path(context), *([decision_path(context)] if config.decision == "fit" else [])]


STAGE = Stage(
    "predict",
    PredictConfig,
    run,
    reads,
    writes,
)
