"""metrics.json: every model's measures, by patient, and what it says where they cannot be computed."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn import metrics as sklearn_metrics

from tilestream.methods import metrics as m
from tilestream.stages import Context
from tilestream.stages.evaluate import EvaluateConfig, columns
from tilestream.stages.evaluate import run as evaluate
from tilestream.store import create_store, find_photographs, ingest_photograph, write_labels


def predictions(path: Path, count: int = 120) -> pd.DataFrame:
    """Three models on `count` photographs, some without a prediction of the sliding window."""
    rng = np.random.default_rng(0)
    grade = rng.integers(0, 5, count)
    label = (grade >= 2).astype(int)
    table = pd.DataFrame({"id": [f"{i // 2}_{'lr'[i % 2]}" for i in range(count)], "label": label})
    for prefix, noise in (("", 0.2), ("naive_", 0.4), ("sliding_window_", 0.3)):
        probability = np.clip(0.3 + 0.4 * label + rng.normal(0, noise, count), 0, 1)
        table[f"{prefix}probability"], table[f"{prefix}decision"] = probability, (probability > 0.5).astype(int)
    table.loc[:4, ["sliding_window_probability", "sliding_window_decision"]] = np.nan
    table["grade"], table["split"] = grade, "test"
    table["five_grade"] = np.clip(grade + rng.integers(-1, 2, count), 0, 4)
    table.loc[count - 1, ["label", "grade"]] = pd.NA
    table = table.astype({"label": "Int64", "grade": "Int64"})
    table.attrs["model"] = "saliency"
    table.to_parquet(path / "predictions.parquet", index=False)
    return table[:-1].astype({"label": int, "grade": int})


def measured(path: Path, store: Path | None = None, **settings) -> dict:
    evaluate(EvaluateConfig(**settings), Context(path, store, name="evaluate"))
    return json.loads((path / "metrics.json").read_text())


def test_every_model_has_every_measure(tmp_path):
    table = predictions(tmp_path)
    result = measured(tmp_path)
    assert result["groups"] == "photographs"
    assert [name for name in result if isinstance(result[name], dict)] == ["naive", "saliency", "sliding_window"]
    for name, prefix in (("naive", "naive_"), ("saliency", ""), ("sliding_window", "sliding_window_")):
        there = table[table[f"{prefix}probability"].notna()]
        labels, scores = there["label"], there[f"{prefix}probability"]
        found = result[name]
        assert found["photographs"] == len(there) == (114 if prefix == "sliding_window_" else 119)
        assert found["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores))
        assert found["auprc"] == pytest.approx(sklearn_metrics.average_precision_score(labels, scores))
        assert found["brier"] == pytest.approx(sklearn_metrics.brier_score_loss(labels, scores))
        assert found["auc_low"] < found["auc"] < found["auc_high"]
        assert found["auc_bootstrap_low"] < found["auc"] < found["auc_bootstrap_high"]
        assert found["auprc_low"] < found["auprc"] < found["auprc_high"]
        assert found["class_accuracies"] == [found["specificity"], found["sensitivity"]]
        assert 0 < found["ece"] < 1
        assert sum(part["count"] for part in found["calibration"]) == len(there)
        assert np.sum(found["by_grade"]) == len(there)
    assert "auc_minus_naive" not in result["naive"]
    difference = result["saliency"]["auc_minus_naive"]
    assert difference == pytest.approx(result["saliency"]["auc"] - result["naive"]["auc"])
    assert result["saliency"]["auc_minus_naive_low"] < difference < result["saliency"]["auc_minus_naive_high"]
    assert 0 < result["saliency"]["auc_minus_naive_p"] < 0.05
    both = table[table["sliding_window_probability"].notna()]
    paired = m.auc_difference(both["label"], both["sliding_window_probability"], both["naive_probability"])
    assert result["sliding_window"]["auc_minus_naive"] == pytest.approx(paired.value)
    five = result["naive"]["five_grade"]
    expected = sklearn_metrics.cohen_kappa_score(table["grade"], table["five_grade"], weights="quadratic")
    assert five["kappa"] == pytest.approx(expected)
    assert five["within_one_grade"] == 1


def test_intervals_are_by_patient_where_a_store_says_who(tmp_path):
    predictions(tmp_path, 30)
    apart = measured(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(1)
    ids = pd.read_parquet(tmp_path / "predictions.parquet")["id"]
    for id in ids:
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{id}.png")
    store = create_store(tmp_path / "s.zarr")
    for source in find_photographs(folder):
        ingest_photograph(store, source)
    write_labels(store, pd.DataFrame({"id": ids, "label": 0, "patient": [id.split("_")[0] for id in ids], "eye": None}))
    together = measured(tmp_path, store)
    assert together["groups"] == "patients"
    assert together["naive"]["auc"] == apart["naive"]["auc"]
    assert together["naive"]["auc_low"] == apart["naive"]["auc_low"]
    for name in ("naive", "saliency"):
        assert together[name]["auc_bootstrap_low"] != apart[name]["auc_bootstrap_low"]
    assert measured(tmp_path, store) == together
    assert measured(tmp_path, store, seed=1) != together


def test_one_class_is_said_and_nothing_is_nan(tmp_path):
    table = predictions(tmp_path)
    table[table["label"] == 1].to_parquet(tmp_path / "predictions.parquet", index=False)
    found = measured(tmp_path)["saliency"]
    assert found["auc"] is found["auprc"] is found["auc_bootstrap_low"] is found["auc_minus_naive"] is None
    assert "both classes" in found["auc_missing"]
    assert found["specificity"] is None
    assert found["sensitivity"] is not None


def test_which_models_a_table_holds():
    def named(*names: str, model: str | None = None) -> dict[str, str]:
        table = pd.DataFrame(columns=list(names))
        if model:
            table.attrs["model"] = model
        return columns(table)

    pair = ("probability", "decision")
    assert named(*pair) == {"naive": ""}
    assert named(*pair, model="saliency") == {"saliency": ""}
    assert list(named(*pair, "naive_probability", "naive_decision").items()) == [("naive", "naive_"), ("saliency", "")]
    assert named(*pair, "bovw_probability", "bovw_decision", "x_probability", model="saliency") == {
        "saliency": "", "bovw": "bovw_",
    }  # fmt: skip
