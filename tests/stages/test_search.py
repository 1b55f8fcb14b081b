"""Random search: what is drawn, which trial is the best, and that a killed search loses no trial that was done."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tilestream import cluster
from tilestream.cluster import Job, Progress
from tilestream.nets import load_model
from tilestream.stages import Context, parse, runner
from tilestream.stages.convbovw import described, part
from tilestream.stages.search import SearchConfig, drawn, trial

SPACE = {"learning_rate": [0.001, 0.05], "words": [3, 9]}
SEARCH = {
    "stage": "search", "trials": 4, "space": SPACE, "hidden": 16, "dropout": 0, "epochs": 3, "batch_size": 4,
    "word_counts": [2, 5],
}  # fmt: skip


@pytest.fixture
def run(spotted, tmp_path) -> Path:
    return shutil.copytree(spotted, tmp_path / "run")


@pytest.fixture
def pipeline(write_pipeline):
    return write_pipeline({"convbovw_sparse": SEARCH})


def test_the_best_is_trained_again(run, go, pipeline):
    said = go(pipeline, run)
    table = pd.read_parquet(run / "convbovw_sparse.parquet").set_index("id")
    assert list(table.index) == ["trial 0", "trial 1", "trial 2", "trial 3", "words 2", "words 5"]
    trials, counts = table.iloc[:4], table.iloc[4:]
    best = trials.loc[trials["validation_auc"].idxmax()]
    assert f"{best.name} is the best" in said
    assert trials["test_auc"].isna().all()  # nothing is chosen by test photographs
    assert counts["test_auc"].between(0, 1).all()
    assert counts["words"].tolist() == [2, 5]
    assert (counts["learning_rate"] == best["learning_rate"]).all()
    model = load_model(run / "models" / "convbovw_sparse.safetensors")
    assert model.parameters["words"] == best["words"]
    history = json.loads((run / "training" / "convbovw_sparse.json").read_text())
    again = max(record["validation_auc"] for record in history["records"])
    assert again == best["validation_auc"]  # the same training, bit for bit
    assert len(pd.read_parquet(run / "convbovw_sparse_predictions.parquet")) == 32


def test_a_killed_search_loses_nothing(run, go, pipeline, tmp_path, monkeypatch):
    whole = shutil.copytree(run, tmp_path / "whole")
    go(pipeline, whole)
    append = runner.Journal.append

    def limited(self, record):
        append(self, record)
        if len(self.read()) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tilestream.stages.search.Journal.append", limited)
        with pytest.raises(KeyboardInterrupt):
            go(pipeline, run)
    (journal,) = (run / "journal").glob("convbovw_sparse.partial-*/trials.jsonl")
    first = [json.loads(line) for line in journal.read_text().splitlines()]
    said = go(pipeline, run, resume=True)
    assert f"{len(first)} of 4 trials are done already" in said
    tables = [pd.read_parquet(folder / "convbovw_sparse.parquet").set_index("id") for folder in (run, whole)]
    for row in first:
        assert tables[0].loc[row["id"], "seconds"] == row["seconds"]  # not tried again
    pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in tables))


def test_a_trial_without_a_finite_loss_never_wins(run, go, write_pipeline):
    stage = {**SEARCH, "trials": 3, "seed": 10, "space": {"learning_rate": [0.001, 1e30]}, "word_counts": []}
    said = go(write_pipeline({"convbovw_sparse": stage}), run)
    table = pd.read_parquet(run / "convbovw_sparse.parquet").set_index("id")
    lost = table["validation_auc"].isna()
    assert 0 < lost.sum() < 3
    assert said.count("no finite loss") == lost.sum()
    assert f"{table['validation_auc'].idxmax()} is the best" in said
    stage["space"] = {"learning_rate": [1e29, 1e30]}
    with pytest.raises(ValueError, match="no trial of 3 had a finite loss; lower the learning rates of space"):
        go(write_pipeline({"convbovw_sparse": stage}), run)


def test_a_long_trial_tells_that_it_lives(run):
    config, context = (
        parse(SearchConfig, {k: v for k, v in SEARCH.items() if k != "stage"}),
        Context(run, run / "photographs.zarr"),
    )
    table, bags = described(config, context)
    train, validation = (part(table, bags, split) for split in ("train", "validation"))
    training, bar = config.training(epochs=3, flips=False), Ticking("search", 1, None, "trials", lambda: None)
    arguments = (config.network("descriptors", features=8), training, [train, validation], "cpu", 1)
    cluster.run([Job.call("a", trial, *arguments)], scheduler="synchronous", window=1, on_result=print, progress=bar)
    assert bar.ticks == 3 * -(-len(train) // config.batch_size)


class Ticking(Progress):
    ticks = 0

    def tick(self, token: str) -> None:
        self.ticks += 1


def test_what_is_drawn():
    config = parse(SearchConfig, {"trials": 200})
    settings = pd.DataFrame(drawn(config))
    for name, (low, high) in config.space.items():
        assert settings[name].between(low, high).all()
    assert settings["words"].dtype == settings["hidden"].dtype == int
    assert 0.3 < (settings["learning_rate"] < 1e-3).mean() < 0.7  # on a logarithmic scale
    assert drawn(parse(SearchConfig, {"trials": 5})) == drawn(config)[:5]
    assert drawn(parse(SearchConfig, {"trials": 5, "seed": 1})) != drawn(config)[:5]
    fixed = drawn(parse(SearchConfig, {"space": {"dropout": [0, 0.5]}, "words": 33}))
    assert {each["words"] for each in fixed} == {33}
    assert {each["learning_rate"] for each in fixed} == {1e-3}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"words": [50, 50]}, r"space.words=\(50, 50\) must begin below its end"),
        ({"dropout": [0, 1.5]}, "space.dropout=1.5"),
        ({"learning_rate": [0, 0.1]}, "space.learning_rate=0"),
        ({"depth": [1, 2]}, "depth"),
    ],
)
def test_a_space_that_is_none_is_refused(space, message):
    with pytest.raises(ValueError, match=message):
        parse(SearchConfig, {"space": space}, "search")
    with pytest.raises(ValueError, match="word_counts"):
        parse(SearchConfig, {"word_counts": [20, 1]}, "search")
