"""The store as an xarray Dataset: the samples table, the squares and the photographs, all lazy."""

from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from tilestream.store.files import Location
from tilestream.store.pyramid import SQUARE_PX
from tilestream.store.reader import Store


def open_dataset(path: Location) -> xr.Dataset:
    """Open a store: dimension `id`, one variable a column of `Store.samples()`, and `square` (id, c, y, x) uint8.

    `square` is backed by Dask, one chunk a photograph; no pixel is read here. Unknown labels are NaN (label is
    float64). The photographs themselves, each of its own size, are at `ds.photographs[id]`.
    Raises FileNotFoundError or ValueError when `path` is no store.
    """
    store = Store(path)
    samples = store.samples()
    variables: dict[str, Any] = {name: ("id", _values(samples[name])) for name in samples.columns if name != "id"}
    ids = samples["id"].to_numpy(dtype=object)
    variables["square"] = (("id", "c", "y", "x"), _squares(store, ids))
    return xr.Dataset(variables, coords={"id": ids}, attrs={"store": str(store.path)})


def _values(column: pd.Series) -> npt.NDArray[Any]:
    gaps = isinstance(column.dtype, pd.Int64Dtype)
    plain = {"dtype": None if column.dtype.kind in "if" else object}
    values: npt.NDArray[Any] = column.to_numpy(**({"dtype": float, "na_value": np.nan} if gaps else plain))
    return values


def _squares(store: Store, ids: npt.NDArray[Any]) -> Any:
    shape = (3, SQUARE_PX, SQUARE_PX)
    if not len(ids):
        return da.zeros((0, *shape), dtype=np.uint8, chunks=(1, *shape))
    return da.from_array(ids, chunks=1).map_blocks(
        _read_square,
        store,
        dtype=np.uint8,
        new_axis=[1, 2, 3],
        chunks=((1,) * len(ids), *((size,) for size in shape)),
        meta=np.empty((0, 0, 0, 0), dtype=np.uint8),
    )


def _read_square(ids: npt.NDArray[Any], store: Store) -> npt.NDArray[np.uint8]:
    return np.stack([np.asarray(store.square(id)[...]) for id in ids])


@xr.register_dataset_accessor("photographs")
class Photographs:
    """`ds.photographs[id]`: a photograph of the store that `ds` was opened from, at full resolution."""

    def __init__(self, dataset: xr.Dataset) -> None:
        if "store" not in dataset.attrs:
            raise ValueError("this dataset does not name a store; open it with tilestream.open_dataset")
        self._path = dataset.attrs["store"]

    def __getitem__(self, id: str) -> xr.DataArray:
        """`open(id)`."""
        return self.open(id)

    def open(self, id: str, level: int = 0) -> xr.DataArray:
        """Level `level` of photograph `id`, lazily: (c, y, x) uint8 backed by Dask.

        Raises ValueError for an unknown id or level.
        """
        group = Store(self._path).group(str(id), level)
        image: xr.DataArray = xr.open_zarr(group, consolidated=True)["image"]
        return image
