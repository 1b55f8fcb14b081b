"""The data-set store: photographs as sharded OME-Zarr, each committed exclusively, with their labels in Parquet.

Written one photograph at a time by `ingest_photograph`, read by `Store` (Zarr arrays, pandas) and `open_dataset`
(xarray). Photographs that cannot be used are recorded in the store's quarantine, none is lost silently.
"""

from typing import TYPE_CHECKING, Any

from tilestream.store.ingest import ingest_photograph
from tilestream.store.labels import read_labels, write_labels
from tilestream.store.layout import create_store
from tilestream.store.reader import Store
from tilestream.store.sources import Source, find_photographs, stored_id

if TYPE_CHECKING:
    from tilestream.store.dataset import open_dataset

__all__ = [
    "Source",
    "Store",
    "create_store",
    "find_photographs",
    "ingest_photograph",
    "open_dataset",
    "read_labels",
    "stored_id",
    "write_labels",
]


def __getattr__(name: str) -> Any:
    """xarray and dask.array take over a second to import, so only `open_dataset` does it."""
    if name == "open_dataset":
        from tilestream.store.dataset import open_dataset

        return open_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
