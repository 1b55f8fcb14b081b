"""The localise stage on photographs whose lesions and centres were put where the answers are known."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from tilestream.methods import localisation as loc
from tilestream.stages import ClusterConfig, Context
from tilestream.stages.localise import STAGE, LocaliseConfig, Truth, ground_truth, measure, read_masks
from tilestream.stages.runner import execute
from tilestream.store import Source, create_store, find_photographs, ingest_photograph

IDRID = Path(__file__).parents[3] / "shared" / "data" / "idrid" / "segmentation"
EXTENT = (200, 300)
BOXES = {"a": {1: (90, 100, 150, 160)}, "b": {2: (50, 55, 100, 105)}, "c": {}, "e": {3: (10, 20, 10, 20)}}
"""y0, y1, x0, x1 of the lesion of a kind; c has none, d is not known, e has no centre."""
CANDIDATES = [
    ("a", 0, 95, 155, 3.0), ("a", 1, 30, 40, 1.0), ("b", 0, 100, 250, 2.0), ("b", 1, 52, 102, 0.5),
    ("c", 0, 100, 150, 2.5), ("d", 0, 100, 150, 9.0),
]  # fmt: skip


def label_image(id: str) -> np.ndarray:
    image = np.zeros(EXTENT, np.uint8)
    for value, (y0, y1, x0, x1) in BOXES[id].items():
        image[y0:y1, x0:x1] = value
    return image


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store; the same lesions as label images and in IDRiD's form, where they are in the store as well."""
    root = tmp_path_factory.mktemp("localise")
    rng = np.random.default_rng(0)
    for name in ("images", "masks", "photographs/lesions"):
        (root / name).mkdir(parents=True)
    names = {1: "MA", 2: "HE", 3: "EX"}
    for id in "abcde":
        cv2.imwrite(str(root / "images" / f"{id}.png"), rng.integers(50, 200, (*EXTENT, 3), np.uint8))
    rows = []
    for id, boxes in BOXES.items():
        cv2.imwrite(str(root / "photographs" / "lesions" / f"{id}.png"), label_image(id))
        row = {"image": f"{id}.png", "MA_mask": "", "HE_mask": "", "EX_mask": "", "OD_mask": f"{id}_OD.png"}
        cv2.imwrite(str(root / "masks" / f"{id}_OD.png"), np.full(EXTENT, 255, np.uint8))
        for value in boxes:
            row[f"{names[value]}_mask"] = f"{id}_{names[value]}.png"
            mask = 255 * (label_image(id) == value).astype(np.uint8)
            cv2.imwrite(str(root / "masks" / f"{id}_{names[value]}.png"), mask, [cv2.IMWRITE_PNG_BILEVEL, 1])
        rows.append(row)
    pd.DataFrame(rows).to_csv(root / "labels.csv", index=False)
    legend = {"value": range(4), "kind": ["none", "microaneurysm", "haemorrhage", "exudate"]}
    pd.DataFrame(legend).to_csv(root / "photographs" / "legend.csv", index=False)
    store = create_store(root / "s.zarr")
    for source in find_photographs(root / "images"):
        masks = {m.stem.split("_")[1]: str(m) for m in (root / "masks").glob(f"{source.id}_*.png")}
        made = ingest_photograph(store, Source(source.id, source.path, None, source.name, masks))
        assert made["status"] == "committed", made
    return root


def run_of(root: Path, run: Path, address: str, candidates: bool = True) -> Context:
    table = pd.DataFrame(CANDIDATES, columns=["id", "rank", "y_px", "x_px", "value"])
    table[table["rank"] == 0].drop(columns="rank").to_parquet(run / "centres.parquet", index=False)
    if candidates:
        table.sample(frac=1, random_state=0).to_parquet(run / "candidates.parquet", index=False)
    return Context(run, root / "s.zarr", ClusterConfig(scheduler=address, workers=2))


@pytest.mark.parametrize("form", ["photographs", "", None])
def test_rates_of_known_lesions(place, tmp_path, address, form):
    lesions = None if form is None else str(place / form)
    config = LocaliseConfig(lesions=lesions, crops_px=64, draws=1000, candidate_distance_px=50)
    with run_of(place, tmp_path, address) as context:
        assert execute("localise", STAGE, config, context)
        assert not execute("localise", STAGE, config, context)  # unchanged
    found = json.loads((tmp_path / "localisation.json").read_text())
    counts = ("photographs", "without_ground_truth", "without_centre", "without_lesions")
    assert [found[name] for name in counts] == [3, 1, 1, 1]
    inner = (200 - 2 * 20 - 1) * (300 - 2 * 30 - 1)  # the border rule is strict on both sides
    pointing = found["pointing_game"]
    assert pointing["value"] == 0.5
    assert pointing["chance"] == pytest.approx((100 + 25) / 2 / inner)
    assert pointing["ratio"] == pytest.approx(1 / (125 / inner))
    assert found["crop_holds_lesion"]["value"] == 0.5
    chance = [
        loc.holding_chance(loc.find_lesions({"x": label_image(id)}, EXTENT), loc.allowed_centres(EXTENT, 0.1, None), 64)
        for id in "ab"
    ]
    assert found["crop_holds_lesion"]["chance"] == pytest.approx(np.mean(chance))
    assert [(c["crops"], c["value"]) for c in found["coverage"]] == [(1, 0.5), (2, 1.0)]
    assert [(c["crops"], c["value"]) for c in found["crops_hold_lesion"]] == [(1, 0.5), (2, 1.0)]
    first, second = (c["chance"] for c in found["coverage"])
    assert first == pytest.approx(np.mean(chance), abs=0.03)  # a lesion each, so covering it is holding it
    assert first * 1.8 < second < first * 2.2  # two crops that keep away from each other
    kinds = {"microaneurysm": 1, "haemorrhage": 1} if form == "photographs" else {"MA": 1, "HE": 1}
    assert found["lesions_by_kind"] == kinds
    assert found["coverage"][0]["kinds"][next(iter(kinds))]["value"] == 1
    froc = dict(zip(found["froc"]["levels"], found["froc"]["sensitivity"], strict=True))
    assert [froc[level] for level in (1 / 8, 1 / 4, 1 / 2, 1, 8)] == [0.5, 0.5, 0.5, 1, 1]
    table = pd.read_parquet(tmp_path / "localisation.parquet").set_index("id")
    assert list(table.index) == ["a", "b", "c"]
    assert table["on_lesion"].tolist() == [True, False, False]
    assert table["lesions_covered"].tolist() == [1, 1, 0]
    assert table.loc["b", "distance_px"] == pytest.approx(np.hypot(100 - 54, 250 - 104))
    assert np.isnan(table.loc["c", "distance_px"])


def test_one_centre_a_tolerance_and_another_name(place, tmp_path, address):
    with run_of(place, tmp_path, address, candidates=False) as context:
        config = LocaliseConfig(lesions=str(place / "photographs"), crops_px=64, tolerance_px=160)
        execute("near", STAGE, config, context)
    found = json.loads((tmp_path / "near.json").read_text())
    assert (tmp_path / "near.parquet").exists()
    assert found["pointing_game"]["value"] == 1
    assert found["pointing_game"]["chance"] > 0.9
    assert [c["crops"] for c in found["coverage"]] == [1]


def test_another_rule_than_the_centres_had_is_refused(place, tmp_path, address):
    (tmp_path / "journal").mkdir()
    record = {"config": {"border": 0.2, "border_rule": "frame"}}
    (tmp_path / "journal" / "saliency.json").write_text(json.dumps(record))
    with run_of(place, tmp_path, address) as context, pytest.raises(ValueError, match=r"border=0.1, but .* with 0.2"):
        STAGE.run(LocaliseConfig(), context)


@pytest.mark.parametrize(
    ("lesions", "message"),
    [("images", "neither a folder lesions"), ("other", "known for no photograph that has a centre")],
)
def test_unknown_ground_truth_is_refused(place, tmp_path, address, lesions, message):
    (tmp_path / "other" / "lesions").mkdir(parents=True)
    (tmp_path / "other" / "legend.csv").write_text("value,kind\n1,exudate\n")
    where = place / lesions if lesions == "images" else tmp_path / lesions
    with run_of(place, tmp_path, address) as context, pytest.raises(ValueError, match=message):
        STAGE.run(LocaliseConfig(lesions=str(where)), context)


def test_a_store_without_masks_is_said_and_old_results_go(place, tmp_path, address):
    store = create_store(tmp_path / "plain.zarr")
    for source in find_photographs(place / "images"):
        ingest_photograph(store, source)
    (tmp_path / "localisation.json").write_text("{}")
    heard = io.StringIO()
    with run_of(place, tmp_path, address) as context:
        context.store_path, context.console = store, Console(file=heard, width=200)
        assert execute("localise", STAGE, LocaliseConfig(), context)
        assert not execute("localise", STAGE, LocaliseConfig(), context)
    assert "no photograph was ingested with masks" in heard.getvalue()
    assert not (tmp_path / "localisation.json").exists()


def test_label_images_with_unknown_values_or_sizes_are_refused(place, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full(EXTENT, 99, np.uint8))
    with pytest.raises(ValueError, match=r"holds the value 99, which its legend.csv does not name"):
        read_masks(Truth(str(tmp_path / "a.png"), {1: "exudate"}), None, "a")
    cv2.imwrite(str(tmp_path / "b.png"), np.ones((10, 10), np.uint8))
    with pytest.raises(ValueError, match=r"has shape \(10, 10\), its photograph \(200, 300\)"):
        measure(str(place / "s.zarr"), "a", Truth(str(tmp_path / "b.png"), {1: "x"}), [(1, 1, 0.0)], LocaliseConfig())
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="is no image that can be read"):
        read_masks(Truth(image=str(tmp_path / "c.png")), None, "a")


@pytest.mark.skipif(not IDRID.exists(), reason="IDRiD is not on this machine")
def test_real_masks_of_idrid(tmp_path):
    context = Context(tmp_path)
    truths = ground_truth(LocaliseConfig(lesions=str(IDRID)), context, ["IDRiD_03", "IDRiD_04", "IDRiD_001"])
    assert sorted(truths) == ["IDRiD_03", "IDRiD_04"]
    assert sorted(truths["IDRiD_03"].files) == ["EX", "HE", "MA", "SE"]
    masks = read_masks(truths["IDRiD_04"], None, "IDRiD_04")
    assert {kind: int((mask != 0).sum()) for kind, mask in masks.items()} == {"MA": 804, "HE": 59383, "EX": 5557}
