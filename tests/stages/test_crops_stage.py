"""Several crops a photograph, and random centres under either border rule."""

import io

import numpy as np
import pandas as pd
import pytest
import zarr
from rich.console import Console

from tilestream.methods import crop_region, cut, random_centre
from tilestream.methods.localisation import allowed_centres
from tilestream.stages import STAGES, ClusterConfig, Context, crops, execute
from tilestream.stages.saliency_config import field_of_view


@pytest.fixture
def run_of(made, address, tmp_path):
    """A run folder with splits and candidates of the small run's photographs; go(verb, **settings) adds a stage."""
    (tmp_path / "splits.parquet").write_bytes((made.run / "splits.parquet").read_bytes())

    def go(verb: str, name: str | None = None, **settings) -> str:
        said, stage = io.StringIO(), STAGES[verb]
        console = Console(file=said, soft_wrap=True, width=1000)
        cluster = ClusterConfig(scheduler=address, workers=2)
        with Context(tmp_path, made.store.path, cluster, made.models, console=console) as context:
            execute(name or verb, stage, stage.config(**settings), context)
        return said.getvalue()

    go("saliency", tile_px=256, candidates=3, candidate_distance_px=60)
    return go


def test_several_crops_a_photograph(run_of, made, tmp_path):
    run_of("crops", size_px=64, per_image=3)
    table = pd.read_parquet(tmp_path / "crops.parquet")
    candidates = pd.read_parquet(tmp_path / "candidates.parquet")
    assert list(table.columns) == [
        "position", "id", "y0_px", "x0_px", "height", "width", "low", "high", "padded", "label", "unhealthy", "split",
        "rank",
    ]  # fmt: skip
    assert list(zip(table["id"], table["rank"], strict=True)) == list(
        zip(candidates["id"], candidates["rank"], strict=True)
    )
    assert list(table["position"]) == list(range(len(table)))
    assert table["rank"].max() == 2
    pixels = zarr.open_array(tmp_path / "crops.zarr" / "image", mode="r")[:]
    for row, each in zip(table.itertuples(), candidates.itertuples(), strict=True):
        region = crop_region((301, 397), (each.y_px, each.x_px), 64)
        assert (row.y0_px, row.x0_px) == (region.y0, region.x0)
        np.testing.assert_array_equal(pixels[row.position], cut(made.store.image(row.id), region))


def test_one_crop_a_photograph_is_the_first_of_several(run_of, tmp_path):
    run_of("crops", "one", size_px=64)
    run_of("crops", "several", size_px=64, per_image=2)
    one, several = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("one", "several"))
    assert (one["rank"] == 0).all()
    first = several[several["rank"] == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(one.drop(columns="position"), first.drop(columns="position"))


def test_more_crops_than_candidates_are_refused(run_of):
    with pytest.raises(
        ValueError, match="per_image=4, but saliency found at most 3 candidates a photograph; run it with"
    ):
        run_of("crops", size_px=64, per_image=4)


@pytest.mark.parametrize("rule", ["frame", "circle"])
def test_random_centres_of_training_crops_obey_the_rule(run_of, made, tmp_path, rule):
    run_of("crops", size_px=16, per_image=2, select="training", border_rule=rule, border=0.2, seed=3)
    table = pd.read_parquet(tmp_path / "crops.parquet")
    held_out = table[(table["label"] == 0) & (table["split"] == "validation")]
    candidates = pd.read_parquet(tmp_path / "candidates.parquet").set_index(["id", "rank"])
    assert len(held_out) >= 1
    for row in held_out.itertuples():  # as at the decision
        place = candidates.loc[(row.id, row.rank)]
        region = crop_region((301, 397), (int(place["y_px"]), int(place["x_px"])), 16)
        assert (row.y0_px, row.x0_px) == (region.y0, region.x0)
    healthy = table[(table["label"] == 0) & (table["split"] == "train")]
    assert len(healthy) >= 2
    assert len(healthy) == 2 * healthy["id"].nunique()
    assert not healthy.duplicated(["id", "y0_px", "x0_px"]).any()
    for row in healthy.itertuples():
        field = field_of_view(made.store, row.id)
        name = f"{row.id}:{row.rank}" if row.rank else row.id
        centre = random_centre((301, 397), 0.2, 3, name, field, rule)
        assert (row.y0_px + 8, row.x0_px + 8) == centre
        assert allowed_centres((301, 397), 0.2, field, rule)[centre]


def test_photographs_without_a_field_of_view_are_counted(run_of, monkeypatch):
    monkeypatch.setattr(crops, "field_of_view", lambda store, id: None)
    said = run_of("crops", size_px=16, select="training", border_rule="circle")
    assert "photographs with random centres have no field of view, so the frame rule was used for them" in said
