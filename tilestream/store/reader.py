"""Reading a store: its samples as a table, its images as Zarr arrays. Nothing is read before it is asked for."""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from tilestream.store import layout
from tilestream.store.labels import write_table

_STAMP = b"tilestream_commits"
_COLUMNS = {
    "id": "str",
    "label": "Int64",
    "patient": "str",
    "height": "int64",
    "width": "int64",
    "source_sha256": "str",
    "low": "int64",
    "high": "int64",
    "megapixels": "float64",
    "bytes": "int64",
}


class Store:
    """A data set of photographs. Cheap to make and to pickle: every answer comes from the files, of now.

    Raises FileNotFoundError or ValueError when `path` is no store.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = layout.check_store(path)

    @property
    def ids(self) -> list[str]:
        """The ids of all committed photographs, sorted."""
        return sorted(layout.decode_id(entry.name.removesuffix(".json")) for entry in _records(self.path / "commits"))

    def samples(self) -> pd.DataFrame:
        """One row a committed photograph, by id: id, label (Int64, NA if unknown), patient (the id if unknown),
        height, width, source_sha256, low and high (extremes over all channels), megapixels, bytes.

        Kept in samples.parquet, which is rebuilt when commits or labels have changed since.
        """
        stamp, cached = self._stamp(), self.path / "samples.parquet"
        if cached.exists():
            table = pq.read_table(cached)
            if (table.schema.metadata or {}).get(_STAMP) == stamp:
                return _typed(table.to_pandas())
        samples = self._join()
        if os.access(self.path, os.W_OK):  # a store on a read-only medium is joined anew each time
            table = pa.Table.from_pandas(samples, preserve_index=False)
            write_table(cached, table.replace_schema_metadata({**table.schema.metadata, _STAMP: stamp}))
        return samples

    def commit(self, id: str) -> dict[str, Any]:
        """The facts that photograph `id` was committed with. Raises ValueError for an unknown id."""
        try:
            facts: dict[str, Any] = json.loads(layout.commit_path(self.path, id).read_text())
        except FileNotFoundError:
            near = difflib.get_close_matches(id, self.ids, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"id={id!r} is not in the store {str(self.path)!r}{hint}") from None
        return facts

    def group(self, id: str, level: int = 0) -> Path:
        """The Zarr group that holds level `level` of photograph `id` as its array `image`."""
        facts = self.commit(id)
        if not 0 <= level < len(facts["levels"]):
            raise ValueError(f"level={level} of id={id!r} must be in [0, {len(facts['levels'])})")
        return self._attempt(facts) / f"s{level}"

    def image(self, id: str, level: int = 0) -> zarr.Array[Any]:
        """Level `level` of photograph `id`, (3, height, width) uint8, read as it is sliced."""
        return zarr.open_array(self.group(id, level) / "image", mode="r")

    def square(self, id: str) -> zarr.Array[Any]:
        """The whole frame of photograph `id` squashed to (3, 1024, 1024) uint8."""
        return zarr.open_array(self._attempt(self.commit(id)) / "train1024" / "image", mode="r")

    def levels(self, id: str) -> list[tuple[int, int, int]]:
        """The shape (3, height, width) of every level, the photograph itself first."""
        return [(3, height, width) for height, width in self.commit(id)["levels"]]

    def quarantined(self) -> pd.DataFrame:
        """What could not be ingested: id, path (in its folder), sha256 (None if unread), reason (a code), message."""
        columns = ["id", "path", "sha256", "reason", "message"]
        records = [json.loads(Path(entry).read_text()) for entry in _records(self.path / "quarantine")]
        return pd.DataFrame(records, columns=columns, dtype=object).sort_values("id", ignore_index=True)

    def info(self) -> dict[str, Any]:
        """What the store holds, fit for JSON: images, quarantined, megapixels, bytes; counts by label, size, reason."""
        samples, refused = self.samples(), self.quarantined()
        sizes = samples["height"].astype(str) + "x" + samples["width"].astype(str)
        return {
            "images": len(samples),
            "quarantined": len(refused),
            "megapixels": round(float(samples["megapixels"].sum()), 6),
            "bytes": int(samples["bytes"].sum()),
            "patients": int(samples["patient"].nunique()),
            "labels": {str(label): int(count) for label, count in samples["label"].value_counts().sort_index().items()},
            "unlabelled": int(samples["label"].isna().sum()),
            "sizes": {str(size): int(count) for size, count in sizes.value_counts().items()},
            "reasons": {str(reason): int(count) for reason, count in refused["reason"].value_counts().items()},
        }

    def _attempt(self, facts: dict[str, Any]) -> Path:
        return self.path / "images" / layout.encode_id(facts["id"]) / str(facts["attempt"])

    def _stamp(self) -> bytes:
        """Hash of the list of commits (name, size, time) and of the labels' bytes."""
        digest = hashlib.sha256()
        for entry in sorted(_records(self.path / "commits"), key=lambda entry: entry.name):
            facts = entry.stat()
            digest.update(f"{entry.name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
        labels = self.path / "labels.parquet"
        digest.update(labels.read_bytes() if labels.exists() else b"")
        return digest.hexdigest().encode()

    def _join(self) -> pd.DataFrame:
        rows = [_row(json.loads(Path(entry).read_text())) for entry in _records(self.path / "commits")]
        samples = pd.DataFrame(rows, columns=[name for name in _COLUMNS if name not in ("label", "patient")])
        labels = pd.DataFrame({"id": [], "label": [], "patient": []})
        if (self.path / "labels.parquet").exists():
            labels = pq.read_table(self.path / "labels.parquet").to_pandas()
        joined = samples.astype({"id": str}).merge(labels.astype({"id": str}), on="id", how="left", validate="1:1")
        joined["patient"] = joined["patient"].where(joined["patient"].notna(), joined["id"])
        return _typed(joined.sort_values("id", ignore_index=True))


def _records(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The records of commits/ or quarantine/; temporary names are none."""
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if entry.name.endswith(".json"))


def _row(facts: dict[str, Any]) -> dict[str, Any]:
    row = {name: facts[name] for name in ("id", "height", "width", "source_sha256", "bytes")}
    megapixels = facts["height"] * facts["width"] / 1e6
    return {**row, "low": min(facts["low"]), "high": max(facts["high"]), "megapixels": megapixels}


def _typed(samples: pd.DataFrame) -> pd.DataFrame:
    return samples[list(_COLUMNS)].astype(_COLUMNS)
