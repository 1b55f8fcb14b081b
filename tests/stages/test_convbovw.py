"""The convolutional bag of visual words as stages: what it learns, writes, resumes and applies to new photographs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tilestream.methods import Extremes, Normalised
from tilestream.methods.metrics import auc
from tilestream.nets import load_model
from tilestream.stages import ClusterConfig, Context, convbovw_dense, load, run_pipeline
from tilestream.stages.models import own_device
from tilestream.store import Store

SPARSE = {"words": 6, "hidden": 16, "dropout": 0, "epochs": 12, "batch_size": 4, "learning_rate": 0.02}
DENSE = {
    "words": 6, "hidden": 8, "dropout": 0, "widths": [4, 6, 6, 8], "crops": 2, "crop_px": 110, "crop_epochs": 12,
    "epochs": 2, "batch_size": 4, "learning_rate": 0.02, "full_learning_rate": 0.001, "colour": 0.1,
}  # fmt: skip


@pytest.fixture
def run(spotted, tmp_path) -> Path:
    return shutil.copytree(spotted, tmp_path / "run")


def predicted(run, name, split):
    table = pd.read_parquet(run / f"{name}_predictions.parquet")
    return table, table[table["split"] == split]


def test_words_of_descriptors(run, go, write_pipeline):
    stages = {"convbovw_sparse": SPARSE, "evaluate": {"predictions": ["convbovw_sparse"]}}
    said = go(write_pipeline(stages), run)
    table, test = predicted(run, "convbovw_sparse", "test")
    assert list(table.columns) == ["id", "label", "probability", "decision", "grade", "split"]
    assert len(table) == 32
    assert (table["label"] == (table["grade"] >= 1)).all()
    assert auc(test["label"].astype(int), test["probability"]).value > 0.9
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["convbovw_sparse"]["auc"] == auc(test["label"].astype(int), test["probability"]).value
    model = load_model(run / "models" / "convbovw_sparse.safetensors")
    threshold = model.preprocessing["threshold"]["value"]
    assert ((table["probability"] >= threshold) == table["decision"]).all()
    empty = table.set_index("id")["probability"]["04"]
    assert empty == pytest.approx(model.net.classifier.bias.softmax(0)[1].item())  # no word is there
    assert "epoch 12/12" in said
    assert json.loads((run / "training" / "convbovw_sparse.json").read_text())["best_epoch"] <= 12
    assert "convbovw_sparse: unchanged, skipped" in go(write_pipeline(stages), run)


def test_words_of_photographs(run, go, write_pipeline):
    stages = {"convbovw_dense": DENSE, "evaluate": {"predictions": ["convbovw_dense"]}}
    said = go(write_pipeline(stages), run)
    table, test = predicted(run, "convbovw_dense", "test")
    assert set(table["split"]) == {"validation", "test"}
    assert auc(test["label"].astype(int), test["probability"]).value > 0.9
    assert "convbovw_dense_crops: epoch 12/12" in said
    assert "convbovw_dense: epoch 2/2" in said
    assert {path.stem for path in (run / "training").glob("*.json")} == {"convbovw_dense", "convbovw_dense_crops"}
    model = load_model(run / "models" / "convbovw_dense.safetensors")
    row, store = test.iloc[0], Store(run / "photographs.zarr")
    average = np.load(run / "average.npy")
    extremes = pd.read_parquet(run / "extremes.parquet").set_index("id").loc[row["id"]]
    image = Normalised(store.image(row["id"]), average, Extremes(extremes["low"], extremes["high"]))
    logits = model.net(torch.from_numpy(image[:, :, :])[None])
    assert row["probability"] == pytest.approx(logits.softmax(1)[0, 1].item(), abs=1e-5)


@pytest.mark.parametrize("name", ["convbovw_sparse", "convbovw_dense"])
def test_an_old_runs_model_decides(run, go, write_pipeline, tmp_path, name):
    quick = {"convbovw_sparse": {**SPARSE, "epochs": 2}, "convbovw_dense": {**DENSE, "crop_epochs": 2, "epochs": 0}}
    go(write_pipeline({name: quick[name]}), run)
    new = tmp_path / "new"
    new.mkdir()
    for kept in ("photographs.zarr", "descriptors.zarr"):
        (new / kept).symlink_to(run / kept)
    shutil.copy(run / "descriptors.parquet", new)
    go(write_pipeline({name: {"decision": "stored"}}), new, models=run / "models")
    old, found = (pd.read_parquet(folder / f"{name}_predictions.parquet").set_index("id") for folder in (run, new))
    assert len(found) == 32
    np.testing.assert_allclose(found.loc[old.index, "probability"], old["probability"], atol=1e-6)
    assert (found.loc[old.index, "decision"] == old["decision"]).all()
    assert not (new / "models").exists()


def test_a_killed_training_goes_on(run, go, write_pipeline, monkeypatch, tmp_path):
    whole = shutil.copytree(run, tmp_path / "whole")
    pipeline = write_pipeline({"convbovw_dense": {**DENSE, "crop_epochs": 3}})
    go(pipeline, whole)
    with monkeypatch.context() as patch:  # after an epoch on whole photographs
        patch.setattr(convbovw_dense, "fit", one_epoch(convbovw_dense.fit))
        with pytest.raises(KeyboardInterrupt):
            go(pipeline, run)
    said = go(pipeline, run, resume=True)
    assert "crops: epoch" not in said
    assert "convbovw_dense: epoch 1/2" not in said
    assert "convbovw_dense: epoch 2/2" in said
    one, other = (load_model(folder / "models" / "convbovw_dense.safetensors") for folder in (run, whole))
    assert one.preprocessing["threshold"] == other.preprocessing["threshold"]
    for name, value in one.net.state_dict().items():
        assert torch.equal(value, other.net.state_dict()[name]), name


def test_photographs_that_were_decided_are_not_decided_again(run, go, write_pipeline, monkeypatch):
    pipeline = write_pipeline({"convbovw_dense": {**DENSE, "crop_epochs": 1, "epochs": 1}})
    with monkeypatch.context() as patch:
        patch.setattr(convbovw_dense, "conclude", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go(pipeline, run)
    said = go(pipeline, run, resume=True)
    table, _ = predicted(run, "convbovw_dense", "test")
    assert f"{len(table)} of {len(table)} photographs are done already" in said


def interrupted(*_, **__):
    raise KeyboardInterrupt


def one_epoch(fit):
    def fit_once(*arguments, on_epoch, **others):
        def stop(record):
            on_epoch(record)
            raise KeyboardInterrupt

        return fit(*arguments, on_epoch=stop, **others)

    return fit_once


def test_crops_lie_inside_and_are_normalised(run):
    store = Store(run / "photographs.zarr")
    average, ids = np.load(run / "average.npy"), store.ids[:3]
    whole = convbovw_dense.Photographs(store, ids, np.array([0, 1, 0]), average,
                                       dict.fromkeys(ids, Extremes(-50, 200)), None)  # fmt: skip
    crops = convbovw_dense.Crops(whole, 2, 64, seed=0)
    assert crops.labels.tolist() == [0, 0, 1, 1, 0, 0]
    assert len(crops) == 6
    image = whole[1][:, :, :]
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 64, 64))[0]
    assert (windows == crops[3]).all((2, 3, 4)).sum() == 1
    assert not np.array_equal(crops[2], crops[3])
    wide = convbovw_dense.Crops(whole, 1, 140, seed=0)[0]  # beyond the photograph are zeros
    assert wide.shape == (3, 140, 140)
    assert not wide[:, 120:].any()


def test_a_class_that_is_missing_is_told(run, go, write_pipeline):
    with pytest.raises(ValueError, match=r"train photographs have labels \[0\], both classes are needed; set path"):
        go(write_pipeline({"convbovw_sparse": {"pathological_from": 3}}), run)


def test_a_declined_gpu_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices = {name: own_device(Context(tmp_path, cluster=ClusterConfig(device=name))) for name in ("auto", "cpu")}
    assert devices == {"auto": "cuda", "cpu": "cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device(Context(tmp_path)) == "cpu"


def test_photographs_that_are_all_but_certain_are_no_equals(run, monkeypatch):
    kept = {"average": np.load(run / "average.npy"), "side_px": None}
    found = []
    for gap in (20.0, 25.0):
        monkeypatch.setattr(convbovw_dense, "_streamed", lambda *_, gap=gap: (lambda _: torch.tensor([[0, gap]]), kept))
        place = str(run / "photographs.zarr"), "00"
        found.append(convbovw_dense.one(*place, Extremes(0, 1), "", "", 2**30, "cpu", torch.get_num_threads()))
    assert found[0] < found[1] < 1


def test_a_small_budget_is_said_before_any_training(run, write_pipeline):
    stages = load(write_pipeline({"convbovw_dense": DENSE}))
    cluster = ClusterConfig(memory="1MB")
    with Context(run, run / "photographs.zarr", cluster) as context, pytest.raises(ValueError, match="too small"):
        run_pipeline(stages, context)
    assert not list((run / "journal").glob("convbovw_dense.partial-*/crops"))
