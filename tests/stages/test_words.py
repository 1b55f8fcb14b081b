"""What visual words stand for: counts, patches and maps, of descriptors, dictionaries and whole photographs."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import zarr

from tilestream.methods import Extremes, Normalised
from tilestream.nets import build, save_model
from tilestream.stages import runner, words_tasks
from tilestream.stages.base import digest
from tilestream.stages.words import active, highest, striking
from tilestream.stages.words_tasks import Task
from tilestream.store import Store

SPARSE = {"words": 6, "hidden": 16, "dropout": 0, "epochs": 12, "batch_size": 4, "learning_rate": 0.02}
WORDS = {"stage": "words", "patches": 3, "shown_px": 16, "maps": 2, "width_px": 150, "context": 1.5}
DENSE = {"instances": "images", "words": 5, "hidden": 6, "widths": [3, 4, 4, 5], "patch_px": 46}


@pytest.fixture
def run(spotted, tmp_path) -> Path:
    """`spotted`, with the descriptor that lies far out at the spot, and the others at the frame's edge."""
    folder = shutil.copytree(spotted, tmp_path / "run")
    table, keypoints = (
        pd.read_parquet(folder / "descriptors.parquet"),
        zarr.open_array(folder / "descriptors.zarr/keypoints"),
    )
    for row in table.itertuples():
        places = np.tile(np.float32([2, 5, 2, 0]), (row.count, 1))
        if spot(folder, row.id) is not None:
            places[0, :2] = spot(folder, row.id)
        keypoints[row.start : row.start + row.count] = places
    return folder


def spot(folder, id):
    """The middle of a photograph's bright spot, None where it has none."""
    rows, columns = np.nonzero(np.asarray(Store(folder / "photographs.zarr").image(id)[1]) == 230)
    return None if not len(rows) else (np.median(rows), np.median(columns))


def test_words_on_pathological_photographs_only():
    labels = np.repeat([0, 1], [8, 6])
    activation = np.full((14, 3), 0.5, np.float32)
    activation[8:, 0] = 0.9
    activation[::2, 1] = 0.9
    activation[:8, 2] = 0.9
    table = active(activation, labels, np.float32([0.6, 0.6, 0.6]), np.float32([2, 1, -1]))
    assert table["active_pathological"].tolist() == [6, 3, 0]
    assert table["active_normal"].tolist() == [0, 4, 8]
    assert table["pathological_only"].tolist() == [True, False, False]
    assert table["p"].tolist() == pytest.approx([1 / 3003, 1, 1 / 3003])  # 14 choose 6
    assert table["p_adjusted"].tolist() == pytest.approx([1 / 2002, 1, 1 / 2002])
    assert table["pathological_low"][0] == pytest.approx(6 / (6 + 1.959964**2))  # Wilson's, all of them
    assert striking(table)["word"].tolist() == [0, 1, 2]  # the last is a sign of health
    assert active(activation, labels, np.float32([0.9] * 3))["weight"].isna().all()
    assert not active(activation, labels, np.float32([0.9] * 3))["pathological_only"].any()


def test_patches_are_of_different_photographs():
    photographs = pd.DataFrame({"id": list("abc"), "label": [0, 1, 1]})
    values = {id: np.zeros((2, 4), np.float32) for id in "abc"}
    values["b"][0], values["c"][0], values["a"][1] = [0.7, 1, 2, 3], [0.7, 4, 5, 6], [0.1, 7, 8, 9]
    table = highest(values, photographs, 2)
    assert table[["word", "rank", "id", "label"]].to_numpy().tolist() == [
        [0, 0, "b", 1],
        [0, 1, "c", 1],
        [1, 0, "a", 0],
    ]
    assert table[["y_px", "x_px", "side_px"]].to_numpy().tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_words_of_descriptors(run, go, write_pipeline):
    stages = {"convbovw_sparse": SPARSE, "words": WORDS, "report": {"gallery": 0}}
    pipeline = write_pipeline(stages)
    go(pipeline, run)
    table, patches = pd.read_parquet(run / "words.parquet"), pd.read_parquet(run / "words_patches.parquet")
    best = table.loc[table["weight"].idxmax()]
    assert best["pathological_share"] > best["normal_share"]
    shown = patches[patches["word"] == best["word"]]
    assert shown["rank"].tolist() == [0, 1, 2]
    assert (shown["label"] == 1).all()
    pixels = zarr.open_array(run / "words_patches.zarr", mode="r")
    assert pixels.shape == (6, 3, 3, 16, 16)
    for row in shown.itertuples():
        assert (row.y_px, row.x_px) == pytest.approx(spot(run, row.id))
        assert row.side_px == 12
        assert (pixels[int(best["word"]), row.rank][:, 7:9, 7:9] > 200).all()
    maps = sorted((run / "words_maps").glob("*.png"))
    assert len(maps) == 2
    drawn = cv2.imread(str(maps[0]))
    assert drawn.shape == (120, 2 * 150 + 8, 3)
    html = (run / "report.html").read_text()
    assert ">Visual words</h2>" in html
    assert re.findall(r"<figcaption>Word (\d+), weight", html) == [str(word) for word in striking(table)["word"]]
    assert html.count('alt="map of words: ') == 2
    assert "words: unchanged, skipped" in go(pipeline, run)


@pytest.mark.parametrize("model", ["bovw", "convbovw_sparse"])
def test_words_of_other_descriptors_are_refused(run, go, write_pipeline, model):
    learner = {"bovw": {"words": 5, "costs": [1], "gammas": [1]}, "convbovw_sparse": {"epochs": 1, "words": 5}}[model]
    zarr.open_group(run / "descriptors.zarr").attrs.update({"method": "sift", "contrast": 0.01})
    go(write_pipeline({model: learner}), run)
    zarr.open_group(run / "descriptors.zarr").attrs["contrast"] = 0.02
    message = f"made with contrast=0.02 instead of 0.01, by which the words of {model} were learnt; set descriptors"
    with pytest.raises(ValueError, match=message):
        go(write_pipeline({"words": {**WORDS, "model": model}}), run)
    with pytest.raises(ValueError, match=message):
        go(write_pipeline({model: {"decision": "stored"}}), run, models=run / "models")


def test_words_of_a_dictionary(run, go, write_pipeline):
    stages = {"bovw": {"words": 5, "coding": "hard", "costs": [1], "gammas": [1]}}
    stages["words"] = {**WORDS, "model": "bovw"}
    go(write_pipeline(stages), run)
    table, patches = pd.read_parquet(run / "words.parquet"), pd.read_parquet(run / "words_patches.parquet")
    assert table["weight"].isna().all()
    dictionary = np.array(json.loads((run / "models" / "bovw.json").read_text())["dictionary"]["words_"])
    described, splits = pd.read_parquet(run / "descriptors.parquet"), pd.read_parquet(run / "splits.parquet")
    values = zarr.open_array(run / "descriptors.zarr" / "descriptors")[:]
    there = {}
    for row in described[described["id"].isin(splits["id"][splits["split"] == "test"])].itertuples():
        bag = values[row.start : row.start + row.count]
        there[row.id] = (1 / (np.linalg.norm(bag[:, None] - dictionary, axis=2) + 1e-3)).max(0, initial=0)
    for word, rows in patches.groupby("word"):
        expected = sorted(there, key=lambda id: -there[id][word])[:3]
        assert rows["id"].tolist() == expected
        assert rows["activation"].tolist() == pytest.approx([there[id][word] for id in expected], rel=1e-5)


def test_a_killed_run_codes_no_photograph_twice(run, go, write_pipeline, monkeypatch, tmp_path):
    pipeline = write_pipeline({"convbovw_sparse": SPARSE, "words": WORDS})
    go(pipeline, run)
    whole = shutil.copytree(run, tmp_path / "whole")
    append = runner.Journal.append

    def limited(self, record):
        append(self, record)
        if len(self.read()) == 3:
            raise KeyboardInterrupt

    (run / "words.parquet").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("tilestream.stages.words.Journal.append", limited)
        with pytest.raises(KeyboardInterrupt):
            go(pipeline, run)
    said = go(pipeline, run, resume=True)
    assert " photographs are done already" in said
    for name in ("words.parquet", "words_patches.parquet"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_words_of_photographs_are_those_of_the_whole(spotted, tmp_path, monkeypatch):
    """Boxes of positions together have the words of the un-tiled network, at the places where it has them."""
    monkeypatch.setattr(words_tasks, "_BOX", 3)
    torch.manual_seed(0)
    net, average = build("ConvBoVW", DENSE).eval(), np.zeros((3, 8, 8), np.float32)
    path, store = tmp_path / "dense.safetensors", Store(spotted / "photographs.zarr")
    kept = {"average": torch.from_numpy(average), "side_px": None}
    save_model(path, net, architecture="ConvBoVW", parameters=DENSE, preprocessing=kept)
    known = Extremes(0, 255)
    task = Task(str(store.path), "01", str(path), digest(path), 5, None, known, 2**30, "cpu", 1)
    image = Normalised(store.image("01"), average, known)
    with torch.no_grad():
        codes = net.coding(torch.from_numpy(image[:, :, :])[None])[0]
    best, places = words_tasks.activations(task)
    np.testing.assert_allclose(best, codes.amax((1, 2)), rtol=1e-5)
    for word, (y, x, side) in enumerate(places.tolist()):
        assert side == 46
        y0, x0 = (int(v - 22.5) for v in (y, x))
        with torch.no_grad():
            alone = net.coding(torch.from_numpy(image[:, y0 : y0 + 46, x0 : x0 + 46])[None])
        assert alone[0, word].item() == pytest.approx(best[word], rel=1e-5)
    winning, where = words_tasks.winners(task)
    assert len(winning) == codes[0].numel()
    order = np.lexsort([where[:, 1], where[:, 0]])
    assert (winning[order] == codes.argmax(0).flatten().numpy()).all()


def test_auc_by_number_of_words_and_the_papers(run, go, write_pipeline):
    search = {"stage": "search", **SPARSE, "epochs": 1, "trials": 2, "space": {"words": [3, 9]}, "word_counts": [2, 5]}
    bovw = {"words": 4, "costs": [1], "gammas": [1]}
    stages = {"bovw": bovw, "found": search, "evaluate": {"predictions": ["bovw", "found"], "reference": "bovw"},
              "tables": {}, "report": {"gallery": 0}}  # fmt: skip
    go(write_pipeline(stages), run)
    html = (run / "report.html").read_text()
    counts = pd.read_parquet(run / "found.parquet").set_index("id").loc[["words 2", "words 5"]]
    assert (
        f'alt="AUC by number of words: {", ".join(f"{r.words}: {r.test_auc:.3f}" for r in counts.itertuples())}"'
        in html
    )
    table = next(t for t in json.loads((run / "tables.json").read_text())["tables"] if "Costa" in t["title"])
    rows = {row[0]: dict(zip(table["columns"][1:], row[1:], strict=True)) for row in table["rows"]}
    metrics = json.loads((run / "metrics.json").read_text())
    assert rows["paper: standard BoVW (Pires et al. 2014)"]["DR2"] == 0.94
    assert rows["here: bovw"]["words"] == 4
    assert rows["here: bovw"]["here"].startswith(f"{metrics['bovw']['auc']:.3f} (")
    assert rows["here: bovw"]["here, less bovw"] is None
    assert rows["here: found (search)"]["words"] in range(3, 10)
    assert rows["here: found (search)"]["p"] == f"{metrics['found']['auc_minus_bovw_p']:.3f}"
    assert not [t for t in json.loads((run / "tables.json").read_text())["tables"] if "per-class" in t["title"]]


def test_a_model_without_words_is_refused(run, go, write_pipeline):
    save_model(run / "models.safetensors", build("ResidualNet", {"widths": [4] * 5}), architecture="ResidualNet",
               parameters={"widths": [4] * 5})  # fmt: skip
    (run / "models").mkdir()
    (run / "models.safetensors").rename(run / "models" / "first.safetensors")
    with pytest.raises(ValueError, match="model='first' is a ResidualNet, which has no words"):
        go(write_pipeline({"words": {**WORDS, "model": "first"}}), run)
    with pytest.raises(FileNotFoundError, match="did you mean 'first'"):
        go(write_pipeline({"words": {**WORDS, "model": "frist"}}), run)
