"""The bag of visual words, normal against pathological: dictionary, coding, support vector machine (paper B, 3.1)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from tilestream.cluster import Job
from tilestream.methods import Threshold, fit_threshold
from tilestream.methods.bovw import BagOfVisualWords, Coding, Pooling, search_svm, svm_folds
from tilestream.methods.estimators import HistogramSVM
from tilestream.training import groups

from .base import Context, Stage, StageConfig, digest, write_json
from .descriptors import Bags, read_descriptors, table_path, zarr_path
from .jobs import run_jobs, steps
from .scores import graded, predictions_of, same_splits, write_predictions
from .split import path_of

_BAGS = 32
"""Bags that one task codes."""


class BovwConfig(StageConfig):
    """Decides by visual words: a dictionary of descriptors, their coding, a support vector machine."""

    descriptors: str = Field("descriptors", description="the stage whose descriptors to take")
    pathological_from: int = Field(
        1, ge=1, le=4, description="grades from here on are pathological, those below normal"
    )
    words: int = Field(1000, ge=2, description="visual words, M")
    coding: Coding = Field(
        "semi-soft", description="of a descriptor: its nearest word, shares of all words, or inverse distances"
    )
    pooling: Pooling = Field(
        "auto", description="over a photograph's descriptors; auto: the sum of hard coding, the maximum of the others"
    )
    sigma: float | None = Field(
        None, gt=0, description="of soft coding's kernel (default: the rms distance to the nearest word)"
    )
    eps: float = Field(1e-3, gt=0, description="of semi-soft coding, 1 / (distance + eps)")
    per_bag: int = Field(1000, ge=1, description="descriptors of a photograph that the dictionary learns from, a pass")
    passes: int = Field(3, ge=1, description="passes over the training photographs, for the dictionary")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the dictionary")
    costs: list[float] = Field([0.1, 1, 10, 100], min_length=1, description="C of the grid search")
    gammas: list[float] = Field(
        [0.1, 1, 10], min_length=1, description="gamma of the grid search, as multiples of 1 / (M * variance)"
    )
    decision: Literal["fit", "stored"] = Field(
        "fit", description="learn all from this run's photographs, or take what an old run has learnt (--models)"
    )


def run(config: BovwConfig, context: Context) -> None:
    """Writes NAME_predictions.parquet: id, label (0 normal, 1 pathological, NA if unknown), probability, decision,
    grade, split; and models/NAME.json: dictionary, machine, threshold, and the AUC of each pair of the grid search.

    Dictionary and machine are learnt on training photographs, the threshold on validation photographs. Photographs
    without a bag are left out.
    """
    bags, table = read_descriptors(context, config.descriptors), graded(context, config.pathological_from)
    if len(lost := table.loc[~table["id"].isin(bags.ids), "id"]):
        context.say(f"{context.name}: {len(lost)} photographs have no bag and are left out: {', '.join(lost[:5])}")
    table = table[table["id"].isin(bags.ids)].reset_index(drop=True)
    known, labels = table["label"].notna(), table["label"].fillna(0).to_numpy(np.int64)
    learnt, fixed = (table.index[known & (table["split"] == name)].to_numpy() for name in ("train", "validation"))
    stored = _stored(context, bags) if config.decision == "stored" else None
    if stored is None:
        _check(table.loc[learnt, "label"], "training")
        _check(table.loc[fixed, "label"], "validation")
        samples = context.store.samples()
        patient = pd.Series(groups(samples), samples["id"])[table["id"]].to_numpy()
        svm_folds(labels[learnt], patient[learnt])  # too few patients are said before any work
        words = _dictionary(config, context, bags.select(table.loc[learnt, "id"]))
    else:
        words = BagOfVisualWords.from_json(stored["dictionary"])
    histograms = _histograms(context, words, bags.select(table["id"]))
    if stored is None:
        total = len(config.costs) * len(config.gammas)
        with steps(context, f"{context.name} search", total, "pairs") as step:
            machine, tried = search_svm(
                histograms[learnt], labels[learnt], patient[learnt], config.costs, config.gammas, step
            )
        best = max(tried, key=lambda pair: pair["auc"])
        context.say(f"{context.name}: C={best['C']:g}, gamma={best['gamma']:g}: cross-validated AUC {best['auc']:.3f}")
    else:
        machine = HistogramSVM.from_json(stored["machine"])
    probability = machine.predict_proba(histograms)[:, 1]
    if stored is None:
        threshold = fit_threshold(probability[fixed], labels[fixed])
        if threshold.origin == "prior":
            context.say(f"{context.name}: validation scores do not rise with the labels; the threshold is 0.5")
        parts = {"dictionary": words.to_json(), "machine": machine.to_json(), "search": tried}
        kept = {"splits_sha256": digest(path_of(context)), "descriptors": bags.settings, "threshold": asdict(threshold)}
        write_json(model_path(context.run / "models", context.name), {**parts, **kept})
    else:
        threshold = Threshold(**stored["threshold"])
    write_predictions(context, table, probability, threshold)
    ill = int(threshold.decide(probability).sum())
    context.say(f"{context.name}: {len(table)} photographs, {ill} pathological ({ill / len(table):.0%})")


def _check(labels: pd.Series, name: str) -> None:
    if set(labels) != {0, 1}:
        raise ValueError(
            f"{name} photographs with bags have labels {sorted(labels.unique().tolist())}, both classes are needed; "
            "set pathological_from, or split anew"
        )


def _dictionary(config: BovwConfig, context: Context, bags: Bags) -> BagOfVisualWords:
    words = BagOfVisualWords(
        config.words, config.coding, config.pooling, config.sigma, config.eps, config.per_bag, config.passes,
        random_state=config.seed,
    )  # fmt: skip
    with steps(context, f"{context.name} dictionary", config.passes * len(bags), "bags") as step:
        return words.fit(bags, on_bag=step)


def _histograms(context: Context, words: BagOfVisualWords, bags: Bags) -> npt.NDArray[np.float64]:
    """(n, words), coded over the cluster, some photographs a task."""
    path = context.partial_path / "dictionary.json"
    write_json(path, words.to_json())
    found = np.zeros((len(bags), len(words.words_)))
    starts = {f"{bags.ids[start]} and the next": start for start in range(0, len(bags), _BAGS)}

    def make(name: str) -> Job:
        return Job.call(name, coded, str(path), bags.select(bags.ids[starts[name] : starts[name] + _BAGS]))

    def result(name: str, rows: npt.NDArray[np.float64]) -> None:
        found[starts[name] : starts[name] + len(rows)] = rows

    run_jobs(context, context.name, list(starts), make, result)
    return found


def coded(dictionary: str, bags: Bags) -> npt.NDArray[np.float64]:
    """Histograms of some bags, (n, words), on a worker."""
    found: npt.NDArray[np.float64] = _read(dictionary).transform(bags)
    return found


@lru_cache(maxsize=1)
def _read(dictionary: str) -> BagOfVisualWords:
    """A dictionary, once a process: its path holds the attempt, and never another one."""
    return BagOfVisualWords.from_json(json.loads(Path(dictionary).read_text()))


def model_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _stored(context: Context, bags: Bags) -> dict[str, Any]:
    """What an old run has learnt; ValueError where it is of other splits, or of other descriptors."""
    path = model_path(context.models_path, context.name)
    if not path.exists():
        raise ValueError(f"{path} does not exist; learn words (decision=fit) from photographs with labels")
    found: dict[str, Any] = json.loads(path.read_text())
    same_splits(context, context.name, found)
    bags.check(context.name, found.get("descriptors"))
    return found


def reads(config: BovwConfig, context: Context) -> Iterable[Path]:
    stored = [model_path(context.models_path, context.name)] if config.decision == "stored" else []
    bags = [zarr_path(context, config.descriptors), table_path(context, config.descriptors)]
    return [path_of(context), *bags, *stored]


def writes(config: BovwConfig, context: Context) -> Iterable[Path]:
    model = [model_path(context.run / "models", context.name)] if config.decision == "fit" else []
    return [predictions_of(context, context.name), *model]


STAGE = Stage("bovw", BovwConfig, run, reads, writes)
