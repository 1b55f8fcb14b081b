"""The data-set store: photographs as sharded OME-Zarr, each committed exclusively, with their labels in Parquet.

Written one photograph at a time by `ingest_photograph`, read by `Store` (Zarr arrays, pandas) and `open_dataset`
(xarray). Photographs that cannot be used are recorded in the store's quarantine, none is lost silently.
"""

from typing import TYPE_CHECKING, Any

from tilestream.store.child import Limits, ingest_guarded
from tilestream.store.files import is_url
from tilestream.store.ingest import Settings, ingest_photograph, write_series
from tilestream.store.labels import read_labels, write_labels
from tilestream.store.layout import create_store, open_store
from tilestream.store.lease import lease
from tilestream.store.pyramid import Format
from tilestream.store.reader import Store
from tilestream.store.sources import Source, find_photographs, stored_id
from tilestream.store.verify import Damage, collect, verify_photograph, verify_tables

if TYPE_CHECKING:
    from tilestream.store.dataset import open_dataset

__all__ = [
    "Damage",
    "Format",
    "Limits",
    "Settings",
    "Source",
    "Store",
    "collect",
    "create_store",
    "find_photographs",
    "ingest_guarded",
    "ingest_photograph",
    "is_url",
    "lease",
    "open_dataset",
    "open_store",
    "read_labels",
    "stored_id",
    "verify_photograph",
    "verify_tables",
    "write_labels",
    "write_series",
]


def __getattr__(name: str) -> Any:
    """xarray and dask.array take over a second to import, so only `open_dataset` does it."""
    if name == "open_dataset":
        from tilestream.store.dataset import open_dataset

        return open_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
