"""The small run against plain PyTorch on whole photographs, and what lies in its folder."""

import copy
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from PIL import Image
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

from tilestream.nets import load_model


def normalised(made, id, average):
    """A photograph as paper A says, by hand: average image (bilinear) subtracted, one joint stretch to [0, 1]."""
    raw = torch.from_numpy(np.asarray(made.store.image(id)[:])).double()
    wide = torch.nn.functional.interpolate(average[None].double(), raw.shape[1:], mode="bilinear")[0]
    values = raw - wide
    return (values - values.min()) / (values.max() - values.min())


def whole_map(net, image, target=1):
    """Channel mean of d logit / d input by autograd on the whole photograph, and the softmax probability."""
    image = image[None].clone().requires_grad_()
    logits = net(image)
    (gradient,) = torch.autograd.grad(logits[0, target], image)
    return gradient[0].mean(dim=0).numpy(), float(torch.softmax(logits.detach(), 1)[0, target])


def test_centres_equal_plain_pytorch_on_whole_photographs(made):
    model = load_model(made.run / "models" / "first.safetensors")
    net, average = model.net.double(), model.preprocessing["average"]
    centres = pd.read_parquet(made.run / "centres.parquet")
    assert list(centres["id"]) == made.store.ids
    same, distances, plain = 0, [], []
    for row in centres.itertuples():
        image = normalised(made, row.id, average)
        saliency, probability = whole_map(net, image)
        height, width = saliency.shape
        y, x = np.mgrid[:height, :width]
        inside = (y > 0.1 * height) & (y < height - 0.1 * height) & (x > 0.1 * width) & (x < width - 0.1 * width)
        allowed = np.where(inside, saliency, -np.inf)
        best = allowed.max()
        assert row.value == pytest.approx(best, rel=1e-4)
        assert allowed[row.y_px, row.x_px] >= best * (1 - 1e-4)  # float32 may swap points that are closer than that
        same += (row.y_px, row.x_px) == np.unravel_index(np.argmax(allowed), allowed.shape)
        assert row.probability == pytest.approx(probability, abs=1e-5)
        written = np.asarray(zarr.open_array(made.run / "saliency.zarr" / row.id, mode="r")[:])
        distances.append(np.linalg.norm(written - saliency) / np.linalg.norm(saliency))
        single, _ = whole_map(copy.deepcopy(net).float(), image.float())
        plain.append(np.linalg.norm(single - saliency) / np.linalg.norm(saliency))
    assert same >= len(centres) - 1
    # float32 flips a ReLU or a pooling winner in some photographs, in PyTorch too
    assert np.linalg.norm(distances) <= 1.5 * np.linalg.norm(plain)
    assert np.median(distances) <= max(1e-3, 1.5 * np.median(plain))


def test_crops_are_the_photographs_pixels(made):
    table, centres = pd.read_parquet(made.run / "crops.parquet"), pd.read_parquet(made.run / "centres.parquet")
    crops = zarr.open_group(made.run / "crops.zarr", mode="r")
    assert crops["image"].shape == (12, 3, 96, 96)
    assert crops["image"].dtype == np.uint8
    shifted = 0
    for row, centre in zip(table.itertuples(), centres.itertuples(), strict=True):
        assert row.id == centre.id
        y0, x0 = min(max(centre.y_px - 48, 0), 301 - 96), min(max(centre.x_px - 48, 0), 397 - 96)
        assert (row.y0_px, row.x0_px) == (y0, x0)
        shifted += (y0, x0) != (centre.y_px - 48, centre.x_px - 48)
        photograph = np.asarray(Image.open(made.run / "photographs" / f"{row.id}.jpeg")).transpose(2, 0, 1)
        np.testing.assert_array_equal(crops["image"][row.position], photograph[:, y0 : y0 + 96, x0 : x0 + 96])
    assert shifted  # one lay at the border at least, else nothing was tested
    assert crops.attrs["ids"] == list(table["id"])


def test_centres_on_the_square_are_mapped_to_the_photograph(made):
    """Position i of the square means (i + 1/2) H / 64 - 1/2; rows and columns have scales of their own."""
    model = load_model(made.models / "first.safetensors")
    net, average = model.net.double(), model.preprocessing["average"].double()
    for row in pd.read_parquet(made.run / "saliency_square.parquet").itertuples():
        square = np.asarray(made.store.square(row.id)[:]).reshape(3, 64, 16, 64, 16).mean(axis=(2, 4))
        values = torch.from_numpy(np.rint(square)) - average
        saliency, _ = whole_map(net, (values - values.min()) / (values.max() - values.min()))
        inside = np.full_like(saliency, -np.inf)
        inside[7:58, 7:58] = saliency[7:58, 7:58]  # 6.4 < i < 57.6
        y, x = np.unravel_index(np.argmax(inside), inside.shape)
        assert abs(row.y_px - ((y + 0.5) * 301 / 64 - 0.5)) <= 0.5
        assert abs(row.x_px - ((x + 0.5) * 397 / 64 - 0.5)) <= 0.5
        assert row.value == pytest.approx(inside[y, x], rel=1e-2)


def test_training_crops_leave_the_test_split_out(made):
    table = pd.read_parquet(made.run / "crops_train.parquet")
    splits = pd.read_parquet(made.run / "splits.parquet").set_index("id")["split"]
    assert set(table["split"]) == {"train", "validation"}
    assert (table["split"] == splits[table["id"]].to_numpy()).all()
    assert set(table.loc[table["split"] == "train", "label"]) <= {0, 3, 4}
    assert (table["unhealthy"] == (table["label"] >= 2).astype(int)).all()


def test_predictions_and_metrics_agree(made):
    table = pd.read_parquet(made.run / "predictions.parquet")
    assert list(table.columns[:4]) == ["id", "label", "probability", "decision"]
    labels = pd.read_csv(made.run / "photographs" / "labels.csv").set_index("image")["level"]
    assert (table["grade"] == labels[table["id"]].to_numpy()).all()
    assert (table["label"] == (table["grade"] >= 2).astype(int)).all()
    thresholds = json.loads((made.models / "decision.json").read_text())
    metrics = json.loads((made.run / "metrics.json").read_text())
    test = table[table["split"] == "test"]
    for name, prefix in (("saliency", ""), ("naive", "naive_")):
        decisions = table[f"{prefix}probability"] >= thresholds[name]["value"]
        assert (table[f"{prefix}decision"] == decisions.astype(int)).all()
        right = (test["label"] == test[f"{prefix}decision"]).mean()
        area = roc_auc_score(test["label"].astype(int), test[f"{prefix}probability"])
        assert metrics[name]["accuracy"] == pytest.approx(right)
        assert metrics[name]["auc"] == pytest.approx(area)
        assert {"sensitivity", "specificity", "ppv", "npv"} <= metrics[name].keys()


def test_predictions_equal_plain_pytorch_on_the_crop(made):
    model = load_model(made.models / "crops.safetensors")
    net, average = model.net.double(), model.preprocessing["average"]
    crops = pd.read_parquet(made.run / "crops.parquet").set_index("id")
    for row in pd.read_parquet(made.run / "predictions.parquet").itertuples():
        y0, x0 = crops.loc[row.id, ["y0_px", "x0_px"]]
        crop = normalised(made, row.id, average)[None, :, y0 : y0 + 96, x0 : x0 + 96]
        with torch.no_grad():
            probability = float(torch.softmax(net(crop), 1)[0, 1])
        assert row.probability == pytest.approx(probability, abs=1e-5)


def test_model_files_rebuild_themselves(made):
    for name, examples in (("first", "squares"), ("crops", "crops")):
        with safe_open(made.models / f"{name}.safetensors", framework="pt") as file:
            assert file.metadata()["architecture"] == "ResidualNet"
        model = load_model(made.models / f"{name}.safetensors")
        assert model.preprocessing["examples"] == examples
        assert model.preprocessing["average"].shape == (3, 64, 64)
        assert not model.net.training


def test_average_image_is_that_of_the_training_split(made):
    table = pd.read_parquet(made.run / "splits.parquet")
    train = table.loc[table["split"] == "train", "id"]
    area = [np.asarray(made.store.square(id)[:]).reshape(3, 64, 16, 64, 16).mean(axis=(2, 4)) for id in train]
    np.testing.assert_allclose(np.load(made.run / "average.npy"), np.mean(area, axis=0), atol=0.51)  # uint8 squares


def test_timings_name_every_stage(made):
    timings = json.loads((made.run / "timings.json").read_text())
    journal = {path.stem for path in (made.run / "journal").glob("*.json")}
    assert set(timings) == journal
    assert len(timings) == 13
    for record in timings.values():
        assert record["wall_s"] >= 0
        assert record["peak_bytes"] > 50 * 2**20


def test_nothing_unfinished_is_left(made):
    assert not list((made.run / "journal").glob("*.partial*"))
    assert not [path for path in made.run.rglob("*") if path.name.endswith(".tmp")]
    assert not list((made.run / "journal").glob("*.npy"))


def test_report_shows_photographs_and_fetches_nothing(made):
    page = (made.run / "report.html").read_text()
    assert "A small run" in page
    for word in ("Results", "Training", "This run", "saliency", "crop"):
        assert word in page
    assert not re.search(r"""(src|href)=["']https?://""", page)
    table = pd.read_parquet(made.run / "predictions.parquet")
    for id in table.loc[table["split"] == "test", "id"]:
        assert f"photograph {id}" in page
        assert f"crop frame on {id}" in page
    assert page.count("data:image/") >= 4 * 3
