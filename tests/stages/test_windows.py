"""The sliding window over stored photographs, and what is predicted from it, from grades and from several crops."""

import io
import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from PIL import Image
from rich.console import Console
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC

from tilestream.geometry import Region, interior
from tilestream.methods import Normalised, extremes
from tilestream.nets import ResidualNet, fully_convolutional, load_model, save_model
from tilestream.stages import ClusterConfig, Context, execute, parse
from tilestream.stages.evaluate import STAGE as EVALUATE
from tilestream.stages.evaluate import EvaluateConfig
from tilestream.stages.predict import STAGE as PREDICT
from tilestream.stages.predict import PredictConfig
from tilestream.stages.report import STAGE as REPORT
from tilestream.stages.report import ReportConfig
from tilestream.stages.runner import Journal
from tilestream.stages.windows import COLUMNS, STAGE, WindowsConfig
from tilestream.store import Store, create_store, find_photographs, ingest_photograph, write_labels

SIZES = {"a": (97, 130), "b": (140, 70), "c": (40, 90), "d": (64, 64)}
"""c is lower than a window of 64 px."""
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """18 photographs of noise, those of grade 2 and more with a bright square; a third in each split."""
    folder = tmp_path_factory.mktemp("photographs")
    rng, rows = np.random.default_rng(0), []
    for index in range(18):
        name, grade = f"p{index:02d}", (0, 4, 0, 2, 1, 3)[index % 6]
        pixels = rng.integers(0, 90, (*list(SIZES.values())[index % 4], 3), dtype=np.uint8)
        if grade > 1:
            pixels[10:38, 20:52] += np.uint8(120)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        rows.append({"id": name, "label": grade, "patient": name})
    path = create_store(folder / "store.zarr")
    for source in find_photographs(folder):
        assert ingest_photograph(path, source)["status"] == "committed"
    write_labels(path, pd.DataFrame(rows))
    return Store(path)


def put_model(folder: Path, name: str, num_classes: int = 2) -> None:
    torch.manual_seed(len(name))
    parameters = {"widths": [4, 4, 6, 8, 8], "num_classes": num_classes}
    net = ResidualNet(**parameters).eval()
    preprocessing = {"average": torch.full((3, 64, 64), 40.0)}
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_model(path, net, architecture="ResidualNet", parameters=parameters, preprocessing=preprocessing)


class Run:
    """A run's folder, with models and splits, and what was said there."""

    def __init__(self, path: Path, store: Store, address: str) -> None:
        self.path, self.store, self.address = path, store, address
        for name, classes in (("crops", 2), ("first", 2), ("five", 5)):
            put_model(path / "models", name, classes)
        splits = [SPLITS[int(id[1:]) // 6] for id in store.ids]
        pd.DataFrame({"id": store.ids, "split": splits}).to_parquet(path / "splits.parquet")

    def go(self, stage, config_class, name, values, memory="1GiB", **options):
        heard = io.StringIO()
        cluster = ClusterConfig(scheduler=self.address, workers=2, memory=memory)
        console = Console(file=heard, soft_wrap=True, width=1000)
        with Context(self.path, self.store.path, cluster, console=console, **options) as context, ExitStack() as held:
            execute(name, stage, parse(config_class, values), context, held)
        return heard.getvalue()

    def windows(self, name="windows", **values):
        options = {key: values.pop(key) for key in ("resume", "memory") if key in values}
        return self.go(STAGE, WindowsConfig, name, {"window_px": 64, **values}, **options)

    def predict(self, models=None, **values):
        said = self.go(PREDICT, PredictConfig, "predict", {"crops": None, **values}, models=models)
        return pd.read_parquet(self.path / "predictions.parquet"), said


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, store, address):
    return lambda: Run(tmp_path_factory.mktemp("run"), store, address)


@pytest.fixture(scope="module")
def made(make_run) -> Run:
    """A run whose windows are done; tests add other stages at most."""
    run = make_run()
    run.said = run.windows(splits=["validation", "test"])
    return run


def test_histograms_and_maps_are_those_of_the_network(made, store):
    table = pd.read_parquet(made.path / "windows.parquet").set_index("id")
    assert list(table.columns) == [*COLUMNS, "probability", "y_px", "x_px", "windows", "stride_px"]
    assert len(table) == 12
    model = load_model(made.path / "models" / "crops.safetensors")
    average = np.asarray(model.preprocessing["average"])
    net = fully_convolutional(model.net, 64)
    for id, row in table.iloc[:6].iterrows():
        image = store.image(id)
        whole = Normalised(image, average, extremes(image, average))[:, : image.shape[1], : image.shape[2]]
        missing = [(0, max(0, 64 - n)) for n in whole.shape[1:]]
        with torch.no_grad():
            logits = net(torch.from_numpy(np.pad(whole, [(0, 0), *missing]))[None])
        expected = logits.double().softmax(1)[0, 1].numpy()
        found = np.load(made.path / "windows_maps" / f"{id}.npy")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert row["windows"] == found.size
        np.testing.assert_array_equal(row[COLUMNS].astype(float), np.histogram(found, 20, (0, 1))[0] / found.size)
        inside = interior(image.shape[1:], 0.1)  # noise has no field of view
        at = [(-p, 64 * i + 32, 64 * j + 32) for (i, j), p in np.ndenumerate(found)]
        value, y, x = min([a for a in at if inside.contains(Region(a[1], a[1] + 1, a[2], a[2] + 1))] or at)
        assert (row["probability"], row["y_px"], row["x_px"], row["stride_px"]) == (-value, y, x, 64)
    assert json.loads((made.path / "quarantine" / "windows.json").read_text()) == []


def test_a_killed_run_goes_on_where_it_was(make_run, made):
    run = make_run()
    expected = pd.read_parquet(made.path / "windows.parquet").head(5)
    append, count = Journal.append, 0

    def twice(self, record):
        nonlocal count
        if self.path.name == "windows.jsonl":
            if count == 2:
                raise KeyboardInterrupt
            count += 1
        append(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", twice)
        with pytest.raises(KeyboardInterrupt):
            run.windows(splits=["validation", "test"], limit=5)
    assert not (run.path / "windows.parquet").exists()
    said = run.windows(splits=["validation", "test"], limit=5, resume=True, memory="900MiB")
    assert "2 of 5 photographs are done already" in said
    pd.testing.assert_frame_equal(pd.read_parquet(run.path / "windows.parquet"), expected)
    assert "unchanged, skipped" in run.windows(splits=["validation", "test"], limit=5)


def test_what_cannot_be_done_is_said_before_any_work(made, make_run):
    for values, words in [
        ({"memory": "1KiB"}, "memory"),
        ({"window_px": 50}, "window_px=50 gives a map of 1 x 1"),
        ({"splits": ["nowhere"]}, "no photograph is in them"),
        ({"model": "none"}, "does not exist"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            made.windows("other", **values)
    assert not (made.path / "other.parquet").exists()


def test_a_model_of_other_splits_is_refused(make_run):
    run = make_run()
    parameters = {"widths": [4, 4, 6, 8, 8]}
    path = run.path / "models" / "crops.safetensors"
    save_model(path, ResidualNet(**parameters), architecture="ResidualNet", parameters=parameters,
               preprocessing={"splits_sha256": "another"})  # fmt: skip
    with pytest.raises(ValueError, match="trained on other splits"):
        run.windows()


def test_the_machine_is_fitted_on_validation_photographs(made):
    table, _ = made.predict(windows="windows", five_grade="five")
    assert list(table.columns[:6]) == ["id", "label", "probability", "decision", "grade", "split"]
    assert table.attrs["model"] == "naive"
    assert table["probability"].notna().all()
    without = table["split"] == "train"  # the windows stage had none of them
    np.testing.assert_array_equal(table["sliding_window_probability"].isna(), without)
    np.testing.assert_array_equal(table["sliding_window_decision"].isna(), without)
    table = table[~without]
    shares = pd.read_parquet(made.path / "windows.parquet").set_index("id").loc[table["id"], COLUMNS].to_numpy()
    learnt = (table["split"] == "validation").to_numpy()
    machine = SVC(class_weight="balanced").fit(shares[learnt], table["label"][learnt].astype(int))
    np.testing.assert_array_equal(table["sliding_window_decision"].astype(int), machine.predict(shares))
    ranks = np.argsort(table["sliding_window_probability"].to_numpy(), kind="stable")
    assert (np.diff(machine.decision_function(shares)[ranks]) >= -1e-9).all()
    decided = json.loads((made.path / "models" / "decision.json").read_text())
    assert decided["sliding_window"] == {"value": 0.5, "origin": "svm"}
    five = table[[f"five_{grade}" for grade in range(5)]].to_numpy()
    np.testing.assert_allclose(five.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(table["five_grade"], five.argmax(1))


def test_a_stored_machine_decides_alike_elsewhere(made, make_run):
    fitted, _ = made.predict(windows="windows")
    run = make_run()
    shutil.copy(made.path / "windows.parquet", run.path)
    stored, _ = run.predict(models=made.path / "models", windows="windows", decision="stored")
    pd.testing.assert_frame_equal(stored, fitted)
    (run.path / "predictions.parquet").unlink()
    with pytest.raises(ValueError, match=r"sliding_window.json does not exist; fit a machine"):
        run.predict(windows="windows", decision="stored", naive=None)


def test_histograms_that_are_all_alike_are_told(made, make_run):
    run = make_run()
    table = pd.read_parquet(made.path / "windows.parquet")
    table[COLUMNS] = np.eye(20)[3]
    table.to_parquet(run.path / "windows.parquet")
    predicted, said = run.predict(windows="windows", naive=None)
    assert "all validation histograms of windows are alike" in said
    assert predicted["probability"].nunique() == 1
    assert "are alike" not in made.predict(windows="windows", naive=None)[1]


def test_windows_alone_are_the_decision(made):
    table, _ = made.predict(windows="windows", naive=None)
    assert table.attrs["model"] == "sliding_window"
    pd.testing.assert_series_equal(table["probability"], table["sliding_window_probability"], check_names=False)
    pd.testing.assert_series_equal(table["decision"], table["sliding_window_decision"], check_names=False)


def test_nothing_to_predict_with_and_wrong_numbers_of_classes(made, make_run):
    with pytest.raises(ValueError, match="crops, naive and windows are all null"):
        made.predict(naive=None)
    with pytest.raises(ValueError, match="model='five' has 5 classes, 2 are needed"):
        made.predict(naive="five")
    with pytest.raises(ValueError, match="model='first' has 2 classes, 5 are needed"):
        made.predict(five_grade="first")
    run = make_run()
    run.windows(splits=["test"])
    with pytest.raises(ValueError, match="windows has no validation photograph"):
        run.predict(windows="windows", naive=None)


@pytest.fixture(scope="module")
def with_crops(make_run, store) -> Run:
    """A run with three crops of 64 px a photograph, by hand: the table out of order, on the photographs' corners."""
    run, rows = make_run(), []
    samples = store.samples()
    for sample in samples.itertuples():
        split = SPLITS[int(sample.id[1:]) // 6]
        for rank in (2, 0, 1):
            low, high = 0.0, 255.0
            rows.append((len(rows), sample.id, 3 * rank, 5 * rank, sample.height, sample.width, low, high, False,
                         sample.label, int(sample.label > 1), split, rank))  # fmt: skip
    names = ["position", "id", "y0_px", "x0_px", "height", "width", "low", "high", "padded", "label", "unhealthy",
             "split", "rank"]  # fmt: skip
    table = pd.DataFrame(rows, columns=names)
    group = zarr.create_group(run.path / "crops.zarr")
    pixels = []
    for row in table.itertuples():
        image = np.asarray(store.image(row.id)[:, row.y0_px : row.y0_px + 64, row.x0_px : row.x0_px + 64])
        pixels.append(np.pad(image, [(0, 0), (0, 64 - image.shape[1]), (0, 64 - image.shape[2])]))
    group.create_array("image", data=np.stack(pixels), chunks=(1, 3, 64, 64))
    group.attrs["ids"] = table["id"].tolist()
    for name in ("y0_px", "x0_px"):
        group.create_array(name, data=table[name].to_numpy(np.int64))
    table.to_parquet(run.path / "crops.parquet")
    return run


@pytest.fixture(scope="module")
def alone(with_crops, make_run) -> np.ndarray:
    """The probability of each crop by itself, (18, 3), by rank."""
    table = pd.read_parquet(with_crops.path / "crops.parquet")
    found = []
    for rank in range(3):
        run = make_run()
        shutil.copytree(with_crops.path / "crops.zarr", run.path / "crops.zarr")
        table[table["rank"] == rank].drop(columns="rank").to_parquet(run.path / "crops.parquet")
        found.append(run.predict(crops="crops", naive=None)[0]["probability"].to_numpy())
    return np.stack(found, axis=1)


@pytest.mark.parametrize("how", ["first", "mean", "max"])
def test_several_crops_become_one_probability(with_crops, alone, how):
    assert np.ptp(alone, axis=1).min() > 0
    table, _ = with_crops.predict(crops="crops", naive=None, aggregate=how)
    expected = {"first": alone[:, 0], "mean": alone.mean(1), "max": alone.max(1)}[how]
    assert list(table["id"]) == sorted(table["id"])
    np.testing.assert_allclose(table["probability"], expected, atol=1e-6)


def test_flips_are_averaged(with_crops, alone, make_run):
    table, _ = with_crops.predict(crops="crops", naive="first", flips=True)
    run = make_run()
    shutil.copy(with_crops.path / "crops.parquet", run.path)
    shutil.copytree(with_crops.path / "crops.zarr", run.path / "crops.zarr")
    image = zarr.open_array(run.path / "crops.zarr" / "image")
    before, views = image[:], []  # the average image is flat, so that flipped pixels are flipped values
    for axes in ((), (2,), (3,), (2, 3)):
        image[:] = np.flip(before, axes)
        run.path.joinpath("predictions.parquet").unlink(missing_ok=True)
        views.append(run.predict(crops="crops", naive=None)[0]["probability"].to_numpy())
    assert np.ptp(views, axis=0).max() > 1e-4
    padded = np.isin(table["id"], [id for id in table["id"] if int(id[1:]) % 4 == 2])  # zeros beyond c are no pixels
    np.testing.assert_allclose(table["probability"][~padded], np.mean(views, axis=0)[~padded], atol=1e-6)


def test_attention_is_trained_on_training_crops_and_kept(with_crops, make_run):
    table, _ = with_crops.predict(crops="crops", naive=None, aggregate="attention")
    learnt = table[table["split"] == "train"]
    healthy, unhealthy = (learnt["probability"][learnt["label"] == label] for label in (0, 1))
    assert unhealthy.mean() > healthy.mean() + 0.1
    run = make_run()
    for name in ("crops.parquet", "splits.parquet"):
        shutil.copy(with_crops.path / name, run.path)
    shutil.copytree(with_crops.path / "crops.zarr", run.path / "crops.zarr")
    stored, _ = run.predict(
        models=with_crops.path / "models", crops="crops", naive=None, aggregate="attention", decision="stored"
    )
    pd.testing.assert_frame_equal(stored, table)
    crops = pd.read_parquet(run.path / "crops.parquet")
    crops[crops["split"] != "train"].to_parquet(run.path / "crops.parquet")
    with pytest.raises(ValueError, match="aggregate='attention' needs crops of train photographs; crops has none"):
        run.predict(crops="crops", naive=None, aggregate="attention")


def test_predictions_under_another_name_stand_beside(with_crops, alone):
    before, _ = with_crops.predict(crops="crops", naive="first")
    kept = (with_crops.path / "models" / "decision.json").read_text()
    values = {"crops": "crops", "naive": None, "aggregate": "max"}
    with_crops.go(PREDICT, PredictConfig, "predict_many", values)
    table = pd.read_parquet(with_crops.path / "predict_many_predictions.parquet")
    np.testing.assert_allclose(table["probability"], alone.max(1), atol=1e-6)
    pd.testing.assert_frame_equal(pd.read_parquet(with_crops.path / "predictions.parquet"), before)
    assert (with_crops.path / "models" / "decision.json").read_text() == kept
    assert (with_crops.path / "models" / "predict_many_decision.json").exists()
    with_crops.go(EVALUATE, EvaluateConfig, "evaluate", {"predictions": ["predict", "predict_many"]})
    metrics = json.loads((with_crops.path / "metrics.json").read_text())
    tested = table[table["split"] == "test"]
    assert metrics["predict_many"]["auc"] == pytest.approx(
        roc_auc_score(tested["label"].astype(int), tested["probability"])
    )
    assert {"naive", "saliency", "predict_many"} <= metrics.keys()
    heard = with_crops.go(REPORT, ReportConfig, "report", {})
    assert "done" in heard
    page = (with_crops.path / "report.html").read_text()
    assert "AUC, predict many" in page or "AUC, predict_many" in page
