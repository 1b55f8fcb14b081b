"""Training over workers: what they make is what one process makes, and a killed one is made up for."""

import io
import json
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
import zarr
from rich.console import Console

from tilestream.cluster import RankLost, run_ranks
from tilestream.nets import load_model
from tilestream.stages import ClusterConfig, Context, execute
from tilestream.stages import train_ranks as ranks
from tilestream.stages.crops import _create, _describe
from tilestream.stages.train import STAGE, TrainConfig, examples, reads

NET = {"widths": [4, 4, 6, 8, 8]}


@pytest.fixture
def run(made, tmp_path, address):
    """run(name, ...): a train stage on the small run's photographs, in a folder with its splits, average and crops."""
    for name in ("splits.parquet", "average.npy", "extremes.parquet", "crops_train.parquet", "crops_train.zarr"):
        (tmp_path / name).symlink_to(made.run / name)

    def go(name, cluster=None, resume=False, **settings):
        config = TrainConfig(**{"epochs": 2, "batch_size": 4, "parameters": NET, "model": name, **settings})
        heard = io.StringIO()
        console = Console(file=heard, soft_wrap=True, width=1000)
        cluster = cluster or ClusterConfig(scheduler=address, workers=2)
        with Context(tmp_path, made.store.path, cluster, console=console, resume=resume) as context:
            execute(name, STAGE, config, context)
        return heard.getvalue()

    return go


def weights(folder, name):
    return load_model(folder / "models" / f"{name}.safetensors").net.state_dict()


def history(folder, name):
    return json.loads((folder / "training" / f"{name}.json").read_text())


def test_two_ranks_train(run, tmp_path):
    said = run("two", ranks=2, batch_size=6)
    assert "two: epoch 2/2 loss" in said
    assert len(history(tmp_path, "two")["records"]) == 2
    weights(tmp_path, "two")
    assert not list((tmp_path / "journal").glob("*.partial-*"))
    assert "skipped" in run("two", ranks=2, batch_size=6, restarts=7, rank_timeout=5), "they change no results"


def test_photographs_at_full_resolution_over_ranks_equal_one_process(run, tmp_path):
    run("start")
    common = {"examples": "photographs", "init": "start", "optimizer": "sgd", "learning_rate": 0.01, "epochs": 1}
    run("alone", **common)
    run("two", ranks="auto", **common)
    start, alone, two = (weights(tmp_path, name) for name in ("start", "alone", "two"))
    assert any(not torch.equal(start[name], alone[name]) for name in start)
    for name in alone:
        torch.testing.assert_close(two[name], alone[name], rtol=1e-3, atol=1e-6)
        if "running" in name:
            assert torch.equal(alone[name], start[name])
    (one,), (other,) = history(tmp_path, "alone")["records"], history(tmp_path, "two")["records"]
    assert other["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)


def test_a_small_budget_is_said_before_any_work(run):
    with pytest.raises(ValueError, match="memory"):
        run("small", ClusterConfig(memory="1MiB", workers=1), examples="photographs")


def test_five_grades(run, tmp_path):
    said = run("grades", labels="five", epochs=1)
    assert "for training (by grade " in said
    model = load_model(tmp_path / "models" / "grades.safetensors")
    assert model.parameters["num_classes"] == 5
    assert model.preprocessing["labels"] == "five"
    assert history(tmp_path, "grades")["best_by"] in ("validation_auc", "validation_loss")


def test_init_names_a_model_of_this_run(run, made, tmp_path):
    run("first")
    said = run("second", init="first", epochs=1, learning_rate=1e-9, weight_decay=0)
    assert "skipped" not in said
    first, second = weights(tmp_path, "first"), weights(tmp_path, "second")
    for name in first:
        if "running" not in name and "batches" not in name:
            torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=0)
    assert "skipped" in run("second", init="first", epochs=1, learning_rate=1e-9, weight_decay=0)
    context = Context(tmp_path, made.store.path)
    assert tmp_path / "models" / "first.safetensors" in list(reads(TrainConfig(init="first"), context))
    assert Path("/x/y.safetensors") in list(reads(TrainConfig(init="/x/y.safetensors"), context))
    run("first", seed=1)
    assert "skipped" not in run("second", init="first", epochs=1, learning_rate=1e-9, weight_decay=0)
    with pytest.raises(ValueError, match="init='first' is the model that is written; give that another name"):
        run("first", init="first")
    with pytest.raises(FileNotFoundError, match=r"nobody\.safetensors' does not exist"):
        run("third", init="nobody")


def test_several_crops_an_image_are_examples_each(made, tmp_path):
    """The rows of a photograph have a rank each; a second round of crops has other places."""
    for name in ("splits.parquet", "average.npy", "extremes.parquet"):
        (tmp_path / name).symlink_to(made.run / name)
    table = pd.read_parquet(made.run / "crops_train.parquet")
    twice = pd.concat([table.assign(rank=0), table.assign(rank=1)], ignore_index=True)
    twice["position"] = range(len(twice))
    context = Context(tmp_path, made.store.path)
    whole = zarr.open_array(made.run / "crops_train.zarr" / "image")[:]
    _create(tmp_path / "crops_train.zarr", len(twice), whole.shape[-1])
    image = zarr.open_array(tmp_path / "crops_train.zarr" / "image", mode="r+")
    image[: len(table)], image[len(table) :] = whole, whole
    _describe(tmp_path / "crops_train.zarr", twice)
    twice.to_parquet(tmp_path / "crops_train.parquet")
    found = examples(TrainConfig(examples="crops"), context, "train")
    count = (table["split"] == "train").sum()
    assert len(found) == 2 * count
    assert (found[0] == found[count]).all()


def test_more_ranks_than_workers(run):
    with pytest.raises(ValueError, match=r"ranks=3 must be in \[1, 2\]"):
        run("three", ranks=3)
    with pytest.raises(ValueError, match="ranks=0 must be at least 1, or auto"):
        TrainConfig(ranks=0)


def test_a_folder_that_workers_do_not_see(run, monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda self: None)
    with pytest.raises(
        ValueError, match=r"does not see .* put the run's folder on a file system that all workers share"
    ):
        run("unseen", ranks=2, batch_size=6)


def test_lost_ranks_are_made_up_for_so_many_times(run, monkeypatch):
    calls = []

    def lost(client, function, count, **options):
        calls.append(count)
        raise RankLost("rank 1 of 2 is lost")

    monkeypatch.setattr(ranks, "run_ranks", lost)
    with pytest.raises(RuntimeError, match="rank 1 of 2 is lost; restarts=2 were in vain, --resume continues"):
        run("unlucky", ranks=2, restarts=2)
    assert calls == [2, 2, 2]


@pytest.mark.slow
def test_killed_ranks_change_nothing(run, tmp_path, monkeypatch):
    """A worker dies in each of two epochs; the weights are those of the same ranks undisturbed, bit for bit."""
    settings = {"ranks": 2, "epochs": 6, "batch_size": 6, "loader_threads": 1}
    run("calm", **settings)
    killed = []

    def killing(client, function, count, *, on_message, **options):
        def heard(number, message):
            on_message(number, message)
            if message and json.loads(message)["epoch"] == 2 * (len(killed) + 1) and len(killed) < 2:
                workers = sorted(client.run(os.getpid).items())
                killed.append(workers[-1 - len(killed)])  # rank 1, then rank 0
                os.kill(killed[-1][1], signal.SIGKILL)

        return run_ranks(client, function, count, on_message=heard, **options)

    monkeypatch.setattr(ranks, "run_ranks", killing)
    said = run("killed", ClusterConfig(workers=2, start_timeout=30), **settings)
    assert [f"rank {number} of 2 is lost with its worker {killed[1 - number][0]}" in said for number in (0, 1)] == [
        True, True,
    ]  # fmt: skip
    assert said.count("2 ranks go on from the last checkpoint") == 2
    calm, after = weights(tmp_path, "calm"), weights(tmp_path, "killed")
    assert all(torch.equal(calm[name], after[name]) for name in calm)
    seconds = [
        [record | {"seconds": 0} for record in history(tmp_path, name)["records"]] for name in ("calm", "killed")
    ]
    assert seconds[0] == seconds[1]
