"""The report shows what belongs together, and the crops stage refuses grades that are not unhealthy."""

import json

import pandas as pd
import pytest

from tilestream.stages import Context
from tilestream.stages.base import digest
from tilestream.stages.crops import CropsConfig, plan_crops
from tilestream.stages.evaluate import EvaluateConfig
from tilestream.stages.evaluate import run as evaluate
from tilestream.stages.report import _border, _results


def predictions(path, probabilities) -> None:
    rows = {"id": list("abcd"), "label": [0, 0, 1, 1], "probability": probabilities, "decision": [0, 1, 0, 1]}
    pd.DataFrame({**rows, "grade": [0, 1, 2, 4], "split": "test"}).to_parquet(path / "predictions.parquet", index=False)


def test_measures_of_other_predictions_are_left_out(tmp_path):
    context = Context(tmp_path, name="evaluate")
    predictions(tmp_path, [0.1, 0.8, 0.4, 0.9])
    evaluate(EvaluateConfig(), context)
    measured = json.loads((tmp_path / "metrics.json").read_text())
    assert measured["predictions_sha256"] == digest(tmp_path / "predictions.parquet")
    assert [section.heading for section in _results(context)] == ["Results"]
    predictions(tmp_path, [0.2, 0.8, 0.4, 0.9])
    assert list(_results(context)) == []


def test_the_border_drawn_is_the_saliency_stages(tmp_path):
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "saliency.json").write_text(json.dumps({"config": {"border": 0.23}}))
    assert _border(Context(tmp_path)) == 0.23


@pytest.mark.parametrize("grades", [[1, 2], [], [0]])
def test_unhealthy_examples_are_of_unhealthy_grades(tmp_path, grades):
    with pytest.raises(ValueError, match=r"unhealthy_grades=.* must be grades from 2 on"):
        plan_crops(CropsConfig(unhealthy_grades=grades), Context(tmp_path))
