"""Measures of a run's predictions against the labels."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from tilestream.methods.metrics import auc, binary_measures, by_grade

from .base import Context, Stage, StageConfig, digest, write_json
from .predict import predictions_path
from .split import read_table


class EvaluateConfig(StageConfig):
    """Measures decisions against labels, at the thresholds that were fitted on the validation photographs."""

    split: str = Field("test", description="the photographs to measure on; 'all' for every one that has a label")


def run(config: EvaluateConfig, context: Context) -> None:
    """Writes metrics.json: an object each for `naive` and `saliency`, as far as they were predicted."""
    table = selected(config.split, context)
    metrics: dict[str, Any] = {"split": config.split, "predictions_sha256": digest(predictions_path(context))}
    for name, prefix in columns(table).items():
        metrics[name] = measures(table, prefix)
        value = metrics[name]["auc"]
        shown = "-" if value is None else f"{value:.3f}"
        context.say(f"{context.name}: {name} AUC {shown} on {len(table)} {config.split} photographs")
    write_json(metrics_path(context), metrics)


def selected(split: str, context: Context) -> pd.DataFrame:
    """Predictions with labels, of one split; ValueError when there are none."""
    table = read_table(predictions_path(context), "predict")
    table = table[table["label"].notna() & ((table["split"] == split) | (split == "all"))]
    if not len(table):
        raise ValueError(f"split={split!r} has no photograph with a label and a prediction")
    return table.astype({"label": int})


def columns(table: pd.DataFrame) -> dict[str, str]:
    """Which models a table of predictions holds, and the prefix of their columns."""
    if "naive_probability" in table:
        return {"naive": "naive_", "saliency": ""}
    return {table.attrs.get("model", "naive"): ""}


def measures(table: pd.DataFrame, prefix: str) -> dict[str, Any]:
    """All measures of one model; what cannot be computed is None, with `auc_missing` saying why."""
    labels, decisions = table["label"].to_numpy(), table[f"{prefix}decision"].to_numpy()
    result: dict[str, Any] = {
        "photographs": len(table),
        "unhealthy": int(labels.sum()),
        **binary_measures(labels, decisions),
    }
    try:
        area = auc(labels, table[f"{prefix}probability"].to_numpy())
        result.update(auc=area.value, auc_low=area.low, auc_high=area.high)
    except ValueError as error:
        result.update(auc=None, auc_low=None, auc_high=None, auc_missing=str(error))
    result["by_grade"] = by_grade(table["grade"].to_numpy(int), decisions).tolist()
    return result


def read_metrics(context: Context) -> dict[str, Any] | None:
    path = metrics_path(context)
    return json.loads(path.read_text()) if path.exists() else None


def metrics_path(context: Context) -> Path:
    return context.run / "metrics.json"


def reads(config: EvaluateConfig, context: Context) -> Iterable[Path]:
    return [predictions_path(context)]


def writes(config: EvaluateConfig, context: Context) -> Iterable[Path]:
    return [metrics_path(context)]


STAGE = Stage("evaluate", EvaluateConfig, run, reads, writes, uses_store=False)
