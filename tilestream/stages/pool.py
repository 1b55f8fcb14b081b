"""Cross-validation's last step: what its runs found on their test photographs, as one run's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from pydantic import Field

from .base import Context, Stage, StageConfig
from .predict import predictions_path
from .saliency import candidates_path, centres_path
from .split import path_of, read_table, write_table

TEST = "test"


class PoolConfig(StageConfig):
    """Puts the test photographs of several runs, folds of a cross-validation, together for evaluate and localise."""

    runs: list[Path] = Field(min_length=2, description="folders of the runs, a fold each")
    saliency: str = Field("saliency", description="the stage whose centres are put together, where the runs have it")


def run(config: PoolConfig, context: Context) -> None:
    """Writes splits.parquet, predictions.parquet and, where the runs have them, the tables of centres and candidates.

    Each holds the runs' test photographs. Decisions are those of a photograph's own run, and so at its threshold.
    ValueError where a photograph was tested in two runs.
    """
    runs = [Context(folder) for folder in config.runs]
    splits = [read_table(path_of(each), "split") for each in runs]
    tested = [set(table["id"][table["split"] == TEST]) for table in splits]
    ids = [id for part in tested for id in sorted(part)]
    if len(ids) != len(set(ids)):
        twice = next(id for id in sorted(set(ids)) if ids.count(id) > 1)
        raise ValueError(
            f"{twice} is a test photograph of two runs; give the folds of one cross-validation, split.folds"
        )
    parts = [read_table(predictions_path(each), "predict") for each in runs]
    pooled = pd.concat([table[table["id"].isin(mine)] for table, mine in zip(parts, tested, strict=True)])
    pooled.attrs = parts[0].attrs
    write_table(predictions_path(context), pooled.reset_index(drop=True))
    for path in (centres_path, candidates_path):
        if all(path(each, config.saliency).exists() for each in runs):
            found = [pd.read_parquet(path(each, config.saliency)) for each in runs]
            kept = [table[table["id"].isin(mine)] for table, mine in zip(found, tested, strict=True)]
            write_table(path(context, config.saliency), pd.concat(kept, ignore_index=True))
    every = pd.concat(splits).drop_duplicates("id")[["id"]]
    write_table(path_of(context), every.assign(split=every["id"].isin(ids).map({True: TEST, False: "unlabelled"})))
    context.say(f"{context.name}: {len(ids)} test photographs of {len(runs)} runs")


def reads(config: PoolConfig, context: Context) -> Iterable[Path]:
    runs = [Context(folder) for folder in config.runs]
    return [path for each in runs for path in (path_of(each), predictions_path(each))]


def writes(config: PoolConfig, context: Context) -> Iterable[Path]:
    return [path_of(context), predictions_path(context)]


STAGE = Stage("pool", PoolConfig, run, reads, writes, uses_store=False)
