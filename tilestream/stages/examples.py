"""Training examples, read from Zarr and normalised as they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import zarr

from tilestream.geometry import Region
from tilestream.methods import Extremes, Normalised, normalise_crop, normalise_square, resize_square
from tilestream.methods.preprocessing import Floats
from tilestream.store import Store


class Squares:
    """Whole photographs squashed to (3, size, size), normalised; `labels` (n,) int64."""

    def __init__(self, store: Store, ids: Sequence[str], labels: Sequence[int], average: Floats) -> None:
        self.store, self.ids, self.average = store, list(ids), average
        self.labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Floats:
        square = resize_square(np.asarray(self.store.square(self.ids[index])[:]), self.average.shape[-1])
        return normalise_square(square, self.average)


class Photographs:
    """Whole photographs at full resolution, (3, H, W), normalised window by window as they are read."""

    def __init__(
        self, store: Store, ids: Sequence[str], labels: Sequence[int], average: Floats, known: Mapping[str, Extremes]
    ) -> None:
        self.store, self.ids, self.average, self.known = store, list(ids), average, known
        self.labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Normalised:
        id = self.ids[index]
        return Normalised(self.store.image(id), self.average, self.known[id])


class Crops:
    """Crops of a crops folder, normalised as their photographs are; `table` is a part of its rows.

    Raises ValueError when the folder holds other crops than the table says: a kill came between the two.
    """

    def __init__(self, path: Path, table: pd.DataFrame, labels: Sequence[int], average: Floats) -> None:
        group = zarr.open_group(path, mode="r")
        there = zip(group.attrs["ids"], group["y0_px"][:], group["x0_px"][:], strict=True)  # type: ignore[arg-type,index]
        places = {position: place for position, place in enumerate(there)}
        if any(places.get(row.position) != (row.id, row.y0_px, row.x0_px) for row in table.itertuples()):
            raise ValueError(f"{path.name} is not what {path.stem}.parquet describes; run 'tilestream crops' again")
        self.crops = zarr.open_array(path / "image", mode="r")
        self.rows, self.average = list(table.itertuples()), average
        self.labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Floats:
        row = self.rows[index]
        size = self.crops.shape[-1]
        region = Region(int(row.y0_px), int(row.y0_px) + size, int(row.x0_px), int(row.x0_px) + size)
        extent = (int(row.height), int(row.width))
        raw = np.asarray(self.crops[int(row.position)])
        return normalise_crop(raw, region, extent, self.average, Extremes(row.low, row.high))
