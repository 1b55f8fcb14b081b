"""Training, validation and test photographs, by patient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from pydantic import Field

from tilestream.training import groups, split
from tilestream.training.splits import SPLITS, UNLABELLED

from .base import Context, Stage, StageConfig, replacing


class SplitConfig(StageConfig):
    """Splits photographs by patient; byte-identical ones stay together, directly or through others."""

    fractions: tuple[float, float, float] = Field((0.65, 0.15, 0.20), description="training, validation, test")
    seed: int = Field(0, ge=0, description="seed of the split")
    folds: int | None = Field(
        None, ge=2, description="for cross-validation: test on one of so many equal parts instead of the third fraction"
    )
    fold: int = Field(0, ge=0, description="which of the folds to test on, from 0")


def run(config: SplitConfig, context: Context) -> None:
    """Writes splits.parquet: id, split (train, validation, test, unlabelled)."""
    samples = context.store.samples()
    fold = None if config.folds is None else (config.fold, config.folds)
    table = split(samples, config.fractions, config.seed, fold)
    write_table(path_of(context), table)
    counts = table["split"].value_counts()
    said = ", ".join(f"{counts[name]} {name}" for name in (*SPLITS, UNLABELLED) if name in counts)
    context.say(f"split: {said}; {len(set(groups(samples)))} groups that share no patient and no file")
    if apart := eyes_apart(samples):
        context.say(
            f"split: warning: photographs named {apart[0]}_left and {apart[0]}_right, and {len(apart) - 1} more pairs, "
            "are stored as two patients' and may lie on two sides; ingest with --adapter eyepacs or --patient-column"
        )


def eyes_apart(samples: pd.DataFrame) -> list[str]:
    """Names without eye, like 10, of pairs like 10_left and 10_right that are stored as two patients'."""
    names = samples["id"].astype("string").str.extract(r"(.+)_(?:left|right)$", expand=False)
    patients = samples.groupby(names)["patient"].nunique()
    return [str(name) for name in patients.index[patients > 1]]


def path_of(context: Context) -> Path:
    return context.run / "splits.parquet"


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Parquet, whole or not at all."""
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)


def read_table(path: Path, made_by: str) -> pd.DataFrame:
    """A table of this run; ValueError names the stage that makes it."""
    if not path.exists():
        raise ValueError(f"{path.parent.name} has no {path.name}; run 'tilestream {made_by}' first")
    return pd.read_parquet(path)


def chosen(context: Context, splits: Sequence[str] | None, limit: int | None = None) -> pd.DataFrame:
    """Samples with their split ("" where the run has none), of the splits asked for (None: all), the first `limit`."""
    samples = context.store.samples()
    if path_of(context).exists():
        samples = samples.merge(pd.read_parquet(path_of(context)), on="id", how="left")
        samples["split"] = samples["split"].fillna("")
    elif splits:
        raise ValueError("this run has no splits.parquet; run 'tilestream split' first")
    else:
        samples["split"] = ""
    if splits:
        samples = samples[samples["split"].isin(splits)]
    return samples.head(limit).reset_index(drop=True) if limit else samples.reset_index(drop=True)


def writes(config: SplitConfig, context: Context) -> Iterable[Path]:
    return [path_of(context)]


STAGE = Stage("split", SplitConfig, run, writes=writes)
