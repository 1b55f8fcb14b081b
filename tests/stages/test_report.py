"""The report shows what belongs together: each section when its files are there, nothing of other predictions."""

import io
import json
import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import zarr
from rich.console import Console
from sklearn.metrics import precision_recall_curve, roc_curve

from tilestream.geometry import Region
from tilestream.methods import Border, bootstrap
from tilestream.report import Card, Section
from tilestream.stages import Context, execute
from tilestream.stages import localise as loc
from tilestream.stages.base import digest, write_json
from tilestream.stages.crops import CropsConfig, plan_crops
from tilestream.stages.evaluate import EvaluateConfig
from tilestream.stages.evaluate import run as evaluate
from tilestream.stages.report import STAGE, ReportConfig, journal
from tilestream.stages.report import run as write_report
from tilestream.stages.report_gallery import Run, gallery, spread
from tilestream.stages.report_results import GRID, band, precision_at, results, sensitivity_at
from tilestream.stages.saliency_config import field_of_view
from tilestream.stages.tables import TablesConfig
from tilestream.stages.tables import run as tables
from tilestream.store import create_store, find_photographs, ingest_photograph, write_labels
from tilestream.training import groups

IDS = list("abcdefgh")
GRADES = [0, 0, 1, 2, 2, 3, 4, 4]
EXTENT, CROP, WINDOW, STRIDE = (160, 240), 48, 64, 32
LESION = (70, 80, 100, 110)
"""y0, y1, x0, x1 in photographs of grade 1 on; a's and b's label images are empty, h has none."""
CLASSES = ("healthy", "unhealthy")
HEADINGS = [
    "Results", "Calibration", "Decisions by grade", "Beside the paper", "Localisation",
    "Faithfulness of the maps", "Wrong decisions", "Right decisions", "Training", "This run",
]  # fmt: skip
VERSIONS = {"torch": "2.0", "numpy": "2.0", "threads": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of all stages, made by hand around eight photographs; its store is `s.zarr` in it."""
    root = tmp_path_factory.mktemp("report")
    context = Context(root, root / "s.zarr", name="x", console=Console(file=io.StringIO()))
    _photographs(root)
    samples = context.store.samples()
    probability = np.array([0.1, 0.3, 0.7, 0.4, 0.6, 0.8, 0.9, 0.95])
    predictions = pd.DataFrame({"id": IDS, "label": [int(g > 1) for g in GRADES], "probability": probability})
    predictions["decision"] = (probability > 0.5).astype(int)  # wrong for c and d
    predictions = predictions.assign(grade=GRADES, split="test", naive_probability=0.5 * probability + 0.2)
    predictions["naive_decision"] = [0, 1, 0, 0, 1, 1, 1, 1]
    predictions["sliding_window_probability"], predictions["sliding_window_decision"] = 1 - probability, 0
    predictions["five_grade"] = [0, 1, 1, 2, 3, 3, 4, 0]
    predictions.to_parquet(root / "predictions.parquet", index=False)
    points = {id: [(75, 105, 2.0), (40, 150, 1.0), (110, 60, 0.5)] for id in IDS}
    rows = [(id, rank, *point) for id in IDS for rank, point in enumerate(points[id])]
    candidates = pd.DataFrame(rows, columns=["id", "rank", "y_px", "x_px", "value"])
    candidates.to_parquet(root / "candidates.parquet", index=False)
    centres = candidates[candidates["rank"] == 0].drop(columns="rank").assign(probability=0.5)
    centres.to_parquet(root / "centres.parquet", index=False)
    for folder in ("overviews", "windows_maps", "training", "journal"):
        (root / folder).mkdir()
    rng = np.random.default_rng(0)
    crops = zarr.create_group(root / "crops.zarr").create_array("image", shape=(8, 3, CROP, CROP), dtype="u1")
    crops[:] = rng.integers(60, 90, crops.shape)
    windows = []
    for position, id in enumerate(IDS):
        np.save(root / "overviews" / f"{id}.npy", rng.normal(size=(40, 60)).astype(np.float32))
        values = np.full((4, 6), 0.1, np.float32)
        values[(position % 4, position % 6)] = 0.9
        np.save(root / "windows_maps" / f"{id}.npy", values)
        y_px, x_px = (position % n * STRIDE + WINDOW // 2 for n in (4, 6))
        windows.append({"id": id, "probability": 0.9, "y_px": y_px, "x_px": x_px, "windows": 24, "stride_px": STRIDE})
    pd.DataFrame(windows).to_parquet(root / "windows.parquet", index=False)
    table = {"position": range(8), "id": IDS, "y0_px": 75 - CROP // 2, "x0_px": 105 - CROP // 2}
    pd.DataFrame(table).to_parquet(root / "crops.parquet", index=False)
    write_json(root / "training" / "train.json", {"records": [{"train_loss": 0.5, "validation_auc": 0.7}] * 3})
    localising = loc.LocaliseConfig(
        lesions="photographs", border_rule="circle", crops_px=CROP, candidate_distance_px=20, draws=20
    )
    truths = loc.ground_truth(localising, context, IDS)
    found = [loc.measure(str(root / "s.zarr"), id, truths[id], points[id], localising) for id in IDS[:-1]]
    known = samples[samples["id"].isin(IDS[:-1])]
    counts = {"photographs": 7, "without_ground_truth": 1, "without_centre": 0}
    summed = loc.summary(localising, found, groups(known))
    write_json(root / "localisation.json", {**localising.model_dump(mode="json"), **counts, **summed})
    loc._table(known.assign(split="test"), found).to_parquet(root / "localisation.parquet", index=False)
    evaluate(EvaluateConfig(), context)
    curves = {"deletion": 0.3, "insertion": 0.6, "deletion_curve": [0.9, 0.1], "insertion_curve": [0.1, 0.9]}
    blocks = [{"down_to": "fc", "spearman": 0.7}, {"down_to": "stem", "spearman": None}]
    faithful = {"photographs": 3, "unhealthy": 2, "shares": [0, 1], "methods": ["guided"], "noise": curves}
    write_json(root / "faithfulness.json", {**faithful, "guided": {**curves, "correlations": blocks}})
    saliency = {"border": 0.1, "border_rule": "circle"}
    settings = {
        "saliency_square": saliency, "saliency": saliency, "crops": {"centres": "saliency"},
        "windows": {"window_px": WINDOW}, "predict": {"crops": "crops", "windows": "windows"},
        "localise": localising.model_dump(mode="json"), "faithfulness": {"limit": 3},
    }  # fmt: skip
    for age, (name, config) in enumerate(settings.items()):
        path = root / "journal" / f"{name}.json"
        write_json(path, {"stage": name.partition("_")[0], "config": config, "versions": VERSIONS})
        os.utime(path, (age, age))
    one = {"wall_s": 1.5, "peak_bytes": 2**30, "peak_driver_bytes": 2**30, "peak_worker_bytes": 2**29}
    write_json(root / "timings.json", {"crops": one, "saliency": one})
    tables(TablesConfig(), context)
    return root


def _photographs(root: Path) -> None:
    """Photographs of a disc, with label images of their lesions, and the store."""
    folder = root / "photographs"
    (folder / "lesions").mkdir(parents=True)
    pd.DataFrame({"value": [0, 1], "kind": ["none", "microaneurysm"]}).to_csv(folder / "legend.csv", index=False)
    rng, (y, x) = np.random.default_rng(1), np.indices(EXTENT)
    disc = np.hypot(y - 79.5, x - 119.5) < 75
    for id, grade in zip(IDS, GRADES, strict=True):
        pixels = disc[..., None] * rng.integers(110, 140, (*EXTENT, 3))
        cv2.imwrite(str(folder / f"{id}.png"), pixels.astype(np.uint8))
        labels = np.zeros(EXTENT, np.uint8)
        if grade:
            labels[LESION[0] : LESION[1], LESION[2] : LESION[3]] = 1
        if id != "h":
            cv2.imwrite(str(folder / "lesions" / f"{id}.png"), labels)
    store = create_store(root / "s.zarr")
    for source in find_photographs(folder):
        if "lesions" not in str(source.path):
            assert ingest_photograph(store, source)["status"] == "committed"
    write_labels(store, pd.DataFrame({"id": IDS, "label": GRADES, "patient": IDS}))


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Context:
    """A copy of the run that a test may change, file times included."""
    shutil.copytree(finished, tmp_path / "run")
    return Context(tmp_path / "run", tmp_path / "run" / "s.zarr", name="report", console=Console(file=io.StringIO()))


def page(context: Context, **settings) -> str:
    write_report(ReportConfig(**{"width_px": 120, "gallery": 8, **settings}), context)
    return (context.run / "report.html").read_text()


def headings(html: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", html)


def shown(context: Context, count: int = 8, width_px: int = 120) -> list[tuple[Section, list[Card]]]:
    """The gallery's sections and their cards."""
    return [(part, part.items[0].cards) for part in gallery(Run(context, journal(context), width_px, CLASSES), count)]


def alts(html: str) -> list[str]:
    return re.findall(r'<img src="data:[^"]*" alt="([^"]*)"', html)


def test_a_whole_run_has_every_section(place):
    html = page(place)
    assert headings(html) == HEADINGS
    for alt in ("ROC curves; areas: naive ", "Precision-recall curves; areas: naive "):
        assert sum(text.startswith(alt) for text in alts(html)) == 1
    for model in ("naive", "sliding window", "saliency"):
        for chart in ("reliability diagram", "histogram of probabilities", "decisions by grade"):
            assert f"{chart}, {model}" in alts(html)
    assert {"five-grade confusion matrix", "FROC curve, beside chance", "training curves"} <= set(alts(html))
    for text in ("AUC minus naive", "quadratic weighted kappa", "Table 4: decisions", "centre on a lesion", "35,126"):
        assert text in html
    assert "Stages that ran with another torch: saliency_square 2.0, saliency 2.0, crops 2.0" in html
    assert re.findall("<summary>(.*?)</summary>", html) == [
        "saliency_square (saliency)", "saliency", "crops", "windows", "predict", "localise",
        "faithfulness",
    ]  # fmt: skip
    assert {"deletion and insertion curves", "correlation with maps of fresh weights, by layer"} <= set(alts(html))
    assert "Means over 3 squashed photographs, 2 of them unhealthy." in html


@pytest.mark.parametrize(
    ("file", "sections"),
    [
        ("metrics.json", {"Results", "Calibration", "Decisions by grade"}),
        ("tables.json", {"Beside the paper"}),
        ("localisation.json", {"Localisation"}),
        ("faithfulness.json", {"Faithfulness of the maps"}),
        ("training/train.json", {"Training"}),
    ],
)
def test_a_section_goes_with_its_file(place, file, sections):
    (place.run / file).unlink()
    assert headings(page(place)) == [heading for heading in HEADINGS if heading not in sections]


def test_a_card_shows_what_is_there(place):
    first = shown(place)[0][1][0]
    assert [picture.alt for picture in first.pictures] == [
        "photograph, lesions outlined: c", "saliency of c", "crop frame on c", "crop of c",
        "windows, probability 0.10 to 0.90: c",
    ]  # fmt: skip
    assert first.facts == {
        "grade": "1, by the five-grade model 1", "naive": "healthy (0.550), right",
        "sliding window": "healthy (0.300), right", "saliency": "unhealthy (0.700), wrong",
        "centre": "y 75, x 105 px, saliency 2", "lesions": "1: microaneurysm",
        "found": "centre on a lesion, crop holds 1",
    }  # fmt: skip
    unknown, healthy = (next(c for _, part in shown(place) for c in part if c.title == id) for id in "ha")
    assert unknown.pictures[0].caption == "photograph"
    assert "lesions" not in unknown.facts
    assert healthy.pictures[0].caption == "photograph, without lesions"
    assert healthy.facts["lesions"] == "none"
    for file, gone in (
        ("windows.parquet", {"windows, probability 0.10 to 0.90: c"}),
        ("crops.parquet", {"crop of c"}),
        ("centres.parquet", {"saliency of c", "crop frame on c"}),
    ):
        before = [picture.alt for picture in shown(place)[0][1][0].pictures]
        (place.run / file).unlink()
        assert [picture.alt for picture in shown(place)[0][1][0].pictures] == [a for a in before if a not in gone]


def test_candidates_and_lesions_are_drawn(place):
    def strip() -> list[bytes]:
        return [picture.data for picture in shown(place)[0][1][0].pictures]

    whole = strip()
    (place.run / "candidates.parquet").unlink()
    without_candidates = strip()
    (place.run / "photographs" / "lesions" / "c.png").unlink()
    without_lesions = strip()
    shutil.rmtree(place.run / "photographs")  # the photographs themselves are in the store
    assert strip() == without_lesions
    same = [[a == b for a, b in zip(one, two, strict=True)]
            for one, two in ((whole, without_candidates), (without_candidates, without_lesions))]  # fmt: skip
    assert same == [[True, True, False, True, True], [False, True, True, False, True]]


def test_wrong_cases_come_first_then_right_ones_by_grade(place):
    (wrong, bad), (right, good) = shown(place)
    assert (wrong.heading, right.heading) == ("Wrong decisions", "Right decisions")
    assert [[card.title for card in part] for part in (bad, good)] == [list("cd"), list("abefgh")]
    assert [{card.tone for card in part} for part in (bad, good)] == [{"bad"}, {"good"}]
    assert wrong.intro.startswith("2 of 2 by the saliency model, by grade. ")
    assert [[card.title for card in part] for _, part in shown(place, 3)] == [["c", "d"], ["a"]]
    assert shown(place, 0) == []


def test_photographs_without_labels_are_one_gallery(place):
    table = pd.read_parquet(place.run / "predictions.parquet")
    table.assign(label=pd.array([pd.NA] * 8, "Int64"), grade=np.nan).to_parquet(place.run / "predictions.parquet")
    ((section, cards),) = shown(place)
    assert section.heading == "Photographs"
    assert [card.tone for card in cards] == ["neutral"] * 8
    assert cards[0].facts["saliency"] == "healthy (0.100)"
    (place.run / "predictions.parquet").unlink()
    ((_, cards),) = shown(place, 5)  # centres alone
    assert [card.title for card in cards] == list("abcde")


def test_measures_of_other_predictions_are_left_out(place):
    assert json.loads((place.run / "metrics.json").read_text())["predictions_sha256"] == digest(
        place.run / "predictions.parquet"
    )
    assert [section.heading for section in results(place, CLASSES)] == HEADINGS[:3]
    assert next(results(place, ("normal", "ill"))).intro.startswith("Grades, normal: 0, 1; ill: 2, 3, 4.")
    table = pd.read_parquet(place.run / "predictions.parquet")
    table.assign(probability=table["probability"] * 0.9).to_parquet(place.run / "predictions.parquet")
    assert list(results(place, CLASSES)) == []


def test_one_class_alone_has_measures_but_no_curve(place):
    table = pd.read_parquet(place.run / "predictions.parquet")
    table[table["label"] == 1].to_parquet(place.run / "predictions.parquet")
    evaluate(EvaluateConfig(), place)
    html = page(place)
    assert headings(html)[:3] == HEADINGS[:3]
    assert not [alt for alt in alts(html) if alt.startswith("ROC")]


def test_the_same_run_gives_the_same_page_and_is_skipped(place):
    config = ReportConfig(width_px=120, gallery=2)
    assert execute("report", STAGE, config, place)
    assert not execute("report", STAGE, config, place)
    made = (place.run / "report.html").read_text()
    assert page(place, gallery=2) == made
    for file in (
        "tables.json",
        "localisation.json",
        "faithfulness.json",
        "windows.parquet",
        "candidates.parquet",
        "metrics.json",
    ):
        shutil.copy(place.run / file, place.run / "kept")
        with (place.run / file).open("a") as opened:
            opened.write(" ")
        assert {str(p): digest(p) for p in STAGE.reads(config, place)}[str(place.run / file)] != digest(
            place.run / "kept"
        )


def test_the_border_drawn_is_the_saliency_stages(place):
    extent, shape = EXTENT, (80, 120)
    field = field_of_view(place.store, "a")
    assert field is not None
    for rule, circle in (("circle", field), ("frame", None)):
        record = {"stage": "saliency", "config": {"border": 0.23, "border_rule": rule}}
        drawn = Run(place, {**journal(place), "saliency": record}, 120, CLASSES).border("a", shape, extent)
        np.testing.assert_array_equal(drawn, Border(shape, 0.23, circle, extent).mask(Region.whole(shape)))
    old = {"stage": "saliency", "config": {"border": 0.23}}  # a run from before there was a rule to choose
    np.testing.assert_array_equal(Run(place, {"saliency": old}, 120, CLASSES).border("a", shape, extent), drawn)


def test_windows_lie_where_they_were(place):
    """c's lies over the middle of its window."""
    run = Run(place, journal(place), 240, CLASSES)
    assert run.window == (WINDOW, STRIDE)
    data = np.frombuffer(shown(place, width_px=240)[0][1][0].pictures[-1].data, np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR).astype(int)
    middle = 2 * STRIDE + WINDOW // 2
    bright = picture[..., 2] + picture[..., 1] > 380
    ys, xs = np.nonzero(bright)
    assert (round(ys.mean()), round(xs.mean())) == pytest.approx((middle, middle), abs=2)
    assert bright.sum() == pytest.approx(STRIDE**2, rel=0.2)


def test_grades_share_the_gallery():
    table = pd.DataFrame({"id": list("kjihgfedcb"), "grade": [0] * 7 + [3, 4, 4]})
    assert spread(table, 5)["grade"].tolist() == [0, 0, 3, 4, 4]
    assert spread(table, 5)["id"].tolist() == ["j", "k", "d", "b", "c"]
    assert len(spread(table, 50)) == 10
    assert spread(table[["id"]], 3)["id"].tolist() == ["k", "j", "i"]


@pytest.mark.parametrize("read", [sensitivity_at, precision_at])
def test_bands_are_those_of_scikit_learns_curves(read):
    rng = np.random.default_rng(0)
    labels, patients = rng.integers(0, 2, 30), rng.integers(0, 12, 30)
    scores = np.round(rng.normal(size=30) + labels, 1)  # ties
    curves = []
    for weights in np.concatenate(list(bootstrap.resampled(patients, 0))).astype(int):
        drawn, ranked = np.repeat(labels, weights), np.repeat(scores, weights)
        if len(set(drawn)) < 2:
            continue
        if read is sensitivity_at:
            false, found, _ = roc_curve(drawn, ranked, drop_intermediate=False)
            curves.append([found[false <= x][-1] if x in false else np.interp(x, false, found) for x in GRID])
        else:
            right, recalls, _ = precision_recall_curve(drawn, ranked)
            right, recalls = right[-2::-1], recalls[-2::-1]  # without the corner that no score has, rising
            curves.append(right[[np.flatnonzero(recalls >= x - 1e-9)[0] for x in GRID]])
    grid, low, high = band(labels, scores, patients, read)
    np.testing.assert_array_equal(grid, GRID)
    np.testing.assert_allclose([low, high], np.quantile(curves, [0.025, 0.975], axis=0), atol=1e-9)
    assert (high - low).max() > 0.2
    assert band(labels, scores, np.zeros(30), read) is None  # one patient says nothing about others


@pytest.mark.parametrize("grades", [[1, 2], [], [0]])
def test_unhealthy_examples_are_of_unhealthy_grades(tmp_path, grades):
    with pytest.raises(ValueError, match=r"unhealthy_grades=.* must be grades from 2 on"):
        plan_crops(CropsConfig(unhealthy_grades=grades), Context(tmp_path))
