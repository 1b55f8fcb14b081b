"""Probabilities and decisions: the crop network on each photograph's crops, the other models beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from pydantic import Field

from tilestream.methods import Threshold, fit_threshold, unhealthy
from tilestream.methods.estimators import HistogramSVM

from .base import Context, Stage, StageConfig, write_json
from .crops import crops_path, table_path
from .models import locate
from .scores import attention_path, crop_probabilities, predictions_of, square_probabilities
from .split import chosen, path_of, read_table, write_table
from .windows import COLUMNS, windows_path

GRADES = 5


class PredictConfig(StageConfig):
    """Decides for each photograph, healthy or unhealthy. Labels are not needed."""

    crops: str | None = Field("crops", description="the stage whose crops to classify; null: only the other models")
    model: str = Field("crops", description="model for the crops")
    aggregate: Literal["first", "mean", "max", "attention"] = Field(
        "first",
        description="of several crops a photograph: the first's probability, the mean, the highest, or by an attention "
        "that is trained on the crops of training photographs",
    )
    naive: str | None = Field("first", description="model for the squashed squares, beside it; null: none")
    windows: str | None = Field(None, description="the windows stage whose histograms to decide by, beside it")
    five_grade: str | None = Field(None, description="five-class model for the squashed squares, beside it")
    flips: bool = Field(False, description="the mean over the four flips of every crop and square")
    decision: Literal["fit", "stored"] = Field(
        "fit", description="thresholds: fitted on the validation photographs, or those stored with the models"
    )
    batch_size: int = Field(16, ge=1, description="examples at a time")


def run(config: PredictConfig, context: Context) -> None:
    """Writes predictions.parquet: id, label (0/1, NA if unknown), probability, decision, grade, split.

    Under another stage name S the files are S_predictions.parquet and, in models/, S_decision.json and so on.

    They are the crops'; without crops the naive model's, without that the windows'. Beside them stand naive_*,
    sliding_window_probability and sliding_window_decision (NA for photographs that the windows stage has not), and
    five_grade (0..4) with five_0..five_4, probabilities. What is fitted goes to models/: decision.json,
    sliding_window.json, attention.safetensors.
    """
    if config.crops is None and config.naive is None and config.windows is None:
        raise ValueError("crops, naive and windows are all null; give at least one to predict with")
    torch.manual_seed(0)
    table = chosen(context, None)[["id", "label", "split"]].rename(columns={"label": "grade"})
    table["label"] = pd.array([None if pd.isna(g) else int(unhealthy(g)) for g in table["grade"]], dtype="Int64")
    scores: dict[str, pd.Series] = {}
    if config.crops is not None:
        scores["saliency"] = crop_probabilities(config, context, table)
        table = table[table["id"].isin(scores["saliency"].index)]
    windows = None
    if config.windows is not None:
        windows = read_table(windows_path(context, config.windows), "windows").set_index("id")[COLUMNS]
        if not scores and config.naive is None:
            table = table[table["id"].isin(windows.index)]
    ids = list(table["id"])
    if config.naive is not None:
        scores["naive"] = pd.Series(square_probabilities(config, context, config.naive, ids, 2)[:, 1], index=ids)
    fitting = (table["split"] == "validation") & table["label"].notna()
    scores = {name: values.reindex(ids) for name, values in scores.items()}
    thresholds = _thresholds(config, context, scores, table[fitting])
    if windows is not None:
        machine = _machine(config, context, windows, table[fitting & table["id"].isin(windows.index)])
        found = pd.Series(machine.predict_proba(windows.to_numpy())[:, 1], index=windows.index)
        scores["sliding_window"] = found.reindex(ids)
        thresholds["sliding_window"] = Threshold(0.5)  # the machine's boundary
    first = next(iter(scores))
    for name, values in scores.items():
        prefixes = [""] * (name == first) + [f"{name}_"] * (name != first or name == "sliding_window")
        for prefix in prefixes:
            table[f"{prefix}probability"] = values.to_numpy()
            decided = pd.Series(thresholds[name].decide(values), table.index)
            there = values.notna().to_numpy()
            table[f"{prefix}decision"] = decided if there.all() else decided.astype("Int64").where(there)
    if config.five_grade is not None:
        grades = square_probabilities(config, context, config.five_grade, ids, GRADES)
        table["five_grade"] = grades.argmax(axis=1)
        table[[f"five_{grade}" for grade in range(GRADES)]] = grades
    if config.decision == "fit":
        write_json(
            decision_path(context, context.name),
            {n: {"value": t.value, "origin": t.origin} for n, t in thresholds.items()},
        )
    order = ["id", "label", "probability", "decision", "grade", "split"]
    table = table[[*order, *(c for c in table.columns if c not in order)]]
    table.attrs["model"] = first  # whose columns have no prefix
    write_table(predictions_of(context, context.name), table)
    share = table["decision"].mean()
    context.say(f"{context.name}: {len(table)} photographs, {int(table['decision'].sum())} unhealthy ({share:.0%})")


def _thresholds(
    config: PredictConfig, context: Context, scores: dict[str, pd.Series], learnt: pd.DataFrame
) -> dict[str, Threshold]:
    """For each network the threshold that `learnt`, the validation photographs with labels, give, or the stored one."""
    found = {}
    for name, values in scores.items():
        if config.decision == "stored":
            found[name] = stored_threshold(context, name)
        else:
            found[name] = fit_threshold(values[learnt["id"]], learnt["label"].astype(int))
        if found[name].origin == "prior":
            context.say(f"{context.name}: {name}: validation scores do not rise with the labels; the threshold is 0.5")
    return found


def _machine(config: PredictConfig, context: Context, windows: pd.DataFrame, learnt: pd.DataFrame) -> HistogramSVM:
    """The machine on histograms, fitted on validation photographs and kept, or that of an old run."""
    if config.decision == "stored":
        path = machine_path(context.models_path, context.name)
        if not path.exists():
            raise ValueError(f"{path} does not exist; fit a machine (decision=fit) on photographs with labels")
        return HistogramSVM.from_json(json.loads(path.read_text()))
    if not len(learnt):
        raise ValueError(f"{config.windows} has no validation photograph with a label; add validation to its splits")
    shares = windows.loc[learnt["id"]].to_numpy()
    if (shares == shares[0]).all():
        context.say(
            f"{context.name}: all validation histograms of {config.windows} are alike, and nothing can be decided by "
            "them: the network gives every window about the same probability; train it for longer"
        )
    machine = HistogramSVM().fit(shares, learnt["label"].to_numpy(int))
    write_json(machine_path(context.run / "models", context.name), machine.to_json())
    return machine


def stored_threshold(context: Context, name: str) -> Threshold:
    """A threshold of the run whose models are used; ValueError when it has none."""
    path = context.models_path / _file(context.name, "decision.json")
    stored = json.loads(path.read_text()) if path.exists() else {}
    if name not in stored:
        raise ValueError(f"{path} has no threshold for {name}; fit one (decision=fit) on photographs with labels")
    return Threshold(**stored[name])


def _file(name: str, file: str) -> str:
    """What a stage of this name calls a file."""
    return file if name == "predict" else f"{name}_{file}"


def decision_path(context: Context, name: str = "predict") -> Path:
    return context.run / "models" / _file(name, "decision.json")


def machine_path(folder: Path, name: str = "predict") -> Path:
    return folder / _file(name, "sliding_window.json")


def predictions_path(context: Context) -> Path:
    return context.run / "predictions.parquet"


def _fitted(config: PredictConfig, folder: Path, name: str) -> list[Path]:
    """What the models' folder holds besides the networks."""
    machine = [machine_path(folder, name)] if config.windows else []
    attention = [attention_path(folder, name)] if config.crops and config.aggregate == "attention" else []
    return [folder / _file(name, "decision.json"), *machine, *attention]


def reads(config: PredictConfig, context: Context) -> Iterable[Path]:
    names = (config.model if config.crops else None, config.naive, config.five_grade)
    models = [locate(context, name) for name in names if name]
    crops = [crops_path(context, config.crops), table_path(context, config.crops)] if config.crops else []
    windows = [windows_path(context, config.windows)] if config.windows else []
    stored = _fitted(config, context.models_path, context.name) if config.decision == "stored" else []
    return [path_of(context), *models, *crops, *windows, *stored]


def writes(config: PredictConfig, context: Context) -> Iterable[Path]:
    fitted = _fitted(config, context.run / "models", context.name) if config.decision == "fit" else []
    return [predictions_of(context, context.name), *fitted]


STAGE = Stage("predict", PredictConfig, run, reads, writes)
