"""Ways of going back, border rules, centres and candidates in the saliency stage, on three small photographs."""

import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from rich.console import Console
from torch import nn

import tilestream as ts
from tilestream.cluster import Job, run
from tilestream.engine import SaliencyPass, plan, trace
from tilestream.geometry import GRANULARITIES, Region
from tilestream.methods import Border, FieldOfView, Noise, Noisy, Normalised, Search, conclude, extremes, look
from tilestream.nets import ResidualNet, fully_convolutional, load_model, save_model
from tilestream.stages import STAGES, ClusterConfig, Context, execute, saliency
from tilestream.stages import saliency_tasks as tasks
from tilestream.stages import saliency_whole as whole
from tilestream.stages.saliency_config import SaliencyConfig, field_of_view
from tilestream.stages.saliency_plans import takes_whole
from tilestream.store import Store

ID = "3_left"


@dataclass(frozen=True)
class Few:
    """A store of three small photographs, and a folder with two models of random weights."""

    store: Store
    models: Path


def draw(seed: int) -> np.ndarray:
    """An eye's disc on black, with spots: (301, 397, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = np.zeros((301, 397, 3), np.uint8)
    cv2.circle(image, (195 + seed, 150), 140, (40, 90, 160), -1)
    for y, x, radius in rng.integers((40, 80, 1), (260, 310, 9), (40, 3)):
        cv2.circle(image, (int(x), int(y)), int(radius), [int(v) for v in rng.integers(0, 255, 3)], -1)
    return cv2.GaussianBlur(image, (5, 5), 0)


@pytest.fixture(scope="module")
def few(tmp_path_factory, address) -> Few:
    folder = tmp_path_factory.mktemp("few")
    (folder / "photographs").mkdir()
    ids = ["1_left", "2_right", "3_left"]
    for number, id in enumerate(ids):
        cv2.imwrite(str(folder / "photographs" / f"{id}.png"), draw(number))
    (folder / "labels.csv").write_text("image,level\n" + "".join(f"{id},0\n" for id in ids))
    verb = STAGES["ingest"]
    cluster = ClusterConfig(scheduler=address, workers=2)
    with Context(folder, folder / "few.zarr", cluster, console=Console(file=io.StringIO())) as context:
        config = {"folder": folder / "photographs", "labels": folder / "labels.csv", "label_column": "level"}
        execute("ingest", verb, verb.config(**config), context)
    (folder / "models").mkdir()
    for seed, name in ((3, "first"), (1, "crops")):  # with seed 0 all that is clamped dies on the way
        torch.manual_seed(seed)
        net = ResidualNet(num_classes=2, widths=(4, 4, 6, 8, 8)).eval()
        average = torch.rand(3, 64, 64) * 60
        save_model(
            folder / "models" / f"{name}.safetensors", net, architecture="ResidualNet",
            parameters={"num_classes": 2, "widths": [4, 4, 6, 8, 8]}, preprocessing={"average": average},
        )  # fmt: skip
    return Few(Store(folder / "few.zarr"), folder / "models")


@pytest.fixture
def stage(few, address, tmp_path):
    """stage(name, **settings): a saliency stage in a run of its own: its folder, and what was said."""

    def one(name: str, memory: str = "2GiB", **settings):
        said = io.StringIO()
        console = Console(file=said, soft_wrap=True, width=1000)
        cluster = ClusterConfig(scheduler=address, workers=2, memory=memory)
        verb = STAGES["saliency"]
        with Context(tmp_path / name, few.store.path, cluster, few.models, console=console) as context:
            execute("saliency", verb, verb.config(**settings), context)
        return tmp_path / name, said.getvalue()

    return one


def tables(run):
    return [pd.read_parquet(run / f"{name}.parquet") for name in ("centres", "candidates")]


def maps(run):
    return {id: np.asarray(array[:]) for id, array in zarr.open_group(run / "saliency.zarr", mode="r").arrays()}


def normalised(few, id, name="first"):
    average = load_model(few.models / f"{name}.safetensors").preprocessing["average"].numpy()
    image = few.store.image(id)
    return Normalised(image, average, extremes(image, average))


def net_of(few, name="first") -> nn.Module:
    return load_model(few.models / f"{name}.safetensors").net


def task_of(few, **changes) -> tasks.Task:
    file = few.models / "first.safetensors"
    one = tasks.Task(str(few.store.path), ID, str(file), hashlib.sha256(file.read_bytes()).hexdigest(), plan="")
    known = normalised(few, ID).extremes
    return replace(one, extremes=known, **changes)


def clamped(net: nn.Module, image, method: str) -> np.ndarray:
    """Guided back-propagation or deconvolution of the whole image in plain PyTorch, the channels' mean."""
    handles = []
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
            if method == "guided":  # what the plain backward pass lets through, clamped
                handles.append(module.register_full_backward_hook(lambda m, given, down: (given[0].clamp(min=0),)))
            else:  # whatever the sign of the input was
                handles.append(module.register_full_backward_hook(lambda m, given, down: (down[0].clamp(min=0),)))
    x = torch.from_numpy(np.asarray(image[:, :, :]))[None].requires_grad_()
    net(x)[0, 1].backward()
    for handle in handles:
        handle.remove()
    return x.grad[0].mean(0).numpy()


@pytest.mark.parametrize("method", ["guided", "deconv"])
def test_clamped_ways_are_those_of_the_engine_and_of_plain_pytorch(stage, few, method):
    run, said = stage(method, method=method, write=True, candidates=3)
    assert f"method={method!r} takes whole photographs: image 301 x 397 px, gather" in said
    centres, candidates = tables(run)
    distances = []
    for row in centres.itertuples():
        source, values = normalised(few, row.id), maps(run)[row.id]
        streamed = ts.stream(net_of(few), memory="2 GiB").saliency(source, method=method)
        np.testing.assert_array_equal(values, streamed.numpy())
        assert (row.y_px, row.x_px, row.value) == tuple(streamed.argmax(0.1))
        assert row.probability == pytest.approx(float(streamed.logits.softmax(1)[0, 1]), abs=1e-6)
        expected = clamped(net_of(few), source, method)
        distances.append(np.linalg.norm(values - expected) / np.linalg.norm(expected))
    assert min(distances) < 1e-3  # float32 flips a ReLU or a pooling winner in some photographs
    assert max(distances) < 0.15
    assert list(candidates.columns) == ["id", "rank", "y_px", "x_px", "value"]


def test_clamped_ways_by_many_tiles_are_the_same_but_for_rounding(stage):
    one, _ = stage("one", method="guided", write=True, limit=1)
    two, said = stage("two", method="guided", write=True, limit=1, tile_px=128)
    assert "12 tiles" in said
    (id, first), *_ = maps(one).items()
    second = maps(two)[id]
    assert np.linalg.norm(second - first) < 1e-2 * np.linalg.norm(first)


@pytest.mark.parametrize("reduce", ["mean", "absmax"])
def test_smoothgrad_is_the_mean_gradient_over_noisy_copies(stage, few, reduce):
    settings = {"method": "smoothgrad", "samples": 3, "noise": 0.2, "seed": 5, "reduce": reduce, "tile_px": 128}
    run, _ = stage("smooth", **settings, write=True, limit=1)
    ((id, values),) = maps(run).items()
    source, net = normalised(few, id), trace(net_of(few))
    layout = plan(net, (301, 397), tile=128, channels_out=3)
    total = np.zeros((3, 301, 397))
    for sample in range(3):
        each = np.zeros((3, 301, 397))

        def write(cell, block, each=each) -> None:
            each[:, cell.y0 : cell.y1, cell.x0 : cell.x1] = block

        SaliencyPass(net, layout, reduce=None).run(Noisy(source, Noise(3, 0.2, 5), sample), write)
        total += each / 3
    expected = total.mean(0) if reduce == "mean" else np.abs(total).max(0)
    assert np.abs(values - expected).max() < 1e-5 * np.abs(expected).max()
    (row,) = pd.read_parquet(run / "centres.parquet").itertuples()
    plain = net_of(few)(torch.from_numpy(source[:, 0:301, 0:397])[None]).softmax(1)[0, 1].detach()
    assert row.probability == pytest.approx(float(plain), abs=1e-6)  # the photograph's, without noise


def same(a: tasks.Result, b: tasks.Result) -> None:
    assert (a.peak, a.probability, a.candidates) == (b.peak, b.probability, b.candidates)
    np.testing.assert_array_equal(a.overview, b.overview)


CIRCLE = FieldOfView(150.0, 190.0, 160.0, 5.0, 290.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"noise": Noise(2, 0.15, 1), "method": "smoothgrad", "search": Search(candidates=5, distance_px=40)},
        {"circle": CIRCLE, "search": Search("density", 5, 40, "mean_shift", 30, 200)},
        {"circle": CIRCLE, "reduce": "absmax", "search": Search("density", 5, 40, "dbscan", 30, 200)},
    ],
    ids=["smoothgrad", "mean_shift", "dbscan"],
)  # fmt: skip
@pytest.mark.parametrize("tile_px", [128, 192])
def test_grouping_changes_no_bit(few, tmp_path, settings, tile_px):
    layout = plan(trace(net_of(few)), (301, 397), tile=tile_px)
    (tmp_path / "plan.json").write_text(layout.to_json())
    found = []
    for granularity in GRANULARITIES:
        for written in (False, True):
            target = tmp_path / granularity
            zarr.create_array(target, shape=layout.image, chunks=(tile_px, tile_px), dtype="f4", overwrite=True)
            task = task_of(few, **settings, granularity=granularity, write=str(target) if written else None)
            job = Job(ID, tasks.reduction(replace(task, plan=str(tmp_path / "plan.json"))))
            run([job], window=1, scheduler="threads", on_result=lambda _, value: found.append(value))
    values = zarr.open_array(target, mode="r")[:]
    for other in found[1:]:
        same(found[0], other)
    rule, search = task.rule((301, 397)), task.search
    alone = conclude([look(values, Region(0, 301, 0, 397), rule, search)], rule, search)
    assert list(found[0].candidates) == alone
    assert len(alone) == 5


def test_centres_are_the_same_with_one_worker_and_another_granularity(stage):
    settings = {"tile_px": 128, "border_rule": "circle", "centre": "density", "candidates": 4, "bandwidth_px": 40,
                "strongest": 300, "candidate_distance_px": 60}  # fmt: skip
    runs = [stage(g, granularity=g, **settings)[0] for g in GRANULARITIES]
    first = tables(runs[0])
    for other in runs[1:]:
        for a, b in zip(first, tables(other), strict=True):
            pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_the_centre_is_the_first_candidate_and_all_are_apart_and_inside_the_circle(stage, few):
    run, said = stage("run", tile_px=256, border_rule="circle", candidates=4, candidate_distance_px=60, write=True)
    assert "no field of view" not in said
    centres, candidates = tables(run)
    assert list(centres["id"]) == few.store.ids
    ranked = candidates.groupby("id")
    for row in centres.itertuples():
        rule = Border((301, 397), 0.1, field_of_view(few.store, row.id))
        points = ranked.get_group(row.id)
        assert list(points["rank"]) == [0, 1, 2, 3]
        mask, values = rule.mask(Region(0, 301, 0, 397)), maps(run)[row.id]
        assert mask[points["y_px"], points["x_px"]].all()
        np.testing.assert_array_equal(values[points["y_px"], points["x_px"]], points["value"].astype("f4"))
        assert tuple(points.iloc[0][["y_px", "x_px", "value"]]) == (row.y_px, row.x_px, row.value)
        assert (row.y_px, row.x_px) == np.unravel_index(np.where(mask, values, -np.inf).argmax(), mask.shape)
        places = points[["y_px", "x_px"]].to_numpy()
        apart = np.linalg.norm(places[:, None] - places[None], axis=2) + 1000 * np.eye(4)
        assert apart.min() >= 60


def test_a_photograph_without_a_field_of_view_has_the_frame_rule_and_it_is_said(stage, few, monkeypatch):
    lost = few.store.ids[1]
    original = saliency.field_of_view
    monkeypatch.setattr(saliency, "field_of_view", lambda store, id: None if id == lost else original(store, id))
    run, said = stage("run", tile_px=256, border_rule="circle", border=0.2)
    assert f"1 of 3 photographs have no field of view, so the frame rule was used for them: {lost}" in said
    framed, _ = stage("framed", tile_px=256, border=0.2)
    a, b = (tables(r)[0].set_index("id") for r in (run, framed))
    pd.testing.assert_series_equal(a.loc[lost], b.loc[lost])
    assert not a.drop(lost).equals(b.drop(lost))


@pytest.mark.parametrize("method", ["gradient", "guided", "deconv", "smoothgrad"])
@pytest.mark.parametrize("centre", ["argmax", "density"])
def test_squares(stage, few, method, centre):
    run, _ = stage(
        "square", resolution="square", method=method, samples=2, border_rule="circle", centre=centre, candidates=2,
        candidate_distance_px=30, bandwidth_px=40, strongest=50,
    )  # fmt: skip
    centres, candidates = tables(run)
    assert 4 <= len(candidates) <= 6
    pd.testing.assert_frame_equal(
        candidates[candidates["rank"] == 0].drop(columns="rank").reset_index(drop=True),
        centres.drop(columns="probability"),
    )
    for row in candidates.itertuples():  # a square's pixel is 5 x 6 of the photograph: its middle is inside
        rule = Border((301, 397), 0.1, field_of_view(few.store, row.id))
        assert rule.mask(Region(0, 301, 0, 397))[row.y_px - 1 : row.y_px + 2, row.x_px - 1 : row.x_px + 2].any()
    assert centres["probability"].between(0, 1).all()


def test_methods_differ(stage):
    found = [
        tables(stage(m, method=m, samples=2, noise=0.5)[0])[0] for m in ("gradient", "guided", "deconv", "smoothgrad")
    ]
    assert len({tuple(t["value"]) for t in found}) == 4
    for table in found[1:]:
        np.testing.assert_allclose(table["probability"], found[0]["probability"], atol=1e-6)


def test_the_crops_model_over_whole_photographs_has_its_own_normalisation(stage, few):
    run, _ = stage("crops", model="crops", tile_px=256, write=True, limit=1)
    ((id, values),) = maps(run).items()
    expected = np.empty((301, 397), np.float32)

    def write(cell, block) -> None:
        expected[cell.y0 : cell.y1, cell.x0 : cell.x1] = block

    net = trace(net_of(few, "crops"))
    SaliencyPass(net, plan(net, (301, 397), tile=256)).run(normalised(few, id, "crops"), write)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("window_px", [128, 320])
def test_after_surgery_it_is_the_sum_over_all_windows(stage, few, window_px):
    """Listing 1, lines 11-13; photographs of 301 px are filled up to a window of 320."""
    run, said = stage("windows", window_px=window_px, write=True, candidates=2)
    assert f"windows of {window_px} px take whole photographs" in said
    centres, _ = tables(run)
    assert centres["probability"].isna().all()
    slides = fully_convolutional(net_of(few), window_px)
    for row in centres.itertuples():
        image = np.asarray(normalised(few, row.id)[:, 0:301, 0:397])
        padded = torch.from_numpy(np.pad(image, [(0, 0), (0, max(0, window_px - 301)), (0, 0)]))[None].requires_grad_()
        logits = slides(padded)
        logits[0, 1].sum().backward()
        expected, values = padded.grad[0].mean(0).numpy()[:301, :397], maps(run)[row.id]
        assert np.linalg.norm(values - expected) < 1e-3 * np.linalg.norm(expected)
        inside = np.where(Border((301, 397), 0.1).mask(Region(0, 301, 0, 397)), values, -np.inf)
        assert (row.y_px, row.x_px) == np.unravel_index(inside.argmax(), inside.shape)


class Gated(nn.Module):
    """A network that weighs channels by their means over the whole image, before its end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.gate, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Dense(nn.Module):
    """A network that returns a map."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, 2, 1))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("make", [Gated, Dense])
@pytest.mark.parametrize("noise", [None, Noise(3, 0.1, 2)])
@pytest.mark.parametrize("reduce", ["mean", "absmax"])
def test_networks_that_tiles_cannot_do_alone_go_by_stored_maps(few, monkeypatch, tmp_path, make, noise, reduce):
    net = make().eval()
    config = SaliencyConfig(method="smoothgrad" if noise else "gradient", reduce=reduce)
    assert takes_whole(config, trace(net))
    assert not takes_whole(config, trace(net_of(few)))
    streamed = ts.stream(net, memory="64 MiB")
    monkeypatch.setattr(whole, "streamed", lambda task: streamed)
    target = tmp_path / "map"
    zarr.create_array(target, shape=(301, 397), chunks=(1024, 1024), dtype="f4")
    found = whole.photograph(task_of(few, noise=noise, reduce=reduce, memory=1 << 26, write=str(target)))
    total, image = torch.zeros(3, 301, 397, dtype=torch.float64), normalised(few, ID)
    copies = [Noisy(image, noise, s) for s in range(noise.samples)] if noise else [image]
    for copy in copies:
        x = torch.from_numpy(copy[:, 0:301, 0:397])[None].requires_grad_()
        result = net(x)
        (result[0, 1].sum()).backward()
        total += x.grad[0].double() / len(copies)
    expected = (total.mean(0) if reduce == "mean" else total.abs().amax(0)).numpy()
    values = zarr.open_array(target, mode="r")[:]
    assert np.linalg.norm(values - expected) < 1e-4 * np.linalg.norm(expected)
    assert found.peak.value == values[found.peak.y_px, found.peak.x_px]
    if make is Dense:
        assert found.probability is None
    else:
        plain = net(torch.from_numpy(image[:, 0:301, 0:397])[None]).softmax(1)[0, 1].detach()
        assert found.probability == pytest.approx(float(plain), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "guided", "granularity": "tile"},
            "granularity='tile', but method='guided' takes whole photographs",
        ),
        ({"method": "guided", "target": 7}, r"target=7 must be in \[0, 2\)"),
        ({"resolution": "square", "target": 7}, r"target=7 must be in \[0, 2\)"),
        ({"resolution": "square", "write": True}, "write=true keeps maps at full resolution"),
        ({"method": "guided", "memory": "1MiB"}, "the smallest budget that works is"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(stage, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        stage("run", **settings)
    assert not list((tmp_path / "run").glob("overviews/*"))


def test_photographs_with_fewer_candidates_are_told(stage):
    run, said = stage("run", candidates=50, candidate_distance_px=200, tile_px=256)
    assert "saliency: 3 of 3 photographs have fewer than 50 candidates" in said
    assert tables(run)[1].groupby("id").size().between(1, 6).all()
