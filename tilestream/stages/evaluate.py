"""Measures of a run's predictions against the labels."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from tilestream.methods import metrics as m
from tilestream.store import is_url
from tilestream.training import groups

from .base import Context, Stage, StageConfig, digest, write_json
from .predict import predictions_path
from .split import read_table

ORDER = ("naive", "sliding_window", "saliency")
_ENDS = ("_probability", "_decision")


class EvaluateConfig(StageConfig):
    """Measures decisions against labels, at the thresholds that were fitted on the validation photographs."""

    split: str = Field("test", description="the photographs to measure on; 'all' for every one that has a label")
    bins: int = Field(10, ge=2, le=100, description="equal parts of [0, 1] in which calibration is measured")
    seed: int = Field(0, ge=0, description="seed of the intervals that are drawn")


def run(config: EvaluateConfig, context: Context) -> None:
    """Writes metrics.json: an object each for `naive`, `sliding_window`, `saliency`, as far as they were predicted.

    Intervals are 95 %: Wilson's of shares, DeLong's of the AUC (auc_low, auc_high), and from 2,000 draws of whole
    patients (auc_bootstrap_low ...; of photographs where no store is given, as `groups` says). What cannot be computed
    is null.
    """
    table = selected(config.split, context)
    table["patient_group"], of = patient_groups(table, context)
    models = columns(table)
    metrics: dict[str, Any] = {
        "split": config.split, "groups": of, "predictions_sha256": digest(predictions_path(context))
    }  # fmt: skip
    for name, prefix in models.items():
        metrics[name] = measures(table, prefix, config.bins, config.seed)
        if name != "naive" and "naive" in models:
            metrics[name] |= difference(table, prefix, models["naive"], config.seed)
        value = metrics[name]["auc"]
        shown = "-" if value is None else f"{value:.3f}"
        context.say(f"{context.name}: {name} AUC {shown} on {metrics[name]['photographs']} {config.split} photographs")
    if "five_grade" in table and (graded := table[table["five_grade"].notna()]).size:
        grades, decided = graded["grade"].to_numpy(int), graded["five_grade"].to_numpy(int)
        five = m.grade_measures(grades, decided, graded["patient_group"], seed=config.seed)
        metrics.setdefault("naive", {})["five_grade"] = five
    write_json(metrics_path(context), metrics)


def selected(split: str, context: Context) -> pd.DataFrame:
    """Predictions with labels, of one split; ValueError when there are none."""
    table = read_table(predictions_path(context), "predict")
    table = table[table["label"].notna() & ((table["split"] == split) | (split == "all"))]
    if not len(table):
        raise ValueError(f"split={split!r} has no photograph with a label and a prediction")
    return table.astype({"label": int})


def patient_groups(table: pd.DataFrame, context: Context) -> tuple[np.ndarray, str]:
    """A number a photograph, the same for those that share a patient or a file; and what the numbers stand for."""
    if context.store_path is None:
        return np.arange(len(table)), "photographs"
    samples = context.store.samples()
    numbers = pd.Series(groups(samples), index=samples["id"]).reindex(table["id"])
    if (lost := numbers.isna()).any():
        raise ValueError(f"id={numbers.index[lost][0]!r} has a prediction but is not in the store; predict again")
    return numbers.to_numpy(int), "patients"


def columns(table: pd.DataFrame) -> dict[str, str]:
    """Which models a table of predictions holds, and the prefix of their columns: naive first, the crops' last."""
    known = [name.removesuffix(_ENDS[0]) for name in table if str(name).endswith(_ENDS[0])]
    found = {name: f"{name}_" for name in known if f"{name}{_ENDS[1]}" in table}
    found[table.attrs.get("model", "saliency" if "naive" in found else "naive")] = ""
    return {name: found[name] for name in [*(n for n in ORDER if n in found), *sorted(set(found) - set(ORDER))]}


def measures(table: pd.DataFrame, prefix: str, bins: int = 10, seed: int = 0) -> dict[str, Any]:
    """All measures of one model; what cannot be computed is None, with `auc_missing` saying why.

    Photographs without its prediction are left out.
    """
    table = table[table[f"{prefix}probability"].notna()]
    labels, decisions = table["label"].to_numpy(), table[f"{prefix}decision"].to_numpy(int)
    scores, patients = table[f"{prefix}probability"].to_numpy(float), table["patient_group"].to_numpy()
    result: dict[str, Any] = {"photographs": len(table), "unhealthy": int(labels.sum())}
    if not len(table):
        return {**result, "auc": None, "auc_missing": "no photograph has a prediction"}
    result |= m.binary_measures(labels, decisions)
    result["class_accuracies"] = m.class_accuracies(labels, decisions, (0, 1))
    result["by_grade"] = m.by_grade(table["grade"].to_numpy(int), decisions).tolist()
    result["brier"] = m.brier(labels, scores)
    result["ece"] = m.calibration_error(labels, scores, bins)
    result["calibration"] = [asdict(part) for part in m.reliability(labels, scores, bins)]
    try:
        area = m.auc(labels, scores)
    except ValueError as error:
        names = ("auc", "auc_low", "auc_high", "auc_bootstrap_low", "auc_bootstrap_high", "auprc")
        return {**result, **dict.fromkeys([*names, "auprc_low", "auprc_high"]), "auc_missing": str(error)}
    result.update(auc=area.value, auc_low=area.low, auc_high=area.high, auprc=m.average_precision(labels, scores))
    result |= _bounds("auc_bootstrap", m.auc_interval(labels, scores, patients, seed=seed))
    return result | _bounds("auprc", m.average_precision_interval(labels, scores, patients, seed=seed))


def difference(table: pd.DataFrame, prefix: str, other: str, seed: int = 0) -> dict[str, Any]:
    """AUC of one model minus the naive one's, on the photographs that both predicted: paired DeLong and bootstrap."""
    name = "auc_minus_naive"
    table = table[table[f"{prefix}probability"].notna() & table[f"{other}probability"].notna()]
    labels = table["label"].to_numpy()
    if len(set(labels)) < 2:
        return dict.fromkeys(
            (name, *(f"{name}_{end}" for end in ("low", "high", "p", "bootstrap_low", "bootstrap_high")))
        )
    first, second = (table[f"{each}probability"].to_numpy(float) for each in (prefix, other))
    found = m.auc_difference(labels, first, second)
    drawn = m.auc_difference_interval(labels, first, second, table["patient_group"], seed=seed)
    result = {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_p": found.p_value}
    return result | _bounds(f"{name}_bootstrap", drawn)


def _bounds(name: str, bounds: tuple[float, float] | None) -> dict[str, float | None]:
    low, high = bounds or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def read_metrics(context: Context) -> dict[str, Any] | None:
    path = metrics_path(context)
    return json.loads(path.read_text()) if path.exists() else None


def metrics_path(context: Context) -> Path:
    return context.run / "metrics.json"


def reads(config: EvaluateConfig, context: Context) -> Iterable[Path]:
    store = context.store_path
    return [predictions_path(context), *([] if store is None or is_url(store) else [Path(store) / "labels.parquet"])]


def writes(config: EvaluateConfig, context: Context) -> Iterable[Path]:
    return [metrics_path(context)]


STAGE = Stage("evaluate", EvaluateConfig, run, reads, writes, uses_store=False)
