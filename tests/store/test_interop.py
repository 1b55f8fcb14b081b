"""Others read what we write: ome-zarr-models, xarray's DataTree, napari's reader."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from PIL import Image

from tilestream.store import Source, Store, ingest_photograph, write_series


@pytest.fixture
def masked(store: Path, folder: Path, noise: Callable[..., np.ndarray]) -> Path:
    """A store of one photograph, 1100 x 900, with a mask."""
    Image.fromarray(noise(1100, 900)).save(folder / "m.png")
    Image.fromarray(np.eye(1100, 900, dtype=bool)).save(folder / "MA.png")
    source = Source("m", str(folder / "m.png"), masks={"MA": str(folder / "MA.png")})
    assert ingest_photograph(store, source)["status"] == "committed"
    write_series(store)
    return store


def attempt(store: Path, id: str) -> Path:
    return store / "images" / id / str(Store(store).commit(id)["attempt"])


@pytest.mark.filterwarnings("ignore")
def test_metadata_are_valid(filled: Path, masked: Path) -> None:
    from ome_zarr_models import v05

    write_series(filled)
    v05.Image.from_zarr(zarr.open_group(attempt(filled, "b"), mode="r"))
    # with labels Image.from_zarr looks for their arrays in the wrong place (ome-zarr-models 1.6 and 1.7)
    v05.ImageLabel.from_zarr(zarr.open_group(attempt(masked, "m") / "labels" / "MA", mode="r"))
    v05.BioFormats2Raw.from_zarr(zarr.open_group(filled, mode="r"))
    series = json.loads((filled / "OME" / "zarr.json").read_text())["attributes"]["ome"]["series"]
    assert [filled / name for name in series] == [attempt(filled, id) for id in "abcm"]
    assert (filled / "OME" / "METADATA.ome.xml").read_text().count("<Image ") == 4


@pytest.mark.filterwarnings("ignore")
def test_a_data_tree(masked: Path, noise: Callable[..., np.ndarray]) -> None:
    tree = xr.open_datatree(attempt(masked, "m"), engine="zarr", consolidated=False)
    np.testing.assert_array_equal(tree["s0/image"], noise(1100, 900).transpose(2, 0, 1))
    assert tree["s1/image"].dims == ("c", "y", "x")
    np.testing.assert_array_equal(tree["labels/MA/s0/image"][0], np.eye(1100, 900))


@pytest.mark.filterwarnings("ignore")
def test_napari_reads_photograph_and_masks(masked: Path, noise: Callable[..., np.ndarray]) -> None:
    reader = pytest.importorskip("napari_ome_zarr", reason="pip install napari-ome-zarr, which brings all of napari")
    place = str(attempt(masked, "m"))
    picture, mask = reader.napari_get_reader(place)(place)
    assert (picture[2], mask[2]) == ("image", "labels")
    np.testing.assert_array_equal(picture[0][0], noise(1100, 900).transpose(2, 0, 1))
    assert [level.shape for level in mask[0]] == [(1, 1100, 900), (1, 550, 450)]


def test_other_masks_of_a_stored_photograph_are_told(masked: Path, folder: Path) -> None:
    source = Source("m", str(folder / "m.png"), masks={"MA": str(folder / "MA.png")})
    assert ingest_photograph(masked, source)["status"] == "skipped"
    Image.fromarray(np.eye(1100, 900, 1, dtype=bool)).save(folder / "MA.png")
    assert ingest_photograph(masked, source)["reason"] == "conflicting_source"
    assert ingest_photograph(masked, Source("m", str(folder / "m.png")))["status"] == "skipped"


def test_masks_are_read(masked: Path) -> None:
    np.testing.assert_array_equal(Store(masked).mask("m", "MA")[0], np.eye(1100, 900))
    with pytest.raises(ValueError, match="mask='HE' of id='m' is not in the store; it has MA"):
        Store(masked).mask("m", "HE")
