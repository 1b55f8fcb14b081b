"""The paper's tables beside a run's."""

import json

import pytest

from tilestream.stages import Context
from tilestream.stages.tables import COUNTS, STAGE, TablesConfig, comparison, costs

NAIVE = {"sensitivity": 0.5, "sensitivity_low": 0.4, "sensitivity_high": 0.6, "specificity": 0.25, "auc": 0.6,
         "auc_low": None, "auc_high": None, "npv": None, "ppv": 1.0}  # fmt: skip


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path / "run")


def cell(tables, title, row, model, whose):
    table = next(t for t in tables if t["title"].startswith(title))
    found = next(r for r in table["rows"] if r[0].startswith(row) and model in r[1])
    return found[table["columns"].index(whose)]


def test_the_mislabelled_row_is_told_by_name():
    tables = comparison({"naive": NAIVE, "saliency": {**NAIVE, "by_grade": [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]}})
    assert cell(tables, "Table 2", "unhealthy found", "saliency", "paper") == 0.416
    assert cell(tables, "Table 2", "healthy found", "saliency", "paper") == 0.939
    assert cell(tables, "Table 2", "'unhealthy' right", "saliency", "paper") == 0.828
    assert cell(tables, "Table 2", "'healthy' right", "saliency", "paper") == 0.695
    assert cell(tables, "Table 2", "unhealthy found", "naive", "here") == "0.500 (0.400–0.600)"
    assert cell(tables, "Table 2", "healthy found", "naive", "here") == "0.250"
    assert cell(tables, "Table 3", "area", "naive", "here") == "0.600"
    assert cell(tables, "Table 2", "unhealthy found", "sliding window", "here") is None
    assert tables[2]["rows"][3] == ["'unhealthy', here", 6, 7, 8, 9, 10]
    assert "743 of 1069" in tables[0]["note"]
    assert sum(map(sum, COUNTS)) == 1349


def test_costs_grow_with_the_photographs(context, monkeypatch):
    info = {"images": 100, "megapixels": 1230.0}
    monkeypatch.setattr(Context, "store", property(lambda self: type("S", (), {"info": lambda s: info})()))
    (context.run / "journal").mkdir(parents=True)
    (context.run / "journal" / "check.json").write_text(json.dumps({"stage": "faithfulness"}))
    times = {
        "saliency": {"wall_s": 36.0, "peak_bytes": 2**21},
        "crops": {"wall_s": 72.0, "peak_bytes": 0},
        "check": {"wall_s": 360.0, "peak_bytes": 0},
    }
    (context.run / "timings.json").write_text(json.dumps(times))
    (table,) = costs(context, 1000)
    hours = {row[0]: row[3] for row in table["rows"]}
    assert hours == pytest.approx({"saliency": 0.1, "crops": 0.2, "check": 0.1, "all": 0.4})
    assert table["rows"][0] == ["saliency", 36.0, 2.0, pytest.approx(0.1)]
    assert "100 photographs of 12.3 megapixels" in table["note"], "an hour of small ones is no hour of large ones"


def test_a_run_without_measures_is_told_what_to_do(context):
    with pytest.raises(ValueError, match=r"run has no metrics\.json; run 'tilestream evaluate' first"):
        STAGE.run(TablesConfig(), context)


@pytest.mark.parametrize("as_json", [False, True])
def test_tables_are_printed_and_kept(context, capsys, as_json):
    context.cluster = context.cluster.model_copy(update={"as_json": as_json})
    context.run.mkdir()
    (context.run / "metrics.json").write_text(json.dumps({"naive": NAIVE}))
    context.name = "tables"
    STAGE.run(TablesConfig(), context)
    kept = json.loads((context.run / "tables.json").read_text())["tables"]
    assert [t["title"][:7] for t in kept] == ["Table 2", "Table 3"]
    printed = capsys.readouterr()
    assert "0.416" in printed.out + printed.err
