"""The stage `descriptors`: what the method finds in each photograph, in chunks of one writer, resumed, read lazily."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from PIL import Image
from rich.console import Console
from scipy.ndimage import gaussian_filter

from tilestream.geometry import Region
from tilestream.methods import Border
from tilestream.methods.descriptors import Dense, Sift, describe, strongest
from tilestream.stages import ClusterConfig, Context, execute, parse
from tilestream.stages.descriptors import STAGE, DescriptorsConfig, read_descriptors
from tilestream.stages.runner import Journal
from tilestream.stages.saliency_config import field_of_view
from tilestream.store import Store, create_store, find_photographs, ingest_photograph

SETTINGS = {"contrast": 0.05, "min_size_px": 2, "max_size_px": 8, "tile_px": 96, "most": 100}
SIZES = {"a": (150, 190), "b": (97, 64), "c/d": (70, 300), "dark": (64, 64), "eye": (200, 220)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Five photographs of spots; one without any, one with a field of view."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        spots = gaussian_filter(rng.normal(size=(height, width)), 2)
        pixels = np.repeat(np.uint8(250 * (spots - spots.min()) / np.ptp(spots))[..., None], 3, axis=2)
        if name == "dark":
            pixels[:] = 0
        if name == "eye":
            y, x = np.mgrid[:height, :width]
            pixels = np.where((np.hypot(y - 99.5, x - 109.5) < 90)[..., None], 60 + pixels // 2, 0).astype(np.uint8)
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    path = create_store(folder / "store.zarr")
    for source in find_photographs(folder):
        assert ingest_photograph(path, source)["status"] == "committed"
    return Store(path)


@pytest.fixture
def go(store, address):
    """go(run, name, ...): runs the stage, returns its context and what was said."""

    def run(path: Path, name: str = "descriptors", resume: bool = False, memory: int = 2**31, **settings):
        heard = io.StringIO()
        console = Console(file=heard, soft_wrap=True, width=1000)
        cluster = ClusterConfig(scheduler=address, workers=2, memory=memory)
        with Context(path, store.path, cluster, resume=resume, console=console) as context:
            execute(name, STAGE, parse(DescriptorsConfig, SETTINGS | settings, name), context)
        return context, heard.getvalue()

    return run


@pytest.mark.parametrize("method", ["sift", "dense"])
def test_bags_are_what_the_method_finds(go, store, tmp_path, method):
    context, said = go(tmp_path, method=method, step_px=16, scales=[1, 2])
    by = Sift(0.05, 2, 8) if method == "sift" else Dense((32,), (1, 2), 16)
    bags = read_descriptors(context)
    assert bags.ids == sorted(SIZES)
    assert (len(bags), bags.dim) == (5, 128)
    for index, id in enumerate(bags.ids):
        border = Border(SIZES[id], 0.03, field_of_view(store, id))
        whole = describe(by, store.image(id), Region.whole(SIZES[id]), border)
        expected = strongest([whole], 128, 100)
        assert bags[index].dtype == bags.keypoints(index).dtype == np.float32
        assert bags[index].shape == (len(expected.strength), 128)
        np.testing.assert_allclose(bags.keypoints(index), expected.keypoints, rtol=0, atol=1e-3)
        np.testing.assert_allclose(bags[index], expected.descriptors, rtol=0, atol=0.05)
    assert bags.counts == [len(bag) for bag in bags]
    assert max(bags.counts) == 100
    assert (bags.counts[bags.ids.index("dark")] == 0) == (method == "sift")
    assert ("1 have none: dark" in said) == (method == "sift")
    assert "4 photographs have no field of view" in said


def test_each_chunk_has_one_writer_and_tables_say_where(go, tmp_path):
    go(tmp_path, "other")
    group = zarr.open_group(tmp_path / "other.zarr", mode="r")
    table = pd.read_parquet(tmp_path / "other.parquet")
    assert list(table) == ["id", "start", "count"]
    for name, width in (("descriptors", 128), ("keypoints", 4)):
        assert group[name].shape == (500, width)
        assert group[name].chunks == (100, width)
    assert (table["start"] % 100 == 0).all()
    assert table["start"].is_unique
    assert json.loads((tmp_path / "quarantine" / "other.json").read_text()) == []


def test_bags_of_some_photographs_in_their_order(go, tmp_path):
    bags = read_descriptors(go(tmp_path)[0])
    some = bags.select(["eye", "a"])
    assert some.ids == ["eye", "a"]
    assert np.array_equal(some[1], bags[bags.ids.index("a")])
    assert np.array_equal(some[-1], some[1])
    assert len(list(some)) == 2  # indices beyond the last end the loop
    with pytest.raises(ValueError, match="'nobody' has no bag in descriptors"):
        bags.select(["a", "nobody"])
    with pytest.raises(ValueError, match="run 'tilestream descriptors' first"):
        read_descriptors(Context(tmp_path), "missing")


def test_a_smaller_level_gives_places_in_the_photograph(store, address, tmp_path):
    """A large photograph's lower level: keypoints lie where they do in the photograph, and are as large."""
    folder = tmp_path / "images"
    folder.mkdir()
    y, x = np.mgrid[:1100, :1300]
    spots = sum(np.exp(-((y - a) ** 2 + (x - b) ** 2) / (2 * 9**2)) for a in (303, 507, 701) for b in (405, 653, 897))
    Image.fromarray(np.uint8(30 + 200 * spots)).convert("RGB").save(folder / "big.png")
    path = create_store(tmp_path / "big.zarr")
    for source in find_photographs(folder):
        ingest_photograph(path, source)
    centres = np.array([(a, b) for a in (303, 507, 701) for b in (405, 653, 897)])
    for name, side in (("full", None), ("half", 600)):
        with Context(
            tmp_path, path, ClusterConfig(scheduler=address, workers=2), console=Console(quiet=True)
        ) as context:
            settings = {"side_px": side, "min_size_px": 6, "tile_px": 512}
            execute(name, STAGE, parse(DescriptorsConfig, settings, name), context)
        places = read_descriptors(context, name).keypoints(0)
        off = np.linalg.norm(places[:, None, :2] - centres, axis=2)
        nearest = off.argmin(axis=0)
        assert off.min(axis=0).max() < 0.6
        np.testing.assert_allclose(places[nearest, 2], 18, rtol=0.15)  # twice the spots' sigma


def test_a_stopped_stage_goes_on_where_it_was(go, tmp_path, monkeypatch):
    undisturbed = read_descriptors(go(tmp_path / "whole")[0])
    append = Journal.append

    def stop(self, record):
        append(self, record)
        if len(self.read()) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "run")
    assert not (tmp_path / "run" / "descriptors.zarr").exists()
    context, said = go(tmp_path / "run", resume=True)
    assert "of 5 photographs are done already" in said
    bags = read_descriptors(context)
    assert bags.ids == undisturbed.ids
    for mine, theirs in zip(bags, undisturbed, strict=True):
        assert np.array_equal(mine, theirs)
    assert "unchanged, skipped" in go(tmp_path / "run")[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_size_px": 10}, r"min_size_px=10.* is above max_size_px=8"),
        ({"splits": ["test"]}, "run 'tilestream split' first"),
        ({"memory": 2**20}, r"tile_px=96 takes \d+ MiB a tile, memory is 1 MiB"),
        ({"method": "dense", "scales": [3]}, "powers of two"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(go, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        go(tmp_path, **settings)
