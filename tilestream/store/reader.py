"""Reading a store: its samples as a table, its images as Zarr arrays. Nothing is read before it is asked for."""

import difflib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from tilestream.store import layout
from tilestream.store.files import Files, Location, is_url
from tilestream.store.labels import FACTS, table_bytes

_STAMP = b"tilestream_commits"
_COLUMNS = {
    "id": "str",
    "label": "Int64",
    "patient": "str",
    "eye": "string",
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

    def __init__(self, path: Location) -> None:
        self.files: Files = layout.open_store(path)

    @property
    def path(self) -> Path | str:
        """Its folder, or its URL."""
        where = self.files.location
        return where if is_url(where) else Path(where)

    @property
    def ids(self) -> list[str]:
        """The ids of all committed photographs, sorted."""
        return sorted(layout.decode_id(name.removesuffix(".json")) for name in self._records("commits"))

    def samples(self) -> pd.DataFrame:
        """One row a committed photograph, by id: id, label (Int64, NA if unknown), patient (the id if unknown), eye
        (left, right or NA), height, width, source_sha256, low and high (extremes over all channels), megapixels, bytes,
        and what else the labels have.

        Kept in samples.parquet, which is rebuilt when commits or labels have changed since.
        """
        stamp = self._stamp()
        try:
            table = pq.read_table(io.BytesIO(self.files.read("samples.parquet")))
            if (table.schema.metadata or {}).get(_STAMP) == stamp:
                return _typed(table.to_pandas())
        except (OSError, ValueError, pa.ArrowException):  # absent, or damaged: it is made of the others anyway
            pass
        samples = self._join()
        if self.files.writable():  # a store on a read-only medium is joined anew each time
            table = pa.Table.from_pandas(samples, preserve_index=False)
            table = table.replace_schema_metadata({**table.schema.metadata, _STAMP: stamp})
            self.files.write("samples.parquet", table_bytes(table))
        return samples

    def commit(self, id: str) -> dict[str, Any]:
        """The facts that photograph `id` was committed with. Raises ValueError for an unknown id."""
        try:
            facts = layout.read_commit(self.files, layout.commit_name(id))
        except FileNotFoundError:
            near = difflib.get_close_matches(id, self.ids, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"id={id!r} is not in the store {self.files.location!r}{hint}") from None
        return facts

    def group(self, id: str, level: int = 0) -> Any:
        """The Zarr group that holds level `level` of photograph `id` as its array `image`, as zarr-python takes it."""
        facts = self.commit(id)
        if not 0 <= level < len(facts["levels"]):
            raise ValueError(f"level={level} of id={id!r} must be in [0, {len(facts['levels'])})")
        return self._zarr(facts, f"s{level}")

    def image(self, id: str, level: int = 0) -> zarr.Array[Any]:
        """Level `level` of photograph `id`, (3, height, width) uint8, read as it is sliced."""
        self.group(id, level)
        return self._array(self.commit(id), f"s{level}/image")

    def square(self, id: str) -> zarr.Array[Any]:
        """The whole frame of photograph `id` squashed to (3, 1024, 1024) uint8."""
        return self._array(self.commit(id), "train1024/image")

    def mask(self, id: str, lesion: str, level: int = 0) -> zarr.Array[Any]:
        """The mask of a lesion in photograph `id`, (1, height, width) uint8, 1 where it is. Raises ValueError."""
        facts = self.commit(id)
        if lesion not in facts.get("masks", ()):
            known = ", ".join(facts.get("masks", ())) or "none"
            raise ValueError(f"mask={lesion!r} of id={id!r} is not in the store; it has {known}")
        return self._array(facts, f"labels/{lesion}/s{level}/image")

    def levels(self, id: str) -> list[tuple[int, int, int]]:
        """The shape (3, height, width) of every level, the photograph itself first."""
        return [(3, height, width) for height, width in self.commit(id)["levels"]]

    def quarantined(self) -> pd.DataFrame:
        """What could not be ingested: id, path (in its folder), sha256 (None if unread), reason (a code), message."""
        columns = ["id", "path", "sha256", "reason", "message"]
        records = [json.loads(self.files.read(f"quarantine/{name}")) for name in self._records("quarantine")]
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

    def _zarr(self, facts: dict[str, Any], name: str) -> Any:
        return self.files.zarr(f"{layout.attempt_name(facts['id'], facts['attempt'])}/{name}")

    def _array(self, facts: dict[str, Any], name: str) -> zarr.Array[Any]:
        if facts.get("codec") == "jpegxl":
            from tilestream.store import jpegxl  # noqa: F401  (its absence is told in one line)
        return zarr.open_array(self._zarr(facts, name), mode="r")

    def _records(self, folder: str) -> list[str]:
        """The records of commits/ or quarantine/."""
        return [entry.name for entry in self.files.entries(folder) if entry.name.endswith(".json")]

    def _stamp(self) -> bytes:
        """Hash of the list of commits (name, size, version) and of the labels' bytes."""
        digest = hashlib.sha256()
        for entry in sorted(self.files.entries("commits"), key=lambda entry: entry.name):
            digest.update(f"{entry.name}\0{entry.bytes}\0{entry.stamp}\n".encode())
        digest.update(self._labels() or b"")
        return digest.hexdigest().encode()

    def labels(self) -> pd.DataFrame:
        """What `write_labels` wrote: id, label, patient, eye and others; empty where nobody did."""
        stored = self._labels()
        return pd.DataFrame({"id": [], "label": [], "patient": []}) if stored is None else _table(stored)

    def _labels(self) -> bytes | None:
        try:
            return self.files.read("labels.parquet")
        except FileNotFoundError:
            return None

    def _join(self) -> pd.DataFrame:
        rows = [_row(layout.read_commit(self.files, f"commits/{name}")) for name in self._records("commits")]
        samples = pd.DataFrame(rows, columns=["id", *FACTS])
        labels = self.labels()
        joined = samples.astype({"id": str}).merge(labels.astype({"id": str}), on="id", how="left", validate="1:1")
        joined["patient"] = joined["patient"].where(joined["patient"].notna(), joined["id"])
        return _typed(joined.sort_values("id", ignore_index=True))


def _table(stored: bytes) -> pd.DataFrame:
    table: pd.DataFrame = pq.read_table(io.BytesIO(stored)).to_pandas()
    return table


def _row(facts: dict[str, Any]) -> dict[str, Any]:
    row = {name: facts[name] for name in ("id", "height", "width", "source_sha256", "bytes")}
    megapixels = facts["height"] * facts["width"] / 1e6
    return {**row, "low": min(facts["low"]), "high": max(facts["high"]), "megapixels": megapixels}


def _typed(samples: pd.DataFrame) -> pd.DataFrame:
    others = [name for name in samples.columns if name not in _COLUMNS]
    return samples.reindex(columns=[*_COLUMNS, *others]).astype(_COLUMNS)
