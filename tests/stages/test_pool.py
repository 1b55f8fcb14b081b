"""Cross-validation: every photograph is tested once, patients stay whole, and the runs' findings come together."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score

from tilestream.stages import Context, execute
from tilestream.stages.pipeline import STAGES
from tilestream.stages.predict import predictions_path
from tilestream.stages.saliency import centres_path
from tilestream.stages.split import path_of, write_table
from tilestream.training import split


def samples(count=90):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "id": [f"{i:03d}" for i in range(count)],
            "label": pd.array(rng.integers(0, 5, count), dtype="Int64"),
            "patient": [str(i // 2) for i in range(count)],
            "source_sha256": [f"sha{i if i % 9 else 0}" for i in range(count)],  # every ninth is the same file
        }
    )


def test_every_photograph_is_tested_once():
    table = samples()
    folds = [split(table, fold=(k, 4)) for k in range(4)]
    tested = pd.concat([f["id"][f["split"] == "test"] for f in folds])
    assert sorted(tested) == sorted(table["id"])
    for fold in folds:
        joined = table.assign(split=fold["split"])
        assert (joined.groupby("patient")["split"].nunique() == 1).all()
        assert (joined.groupby("source_sha256")["split"].nunique() == 1).all()
        assert set(joined["split"]) == {"train", "validation", "test"}
        assert (joined["split"] == "train").sum() > (joined["split"] == "validation").sum()


@pytest.mark.parametrize("fold", [(4, 4), (-1, 3), (0, 1)])
def test_no_such_fold(fold):
    with pytest.raises(ValueError, match=rf"fold={fold[0]} of folds={fold[1]} must be from 0"):
        split(samples(), fold=fold)


@pytest.fixture
def folds(tmp_path):
    """Three runs with predictions of all photographs and centres of some; the folds' test photographs differ."""
    table, rng = samples(), np.random.default_rng(1)
    runs = []
    for k in range(3):
        context = Context(tmp_path / f"fold-{k}")
        context.run.mkdir()
        sides = split(table, fold=(k, 3))
        write_table(path_of(context), sides)
        label = (table["label"] > 1).astype("Int64")
        probability = rng.random(len(table))
        found = table[["id"]].assign(label=label, grade=table["label"], split=sides["split"], probability=probability)
        found["decision"] = (probability > 0.5).astype(int)
        found.attrs["model"] = "saliency"
        write_table(predictions_path(context), found)
        write_table(centres_path(context, "saliency"), table[["id"]].assign(y_px=k, x_px=0, value=0.0))
        runs.append(context.run)
    return runs


def test_what_runs_found_comes_together(folds, tmp_path):
    said = io.StringIO()
    with Context(tmp_path / "all", console=Console(file=said, width=200)) as context:
        execute("pool", STAGES["pool"], STAGES["pool"].config(runs=folds), context)
        execute("evaluate", STAGES["evaluate"], STAGES["evaluate"].config(), context)
    assert "90 test photographs of 3 runs" in said.getvalue()
    wanted = []
    for run in folds:
        found = pd.read_parquet(run / "predictions.parquet")
        wanted.append(found[found["split"] == "test"])
    wanted = pd.concat(wanted)
    metrics = json.loads((tmp_path / "all" / "metrics.json").read_text())
    auc = roc_auc_score(wanted["label"].astype(int), wanted["probability"])
    assert metrics["saliency"]["auc"] == pytest.approx(auc)
    assert metrics["saliency"]["photographs"] == 90
    centres = pd.read_parquet(centres_path(context, "saliency")).set_index("id")["y_px"]
    tested = pd.read_parquet(folds[2] / "splits.parquet").set_index("id")["split"] == "test"
    assert (centres[tested] == 2).all()
    assert set(pd.read_parquet(path_of(context))["split"]) == {"test"}


def test_a_photograph_is_tested_twice(folds, tmp_path):
    with Context(tmp_path / "all") as context, pytest.raises(ValueError, match=r"\d+ is a test photograph of two runs"):
        execute("pool", STAGES["pool"], STAGES["pool"].config(runs=[*folds, folds[0]]), context)
