"""Measures of a run's predictions against the labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
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
from .scores import predictions_of
from .split import read_table

ORDER = ("naive", "sliding_window", "saliency")
_ENDS = ("_probability", "_decision")


class EvaluateConfig(StageConfig):
    """Measures decisions against labels, at the thresholds that were fitted on the validation photographs."""

    predictions: list[str] = Field(
        ["predict"], min_length=1, description="the stages whose predictions to measure; their labels must agree"
    )
    reference: str = Field("naive", description="the model whose AUC is taken from that of each other one")
    split: str = Field("test", description="the photographs to measure on; 'all' for every one that has a label")
    bins: int = Field(10, ge=2, le=100, description="equal parts of [0, 1] in which calibration is measured")
    seed: int = Field(0, ge=0, description="seed of the intervals that are drawn")


def run(config: EvaluateConfig, context: Context) -> None:
    """Writes metrics.json: an object each for `naive`, `sliding_window`, `saliency`, as far as they were predicted, and
    for other stages in `predictions` under their names.

    What is unhealthy is what the predictions say: their label 1. Intervals are 95 %: Wilson's of shares, DeLong's of
    the AUC (auc_low, auc_high), and from 2,000 draws of whole patients (auc_bootstrap_low ...; of photographs where no
    store is given, as `groups` says). What cannot be computed is null.
    """
    table = selected(config.split, context, config.predictions)
    table["patient_group"], of = patient_groups(table, context)
    models = columns(table)
    metrics: dict[str, Any] = {
        "split": config.split, "groups": of, "predictions_sha256": fingerprint(context, config.predictions),
        "predictions": config.predictions, "reference": config.reference,
    }  # fmt: skip
    for name, prefix in models.items():
        metrics[name] = measures(table, prefix, config.bins, config.seed)
        if name != config.reference and config.reference in models:
            metrics[name] |= difference(table, prefix, models[config.reference], config.seed, config.reference)
        value = metrics[name]["auc"]
        shown = "-" if value is None else f"{value:.3f}"
        context.say(f"{context.name}: {name} AUC {shown} on {metrics[name]['photographs']} {config.split} photographs")
    if "five_grade" in table and (graded := table[table["five_grade"].notna()]).size:
        grades, decided = graded["grade"].to_numpy(int), graded["five_grade"].to_numpy(int)
        five = m.grade_measures(grades, decided, graded["patient_group"], seed=config.seed)
        metrics.setdefault("naive", {})["five_grade"] = five
    write_json(metrics_path(context), metrics)


def selected(split: str, context: Context, names: Sequence[str] = ("predict",)) -> pd.DataFrame:
    """Predictions with labels, of one split; ValueError when there are none."""
    table = joined(context, names)
    table = table[table["label"].notna() & ((table["split"] == split) | (split == "all"))]
    if not len(table):
        raise ValueError(f"split={split!r} has no photograph with a label and a prediction")
    return table.astype({"label": int})


def joined(context: Context, names: Sequence[str]) -> pd.DataFrame:
    """Predictions of several stages side by side, as `columns` reads them; what one of them lacks is NA.

    ValueError where they disagree on a photograph's label: then they decide different questions.
    """
    table, *others = (read_table(predictions_of(context, name), name) for name in names)
    for name, other in zip(names[1:], others, strict=True):
        both = table.merge(other, on="id", suffixes=("", "_other"))
        if len(apart := both[(both["label"] != both["label_other"]).fillna(False)]):
            raise ValueError(
                f"label of {apart['id'].iloc[0]} is {apart['label'].iloc[0]} by {names[0]} and "
                f"{apart['label_other'].iloc[0]} by {name}: they call other grades unhealthy; measure them one by one"
            )
        renamed = {end[1:]: f"{name}{end}" for end in _ENDS}
        first = table.attrs
        table = table.merge(other.rename(columns=renamed), on="id", how="outer", suffixes=("", "_other"))
        for column in ("label", "grade", "split"):
            table[column] = table[column].fillna(table.pop(f"{column}_other"))
        table.attrs = first
    return table


def fingerprint(context: Context, names: Sequence[str]) -> str:
    """A hash of the predictions that are measured: the file's, of one."""
    hashes = [digest(predictions_of(context, name)) for name in names]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


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


def difference(table: pd.DataFrame, prefix: str, other: str, seed: int = 0, reference: str = "naive") -> dict[str, Any]:
    """AUC of one model minus the reference's, on the photographs that both predicted: paired DeLong and bootstrap."""
    name = f"auc_minus_{reference}"
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
    tables = [predictions_of(context, name) for name in config.predictions]
    return [*tables, *([] if store is None or is_url(store) else [Path(store) / "labels.parquet"])]


def writes(config: EvaluateConfig, context: Context) -> Iterable[Path]:
    return [metrics_path(context)]


STAGE = Stage("evaluate", EvaluateConfig, run, reads, writes, uses_store=False)
