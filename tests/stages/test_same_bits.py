"""The same bits, whoever computes: numbers of workers, schedulers, and the engine alone."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from distributed import Client, LocalCluster

import tilestream as ts
from tilestream.cluster import Job, run
from tilestream.engine import Saliency, SaliencyPass, plan, trace
from tilestream.methods import Normalised, extremes
from tilestream.nets import load_model
from tilestream.stages import saliency_tasks as tasks

IDS = ("1_left", "3_left", "5_right")


@pytest.fixture(scope="module")
def model(made):
    return load_model(made.models / "first.safetensors")


@pytest.fixture
def make(made, model, tmp_path):
    """make(id, tile_px, name): a photograph's task, its plan recorded and its map to be written at a new place."""

    def one(id: str, tile_px: int, name: str, reduce: str = "mean") -> tasks.Task:
        layout = plan(trace(model.net), made.store.levels(id)[0][1:], tile=tile_px)
        path = tmp_path / f"plan-{tile_px}.json"
        path.write_text(layout.to_json())
        target = tmp_path / name / str(tile_px) / id
        zarr.create_array(target, shape=layout.image, chunks=(tile_px, tile_px), dtype="f4")
        file = made.models / "first.safetensors"
        return tasks.Task(
            store=str(made.store.path),
            id=id,
            model=str(file),
            model_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
            plan=str(path),
            reduce=reduce,
            extremes=extremes(made.store.image(id), model.preprocessing["average"].numpy()),
            write=str(target),
        )

    return one


def results(works: list[tasks.Task], **where):
    """{id: (result, map)} of tasks, run together."""
    found = {}

    def keep(job: Job, value: tasks.Result) -> None:
        path = next(work.write for work in works if work.id == job.name)
        found[job.name] = value, np.asarray(zarr.open_array(path, mode="r")[:])

    run((Job(work.id, tasks.reduction(work)) for work in works), window=3, on_result=keep, **where)
    assert sorted(found) == sorted(work.id for work in works)
    return found


def assert_same(a, b):
    for id in a:
        assert a[id][0].peak == b[id][0].peak
        assert a[id][0].probability == b[id][0].probability
        np.testing.assert_array_equal(a[id][0].overview, b[id][0].overview)
        np.testing.assert_array_equal(a[id][1], b[id][1])


@pytest.mark.parametrize("tile_px", [128, 192, 256, 448])
def test_schedulers_agree(make, address, tile_px):
    ids = IDS if tile_px >= 192 else IDS[:1]
    alone = results([make(id, tile_px, "synchronous") for id in ids], scheduler="synchronous")
    assert_same(alone, results([make(id, tile_px, "threads") for id in ids], scheduler="threads"))
    with Client(address, set_as_default=False) as client:
        assert_same(alone, results([make(id, tile_px, "cluster") for id in ids], client=client))


def test_one_worker_and_two_agree(make, made, address):
    alone = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0")
    with alone as cluster, Client(cluster, set_as_default=False) as client:
        one = results([make(id, 256, "one") for id in IDS], client=client)
    with Client(address, set_as_default=False) as client:
        two = results([make(id, 256, "two") for id in IDS], client=client)
    assert_same(one, two)
    for id in IDS:  # and so does the run itself
        np.testing.assert_array_equal(one[id][1], zarr.open_array(made.run / "saliency.zarr" / id, mode="r")[:])


def engine_alone(net, source, reduce="mean") -> np.ndarray:
    layout = plan(trace(net), source.shape[1:], tile=256)
    values = np.empty(layout.image, np.float32)

    def write(cell, block) -> None:
        values[cell.y0 : cell.y1, cell.x0 : cell.x1] = block

    SaliencyPass(trace(net), layout, reduce=reduce).run(source, write)
    return values


def test_maps_equal_the_engine_alone(made, model):
    average = model.preprocessing["average"].numpy()
    for id in IDS:
        image = made.store.image(id)
        source = Normalised(image, average, extremes(image, average))
        alone = engine_alone(model.net, source)
        written = zarr.open_array(made.run / "saliency.zarr" / id, mode="r")
        assert written.shape == (301, 397)
        assert written.chunks == (256, 256)
        np.testing.assert_array_equal(written[:], alone)
        streamed = ts.stream(model.net, tile=256).saliency(source).numpy()  # by gather: equal but for rounding
        assert np.linalg.norm(streamed - alone) < 1e-3 * np.linalg.norm(alone)


@pytest.mark.parametrize("reduce", ["absmean", "absmax"])
def test_reductions_of_channels_equal_the_engine_alone(make, made, model, reduce):
    work = make("3_left", 256, reduce, reduce)
    [(result, written)] = results([work], scheduler="synchronous").values()
    average = model.preprocessing["average"].numpy()
    source = Normalised(made.store.image("3_left"), average, work.extremes)
    alone = engine_alone(model.net, source, reduce)
    np.testing.assert_array_equal(written, alone)
    assert result.peak == Saliency(alone, torch.zeros(1, 2)).argmax(border=0.1)


def test_overview_keeps_the_highest_point(make):
    [(result, written)] = results([make("1_left", 192, "overview")], scheduler="synchronous").values()
    padded = np.pad(written, ((0, -301 % 8), (0, -397 % 8)), constant_values=-np.inf)
    blocks = padded.reshape(padded.shape[0] // 8, 8, padded.shape[1] // 8, 8).max(axis=(1, 3))
    np.testing.assert_array_equal(result.overview, blocks)


def test_a_model_that_changed_is_refused(make, made, tmp_path: Path):
    work = make("1_left", 448, "changed")
    copy = tmp_path / "first.safetensors"
    copy.write_bytes((made.models / "crops.safetensors").read_bytes())
    with pytest.raises(ValueError, match="changed while the run"):
        tasks.network(str(copy), work.model_sha256, None)
