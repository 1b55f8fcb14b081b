"""Random search (Bergstra and Bengio 2012) for the convolutional bag of visual words, by validation AUC (4.2)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pandas as pd
import torch
from pydantic import Field, model_validator
from scipy.stats import loguniform, randint, uniform
from sklearn.model_selection import ParameterSampler

from tilestream.cluster import Job, tile_done
from tilestream.methods import metrics
from tilestream.training import TrainingConfig, predict

from . import convbovw
from .base import Context, Stage, parse
from .convbovw import ConvbovwSparseConfig, Described, described, learn, part, sparse_training
from .jobs import Load, run_jobs
from .models import own_device, steady
from .runner import Journal
from .split import write_table

Name = Literal["learning_rate", "dropout", "words", "hidden"]
COLUMNS = [
    "id", "learning_rate", "dropout", "words", "hidden", "best_epoch", "validation_auc", "test_auc", "test_auc_low",
    "test_auc_high", "seconds",
]  # fmt: skip


class SearchConfig(ConvbovwSparseConfig):
    """Searches settings of convbovw_sparse at random by validation AUC; the best is trained again, and decides."""

    epochs: int = Field(30, ge=1, description="passes over the training photographs, in every trial")
    trials: int = Field(20, ge=1, description="settings that are tried; may be raised on --resume")
    space: dict[Name, tuple[float, float]] = Field(
        {"learning_rate": (1e-4, 1e-2), "dropout": (0, 0.6), "words": (20, 200), "hidden": (256, 512)},
        description="lowest and highest value of what is drawn, the learning rate on a logarithmic scale; what is not "
        "named here keeps its setting",
    )
    word_counts: list[Annotated[int, Field(ge=2)]] = Field(
        [20, 55, 100, 200], description="numbers of words M tried beside, with the best of the other settings"
    )

    @model_validator(mode="after")
    def _is_a_space(self) -> Self:
        for name, (low, high) in self.space.items():
            if not low < high:
                raise ValueError(f"space.{name}=({low:g}, {high:g}) must begin below its end")
            for end in (low, high):
                parse(ConvbovwSparseConfig, {name: end}, "space")
        return self


def run(config: SearchConfig, context: Context) -> None:
    """Writes NAME.parquet, a row a trial, and what `convbovw_sparse` writes with the settings of the best trial.

    Rows: id ("trial 3"; "words 55" for one of `word_counts`), the settings, best_epoch, validation_auc, seconds. Test
    photographs are looked at for `word_counts` alone, of which nothing is chosen: test_auc with its 95 % interval. A
    trial is a task; those that are done are in the journal. The first of equals is the best.
    """
    if config.decision == "stored":
        convbovw.run(config, context)
        return
    table, bags = described(config, context)
    train, validation, test = (part(table, bags, split) for split in ("train", "validation", "test"))
    journal = Journal(context.partial_path / "trials.jsonl")
    found = journal.read()

    def tried(wanted: dict[str, dict[str, Any]], *others: Described) -> list[dict[str, Any]]:
        """Rows of these settings, by id: those that the journal has, and those that are tried now."""
        for id, row in list(found.items()):
            if id in wanted and any(row[name] != value for name, value in wanted[id].items()):
                del found[id]  # of another best trial than now
        missing = [id for id in wanted if id not in found]
        if len(missing) < len(wanted):
            context.say(f"{context.name}: {len(wanted) - len(missing)} of {len(wanted)} trials are done already")

        def make(id: str) -> Job:
            settings = config.model_copy(update=wanted[id])
            parameters = settings.network("descriptors", features=bags.dim)
            training = sparse_training(settings, context)
            parts = [train, validation, *others]
            return Job.call(id, trial, parameters, training, parts, context.device, context.cluster.threads)

        def result(id: str, row: dict[str, Any]) -> None:
            found[id] = {"id": id, **wanted[id], **row}
            journal.append(found[id])
            said = ", ".join(f"{name} {value:.4g}" for name, value in wanted[id].items())
            auc = row["validation_auc"]
            found_auc = "no finite loss" if auc is None else f"validation AUC {auc:.3f}"
            context.say(f"{context.name}: {id}: {said}: {found_auc}")

        run_jobs(context, context.name, missing, make, result, Load(device=context.device), unit="trials")
        return [found[id] for id in wanted]

    rows = tried({f"trial {i}": settings for i, settings in enumerate(drawn(config))})
    finite = [row for row in rows if row["validation_auc"] is not None]
    if not finite:
        raise ValueError(f"no trial of {len(rows)} had a finite loss; lower the learning rates of space")
    best = max(finite, key=lambda row: row["validation_auc"])
    chosen = {name: best[name] for name in drawn(config)[0]}
    context.say(f"{context.name}: {best['id']} is the best, validation AUC {best['validation_auc']:.3f}")
    rows += tried({f"words {m}": {**chosen, "words": m} for m in config.word_counts}, test)
    write_table(trials_path(context), pd.DataFrame(rows, columns=COLUMNS))
    threads = torch.get_num_threads()
    steady(own_device(context), context.cluster.threads)  # as on the workers: the same training, bit for bit
    try:
        convbovw.run(config.model_copy(update=chosen), context, best["id"])
    finally:
        torch.set_num_threads(threads)


def drawn(config: SearchConfig) -> list[dict[str, Any]]:
    """The settings of every trial, all four of them: the same first ones whatever `trials`."""
    whole = {"words", "hidden"}
    distributions = {
        name: loguniform(low, high) if name == "learning_rate"
        else randint(int(low), int(high) + 1) if name in whole else uniform(low, high - low)
        for name, (low, high) in config.space.items()
    }  # fmt: skip
    fixed = {name: getattr(config, name) for name in ("learning_rate", "dropout", "words", "hidden")}
    sampler = ParameterSampler(distributions, config.trials, random_state=config.seed)
    return [{**fixed, **{name: int(v) if name in whole else float(v) for name, v in each.items()}} for each in sampler]


def trial(
    parameters: dict[str, Any], training: TrainingConfig, parts: list[Described], device: str, threads: int
) -> dict[str, Any]:
    """One setting, trained on a worker: its best epoch and validation AUC; of a third part the AUC, with interval.

    Without epoch and AUC where the loss was not finite.
    """
    started = time.perf_counter()
    steady(device, threads)
    train, validation, *others = parts
    with tempfile.TemporaryDirectory() as folder:
        try:  # each batch is told, or a long trial would be taken for one that hangs
            calls = {"on_batch": lambda done, of: tile_done()}
            net, history = learn(parameters, training, train, validation, Path(folder), device, **calls)
        except FloatingPointError:
            return {"best_epoch": None, "validation_auc": None, "seconds": round(time.perf_counter() - started, 3)}
    row: dict[str, Any] = {"best_epoch": history.best_epoch}
    row["validation_auc"] = history.records[history.best_epoch - 1].validation_auc
    for other in others:
        area = metrics.auc(other.labels, predict(net, other, training.batch_size)[:, 1])
        row |= {"test_auc": area.value, "test_auc_low": area.low, "test_auc_high": area.high}
    return {**row, "seconds": round(time.perf_counter() - started, 3)}


def trials_path(context: Context) -> Path:
    return context.run / f"{context.name}.parquet"


def writes(config: SearchConfig, context: Context) -> Iterable[Path]:
    return [*convbovw.writes(config, context), *([trials_path(context)] if config.decision == "fit" else [])]


STAGE = Stage("search", SearchConfig, run, convbovw.reads, writes, may_grow=frozenset({"trials"}))
