"""Bags of visual words end to end, on generated folders of the forms of DR1, DR2 and Messidor."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from rich.console import Console
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from tilestream.methods.bovw import BagOfVisualWords
from tilestream.methods.estimators import HistogramSVM
from tilestream.stages import ClusterConfig, Context, load, run_pipeline
from tilestream.stages.descriptors import read_descriptors
from tilestream.stages.evaluate import EvaluateConfig
from tilestream.stages.evaluate import run as evaluate
from tilestream.stages.scores import graded

FORMS = {"dr1": (48, 64), "dr2": (57, 86), "messidor": (96, 144)}
"""Heights and widths: a tenth of the published ones'."""
FOUND = {"contrast": 0.02, "min_size_px": 0, "max_size_px": 8, "border": 0, "tile_px": 64, "most": 64}
STAGES = {
    "split": {"fractions": [0.5, 0.25, 0.25]},
    "descriptors": FOUND,
    "bovw": {"words": 12, "costs": [1, 10], "gammas": [1]},
    "hard": {"stage": "bovw", "words": 6, "coding": "hard", "costs": [1], "gammas": [1]},
    "convbovw_sparse": {"words": 6, "hidden": 16, "epochs": 8},
    "evaluate": {"predictions": ["bovw", "hard", "convbovw_sparse"], "reference": "bovw"},
    "words": {"split": "test", "maps": 1},
}


def draw(height: int, width: int, grade: int, seed: int) -> np.ndarray:
    """(height, width) uint8: a soft texture, and bright spots where the grade is above 0."""
    rng = np.random.default_rng(seed)
    grey = gaussian_filter(rng.normal(size=(height, width)), 1.5)
    grey = 90 + 8 * grey / grey.std()
    y, x = np.mgrid[:height, :width]
    for _ in range(8 * grade + 2 * (grade > 0)):
        at = rng.uniform(8, height - 8), rng.uniform(8, width - 8)
        grey += 120 * np.exp(-((y - at[0]) ** 2 + (x - at[1]) ** 2) / (2 * 1.6**2))
    return np.clip(grey, 0, 255).astype(np.uint8)


def make(folder: Path, form: str, count: int = 32) -> dict[str, int]:
    """A data set in its published form; the grade of each photograph by its id in the store."""
    grades = {}
    for index in range(count):
        grade = (0, 1, 0, 2, 0, 3)[index % 6] if form == "messidor" else index % 2
        pixels = draw(*FORMS[form], grade, index)
        if form == "messidor":
            path = folder / f"Base{11 + index % 3}" / f"2005{index:04d}_PP.tif"
            image = Image.fromarray(np.stack([pixels // 2 + 60, pixels, pixels // 3], axis=2))
        else:
            normal, ill = ("Normal", "Exudates") if form == "dr1" else ("normal", "referable")
            path = folder / (ill if grade else normal) / f"image{index}.tif"
            image = Image.fromarray(pixels)  # grey
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        grades[path.relative_to(folder).with_suffix("").as_posix()] = grade
    if form == "messidor":
        for base in (11, 12, 13):
            rows = [
                f"{Path(id).name}.tif,Service {base},{grade},0" for id, grade in grades.items() if f"Base{base}/" in id
            ]
            header = "Image name,Ophthalmologic department,Retinopathy grade,Risk of macular edema"
            (folder / f"Annotation_Base{base}.csv").write_text("\n".join([header, *rows]) + "\n")
    return grades


@pytest.fixture(scope="module")
def go(address, tmp_path_factory):
    """go(run, stages, ...): runs stages on a data set in run/images, returns what was said."""

    def run(path: Path, stages: dict, store: Path | None = None, **options) -> str:
        pipeline = tmp_path_factory.mktemp("pipeline") / "p.yaml"
        pipeline.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
        heard = io.StringIO()
        console = Console(file=heard, soft_wrap=True, width=1000)
        cluster = ClusterConfig(scheduler=address, workers=2)
        with Context(path, store or path / "store.zarr", cluster, console=console, **options) as context:
            run_pipeline(load(pipeline), context)
        return heard.getvalue()

    return run


@pytest.fixture(scope="module", params=list(FORMS))
def made(request, go, tmp_path_factory):
    """A finished run on each data set: its folder, its form, the grades, what was said."""
    path = tmp_path_factory.mktemp(request.param)
    grades = make(path / "images", request.param)
    ingest = {"ingest": {"folder": "images", "adapter": request.param}}
    return path, request.param, grades, go(path, ingest | STAGES)


def test_from_folder_to_measures(made):
    path, form, grades, said = made
    assert "32 committed" in said
    table = pd.read_parquet(path / "bovw_predictions.parquet").set_index("id")
    assert list(table) == ["label", "probability", "decision", "grade", "split"]
    assert table["label"].to_dict() == {id: int(grade > 0) for id, grade in grades.items()}
    assert table["grade"].to_dict() == grades
    metrics = json.loads((path / "metrics.json").read_text())
    test = table[table["split"] == "test"]
    assert metrics["bovw"]["photographs"] == len(test) >= 7
    assert metrics["bovw"]["auc"] == pytest.approx(roc_auc_score(test["label"].astype(int), test["probability"]))
    assert metrics["bovw"]["auc"] > 0.85  # spots against none
    other = pd.read_parquet(path / "hard_predictions.parquet").set_index("id").loc[test.index]
    expected = roc_auc_score(other["label"].astype(int), other["probability"])
    assert metrics["hard"]["auc"] == pytest.approx(expected)
    assert metrics["hard"]["auc_minus_bovw"] == pytest.approx(expected - metrics["bovw"]["auc"])
    assert [name for name in metrics if isinstance(metrics[name], dict)] == ["bovw", "convbovw_sparse", "hard"]
    assert len(pd.read_parquet(path / "words.parquet")) == 6
    by_grade = np.sum(metrics["bovw"]["by_grade"], axis=0)
    assert by_grade.sum() == len(test)
    assert (by_grade[2:].sum() > 0) == (form == "messidor")


def test_the_model_is_json_and_gives_the_predictions_again(made):
    path = made[0]
    stored = json.loads((path / "models" / "bovw.json").read_text())
    words, machine = BagOfVisualWords.from_json(stored["dictionary"]), HistogramSVM.from_json(stored["machine"])
    table = pd.read_parquet(path / "bovw_predictions.parquet")
    found = machine.predict_proba(words.transform(read_descriptors(Context(path)).select(table["id"])))[:, 1]
    np.testing.assert_allclose(found, table["probability"], rtol=1e-9)
    assert list(found >= stored["threshold"]["value"]) == list(table["decision"] == 1)
    assert [(pair["C"], pair["gamma"]) for pair in stored["search"]] == [(1, 1), (10, 1)]
    assert max(stored["search"], key=lambda pair: pair["auc"])["C"] == machine.C


def test_nothing_is_learnt_from_test_photographs(made, go, tmp_path):
    """Other test photographs, the same dictionary, machine and threshold."""
    path = made[0]
    shutil.copytree(path, tmp_path / "run")
    splits = pd.read_parquet(path / "splits.parquet")
    bags = tmp_path / "run" / "descriptors.parquet"
    table = pd.read_parquet(bags).merge(splits, on="id")
    test = (table["split"] == "test").to_numpy()
    table.loc[test, ["start", "count"]] = table.loc[test, ["start", "count"]].to_numpy()[::-1]  # bags change owners
    table.drop(columns="split").to_parquet(bags, index=False)
    (tmp_path / "run" / "journal" / "descriptors.json").unlink()
    go(tmp_path / "run", {"bovw": STAGES["bovw"]}, store=path / "store.zarr")
    assert (tmp_path / "run" / "models" / "bovw.json").read_bytes() == (path / "models" / "bovw.json").read_bytes()
    before, after = (pd.read_parquet(p / "bovw_predictions.parquet").set_index("id") for p in (path, tmp_path / "run"))
    same = before["probability"] == after["probability"]
    assert same[before["split"] != "test"].all()
    assert not same[before["split"] == "test"].all()


def test_stored_words_decide_on_new_photographs(made, go, tmp_path):
    path, form, *_ = made
    grades = make(tmp_path / "images", form, 8)
    stages = {
        "ingest": {"folder": "images", "adapter": form}, "descriptors": FOUND, "bovw": {"decision": "stored"},
    }  # fmt: skip
    go(tmp_path, stages, models=path / "models")
    new = pd.read_parquet(tmp_path / "bovw_predictions.parquet").set_index("id")
    old = pd.read_parquet(path / "bovw_predictions.parquet").set_index("id")
    assert set(new.index) == set(grades)
    same = list(set(new.index) & set(old.index))
    assert len(same) == 8
    np.testing.assert_allclose(new.loc[same, "probability"], old.loc[same, "probability"], rtol=1e-9)
    assert not (tmp_path / "models").exists()
    go(tmp_path, {"split": {"seed": 1}})
    with pytest.raises(ValueError, match="model='bovw' was trained on other splits"):
        go(tmp_path, {"bovw": {"decision": "stored", "costs": [2]}}, models=path / "models")


def test_what_cannot_be_learnt_is_said(made, go):
    path, form, *_ = made
    if form == "messidor":
        words = r"training photographs with bags have labels \[0\], both classes are needed; set pathological_from"
        with pytest.raises(ValueError, match=words):
            go(path, {"none": {"stage": "bovw", "pathological_from": 4}})
    else:  # classes by name are no grades
        assert set(graded(Context(path, path / "store.zarr"), 4)["label"]) == {0, 1}
    with pytest.raises(ValueError, match=r"decision=fit"):
        go(path, {"absent": {"stage": "bovw", "decision": "stored"}})


def test_classes_without_a_normal_one_are_refused(go, tmp_path):
    for name in ("drusen", "exudates"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(2):
            Image.fromarray(draw(48, 64, 0, index)).save(tmp_path / "images" / name / f"{name}{index}.tif")
    go(tmp_path, {"ingest": {"folder": "images", "adapter": "dr1"}})
    context = Context(tmp_path, tmp_path / "store.zarr")
    with pytest.raises(ValueError, match="classes are drusen, exudates: none is called normal"):
        graded(context, 1)
    assert set(graded(context, 1, ["Drusen"])["label"]) == {0, 1}


def predictions(path: Path, name: str, labels: list[int | None], shift: float = 0.0, first: int = 0) -> pd.DataFrame:
    probability = np.random.default_rng(len(name)).uniform(0, 1 - shift, len(labels)) + shift
    table = pd.DataFrame({"id": [f"p{first + i}" for i in range(len(labels))], "label": labels, "grade": labels})
    table = table.astype({"label": "Int64", "grade": "Int64"})
    table = table.assign(probability=probability, decision=(probability > 0.5).astype(int), split="test")
    table.attrs["model"] = name if name != "predict" else "naive"
    table.to_parquet(
        path / ("predictions.parquet" if name == "predict" else f"{name}_predictions.parquet"), index=False
    )
    return table


def test_predictions_of_several_stages_stand_side_by_side(tmp_path):
    labels = [0, 1] * 20
    predictions(tmp_path, "predict", [*labels, None])
    predictions(tmp_path, "bovw", labels)
    late = predictions(tmp_path, "late", labels, first=10)
    evaluate(EvaluateConfig(predictions=["predict", "bovw", "late"]), Context(tmp_path, name="evaluate"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [metrics[name]["photographs"] for name in ("naive", "bovw", "late")] == [
        41,
        40,
        40,
    ]  # p40's label is known to late
    assert metrics["late"]["auc"] == pytest.approx(roc_auc_score(late["label"].astype(int), late["probability"]))
    assert "auc_minus_naive" in metrics["bovw"]
    assert metrics["predictions"] == ["predict", "bovw", "late"]


def test_predictions_of_other_questions_are_refused(tmp_path):
    predictions(tmp_path, "bovw", [0, 1, 1, 0])
    predictions(tmp_path, "other", [0, 1, 0, 0])
    with pytest.raises(ValueError, match="label of p2 is 1 by bovw and 0 by other"):
        evaluate(EvaluateConfig(predictions=["bovw", "other"]), Context(tmp_path, name="evaluate"))
