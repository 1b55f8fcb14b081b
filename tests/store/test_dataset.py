from collections.abc import Callable
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

from tilestream.store import Store, create_store, open_dataset, write_labels


def test_xarray_opens_a_level(filled: Path, noise: Callable[..., np.ndarray]) -> None:
    dataset = xr.open_zarr(Store(filled).group("a"))
    assert dataset["image"].dims == ("c", "y", "x")
    assert dataset["image"].dtype == np.uint8
    np.testing.assert_array_equal(dataset["image"].values, noise().transpose(2, 0, 1))


def test_open_dataset(filled: Path) -> None:
    write_labels(filled, pd.DataFrame({"id": ["b"], "label": pd.array([2], dtype="Int64"), "patient": ["p"]}))
    dataset = open_dataset(filled)
    samples = Store(filled).samples()
    assert set(dataset.data_vars) == set(samples.columns) - {"id"} | {"square"}
    assert dataset["id"].values.tolist() == ["a", "b", "c"]
    np.testing.assert_array_equal(dataset["label"].values, [np.nan, 2, np.nan])
    assert dataset["patient"].values.tolist() == ["a", "p", "c"]
    assert dataset["height"].values.tolist() == [70, 600, 70]
    assert dataset["square"].dims == ("id", "c", "y", "x")
    assert dataset["square"].shape == (3, 3, 1024, 1024)
    np.testing.assert_array_equal(dataset["square"].sel(id="b").values, Store(filled).square("b")[...])
    chosen = dataset.isel(id=(dataset["label"] == 2).values)
    assert chosen["id"].values.tolist() == ["b"]
    np.testing.assert_array_equal(chosen["square"][0].values, Store(filled).square("b")[...])


def test_opening_reads_no_pixels(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr, "open_array", lambda *a, **k: pytest.fail("opened an array"))
    assert isinstance(open_dataset(filled)["square"].data, da.Array)


def test_photographs(filled: Path, noise: Callable[..., np.ndarray]) -> None:
    dataset = open_dataset(str(filled))
    image = dataset.photographs["b"]
    assert image.dims == ("c", "y", "x")
    assert isinstance(image.data, da.Array)
    np.testing.assert_array_equal(image[:, 100:110].values, noise(600, 1300, seed=1).transpose(2, 0, 1)[:, 100:110])
    assert dataset.photographs.open("b", level=1).shape == (3, 300, 650)
    first = dataset["id"][0]
    assert dataset.photographs[first.item()].shape == (3, 70, 90)
    with pytest.raises(ValueError, match="id='x' is not in the store"):
        dataset.photographs["x"]


def test_a_dataset_of_another_kind_has_no_photographs() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"photographs|store"):
        xr.Dataset().photographs["a"]


def test_an_empty_store(tmp_path: Path) -> None:
    dataset = open_dataset(create_store(tmp_path / "empty"))
    assert dataset.sizes["id"] == 0
    assert dataset["square"].values.shape == (0, 3, 1024, 1024)
