"""What a second reader found: results taken for another store's, measures under a wrong name, grades that are none."""

import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

from tilestream.geometry import Region
from tilestream.methods import extremes, unhealthy
from tilestream.nets import build
from tilestream.stages import ClusterConfig, Context, ingest, predict, preprocess
from tilestream.stages.base import Stage, StageConfig, parse
from tilestream.stages.crops import _create, _describe
from tilestream.stages.evaluate import columns, selected
from tilestream.stages.examples import Crops
from tilestream.stages.runner import execute
from tilestream.stages.saliency_tasks import overview
from tilestream.store import Store, create_store, ingest_photograph
from tilestream.store.sources import Source


def make_store(path, values: dict[str, int]) -> Store:
    """A store of photographs of 40 x 60 px, noise whose smallest value says which photograph it is."""
    folder = path.with_suffix(".files")
    folder.mkdir()
    root = create_store(path)
    for id, low in values.items():
        pixels = np.random.default_rng(low).integers(low, 200, (40, 60, 3)).astype(np.uint8)
        cv2.imwrite(str(folder / f"{id}.png"), pixels)
        ingest_photograph(root, Source(id, str(folder / f"{id}.png"), None, f"{id}.png"))
    return Store(root)


@pytest.fixture
def here(monkeypatch):
    """Jobs of the preprocessing run in this process; the ids of those that ran."""
    ran: list[str] = []

    def run_jobs(context, title, names, make, on_result, parts=None):
        for name in names:
            ran.append(name)
            on_result(name, make(name).reduction.map(make(name).reduction.parts[0])[0])

    monkeypatch.setattr(preprocess, "run_jobs", run_jobs)
    return ran


def test_extremes_of_another_store_with_the_same_ids_are_not_taken(tmp_path, here):
    average = np.zeros((3, 8, 8), np.float32)
    stores = [
        make_store(tmp_path / "a.zarr", {"1_left": 10, "2_left": 20}),
        make_store(tmp_path / "b.zarr", {"1_left": 10, "2_left": 90}),  # the first is the same photograph
    ]
    for store in stores:
        context = Context(tmp_path / "run", store.path, ClusterConfig(), name="preprocess")
        shutil.rmtree(context.partial_path, ignore_errors=True)  # as the runner does between two stores
        found = preprocess.ensure_extremes(context, average, store.ids)
        assert found == {id: extremes(store.image(id), average) for id in store.ids}
    assert found["2_left"].low >= 90
    assert here == ["1_left", "2_left", "2_left"]
    table = pd.read_parquet(tmp_path / "run" / "extremes.parquet")
    assert list(table["source_sha256"]) == list(stores[1].samples()["source_sha256"])


def test_a_stage_that_writes_elsewhere_than_last_time_is_not_skipped(tmp_path):
    done = []

    def run(config, context):
        done.append(context.store_path.name)
        context.store_path.mkdir(exist_ok=True)
        (context.store_path / "file").write_text("made")

    stage = Stage("ingest", StageConfig, run, writes=lambda c, x: [x.store_path / "file"], uses_store=False)
    for name in ("a", "a", "b", "b"):
        execute("ingest", stage, StageConfig(), Context(tmp_path / "run", tmp_path / name))
    assert done == ["a", "b"]


def test_a_resumed_stage_leaves_its_claim_alone(tmp_path):
    def run(config, context):
        raise RuntimeError("killed")

    stage = Stage("crops", StageConfig, run, uses_store=False)
    times = []
    for resume in (False, True):
        context = Context(tmp_path, resume=resume)
        with pytest.raises(RuntimeError, match="killed"):
            execute("crops", stage, StageConfig(), context)
        times.append((context.partial_path / "fingerprint").stat().st_mtime_ns)
    assert times[0] == times[1]


@pytest.mark.parametrize(("crops", "naive", "names"), [
    ("crops", None, {"saliency": ""}),
    (None, "first", {"naive": ""}),
    ("crops", "first", {"naive": "naive_", "saliency": ""}),
])  # fmt: skip
def test_measures_carry_the_name_of_the_model_that_decided(tmp_path, monkeypatch, crops, naive, names):
    ids = ["a", "b", "c", "d"]
    scores = pd.Series([0.1, 0.2, 0.8, 0.9], index=ids)
    samples = pd.DataFrame({"id": ids, "label": pd.array([0, 1, 2, 4], "Int64"), "split": ["validation"] * 4})
    monkeypatch.setattr(predict, "chosen", lambda context, splits: samples)
    both = np.stack([1 - scores, scores], axis=1)
    monkeypatch.setattr(predict, "crop_probabilities", lambda config, context, table: scores)
    monkeypatch.setattr(predict, "square_probabilities", lambda config, context, name, ids, classes: both)
    context = Context(tmp_path, name="predict")
    predict.run(parse(predict.PredictConfig, {"crops": crops, "naive": naive}), context)
    assert columns(selected("validation", context)) == names


@pytest.mark.parametrize("grade", [-1, 5])
def test_a_grade_that_is_none_is_refused(grade):
    with pytest.raises(ValueError, match=f"grade={grade} must be in"):
        unhealthy([0, grade])
    with pytest.raises(ValueError, match=f"grade={grade} must be in"):
        unhealthy(grade)


def test_unknown_parameters_of_a_network_are_bad_input():
    with pytest.raises(ValueError, match="widht"):
        build("ResidualNet", {"widht": [4, 4]})


def test_small_pictures_of_cells_that_part_blocks_make_the_whole_one():
    values = np.random.default_rng(0).normal(size=(43, 61)).astype(np.float32) - 5  # nothing above 0 hides a gap
    small = np.full((6, 8), -np.inf, np.float32)
    for y in range(0, 43, 12):
        for x in range(0, 61, 20):
            cell = Region(y, min(y + 12, 43), x, min(x + 20, 61))
            block = overview(values[y : cell.y1, x : cell.x1], cell)
            part = small[y // 8 : y // 8 + block.shape[0], x // 8 : x // 8 + block.shape[1]]
            assert part.shape == block.shape
            np.maximum(part, block, out=part)
    np.testing.assert_array_equal(small, overview(values))
    assert overview(values)[5, 7] == values[40:, 56:].max()


def test_other_photographs_under_stored_names_do_not_pass_for_them(tmp_path, monkeypatch):
    def run_jobs(context, title, names, make, on_result, parts=None):
        for name in names:
            on_result(name, make(name).reduction.map(make(name).reduction.parts[0])[0])

    monkeypatch.setattr(ingest, "run_jobs", run_jobs)
    store = make_store(tmp_path / "a.zarr", {"1_left": 10})
    make_store(tmp_path / "b.zarr", {"1_left": 90, "2_left": 20})
    context = Context(tmp_path, store.path, name="ingest")
    config = parse(ingest.IngestConfig, {"folder": tmp_path / "b.files"})
    with pytest.raises(ValueError, match=r"1 photographs are not those stored in .*; ingest them into a new store"):
        ingest.run(config, context)
    assert store.ids == ["1_left", "2_left"]  # the rest of the work is kept


def test_crops_of_another_table_are_not_read(tmp_path):
    def table(ids: list[str], y0: int) -> pd.DataFrame:
        places = {"position": range(len(ids)), "id": ids, "y0_px": y0, "x0_px": 3, "height": 64, "width": 64}
        return pd.DataFrame({**places, "low": 0.0, "high": 255.0})

    path, average = tmp_path / "crops.zarr", np.zeros((3, 8, 8), np.float32)
    _create(path, 2, 16)
    _describe(path, old := table(["a", "b"], 5))
    assert Crops(path, old[1:], [0], average)[0].shape == (3, 16, 16)
    for new in (table(["a", "c"], 5), table(["a", "b"], 6), table(["a", "b", "c"], 5)):
        with pytest.raises(ValueError, match=r"crops.zarr is not what crops.parquet describes"):
            Crops(path, new, [0] * len(new), average)
