"""predict.yaml: decisions for photographs that have no labels, with the models of an old run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from tilestream.stages import ClusterConfig, Context, execute, find
from tilestream.stages.pipeline import STAGES
from tilestream.store import Store, create_store, find_photographs, ingest_photograph


@pytest.fixture(scope="module")
def unlabelled(made, tmp_path_factory):
    """Three photographs of the run, under other names, without labels."""
    folder = tmp_path_factory.mktemp("new")
    for id, name in (("1_left", "a"), ("2_right", "b"), ("3_left", "c")):
        shutil.copy(made.run / "photographs" / f"{id}.jpeg", folder / f"{name}.jpeg")
    store = create_store(folder / "new.zarr")
    for source in find_photographs(folder):
        assert ingest_photograph(store, source)["status"] == "committed"
    return Store(store)


def test_predict_needs_no_labels(made, unlabelled, go, tmp_path):
    settings = ["crops.size_px=96", "saliency.tile_px=256"]
    go(Path("predict"), tmp_path, settings, store=unlabelled.path, models=made.models)
    old = pd.read_parquet(made.run / "predictions.parquet").set_index("id")
    new = pd.read_parquet(tmp_path / "predictions.parquet")
    assert new["label"].isna().all()
    assert set(new["decision"]) <= {0, 1}
    for row, id in zip(new.itertuples(), ("1_left", "2_right", "3_left"), strict=True):  # as it was decided before
        assert row.probability == pytest.approx(old.loc[id, "probability"], abs=1e-6)
        assert (row.decision, row.naive_decision) == (old.loc[id, "decision"], old.loc[id, "naive_decision"])
    assert zarr.open_array(tmp_path / "crops.zarr" / "image", mode="r").shape == (3, 3, 96, 96)
    assert sorted(path.stem for path in (tmp_path / "overviews").iterdir()) == ["a", "b", "c"]
    assert json.loads((tmp_path / "timings.json").read_text()).keys() == {
        "preprocess", "saliency", "crops", "predict", "report",
    }  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert all(f"crop frame on {id}" in page for id in "abc")


def test_saliency_and_crops_alone_make_a_report(made, unlabelled, address, tmp_path):
    """No splits, no average image in the run, no predictions: what the model file holds is enough."""
    settings = {
        "saliency": {"model": str(made.models / "first.safetensors"), "tile_px": 448},
        "crops": {"size_px": 96},
        "predict": {"model": str(made.models / "crops.safetensors"), "naive": None, "decision": "stored"},
    }
    with Context(tmp_path, unlabelled.path, ClusterConfig(scheduler=address), models=made.models) as context:
        for verb in ("saliency", "crops", "report"):
            execute(verb, STAGES[verb], STAGES[verb].config(**settings.get(verb, {})), context)
        assert "crop frame on b" in (tmp_path / "report.html").read_text()
        execute("predict", STAGES["predict"], STAGES["predict"].config(**settings["predict"]), context)
    # the crops were cut without an average image; the extremes that the network needs are its own average's
    old = pd.read_parquet(made.run / "predictions.parquet").set_index("id").loc[["1_left", "2_right", "3_left"]]
    np.testing.assert_allclose(
        pd.read_parquet(tmp_path / "predictions.parquet")["probability"], old["probability"], atol=1e-6
    )


def test_shipped_pipelines_are_found_by_name():
    for name in ("predict", "predict.yaml", "pipelines/predict.yaml"):
        assert find(Path(name)).name == "predict.yaml"
