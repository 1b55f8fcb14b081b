"""Is all that was committed still there, bit for bit? And what lies there that nobody committed?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import dataclass

import numpy as np
import zarr

from tilestream.store import layout
from tilestream.store.files import Files, Location
from tilestream.store.ingest import series


@dataclass(frozen=True)
class Damage:
    """A file of the store that is not what was committed: `what` is "missing", "damaged", or "commit"."""

    id: str
    file: str
    what: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.id}: {self.file} is {self.what}" + (f" ({self.detail})" if self.detail else "")


def verify_photograph(store: Location, id: str) -> list[Damage]:
    """Compares every file of a photograph with the hash that it was committed with; names the chunks that are hit."""
    files, name = layout.open_store(store), layout.commit_name(id)
    try:
        facts = layout.read_commit(files, name)
    except (ValueError, FileNotFoundError):
        return [Damage(id, name, "damaged", "ingest the photograph into a new store")]
    folder, found = layout.attempt_name(id, facts["attempt"]), []
    for part, want in facts["files"].items():
        try:
            data = files.read(f"{folder}/{part}")
        except FileNotFoundError:
            found.append(Damage(id, f"{folder}/{part}", "missing", "" if "/c/" in part else "metadata"))
            continue
        if hashlib.sha256(data).hexdigest() != want:
            detail = _bad_chunks(files, folder, part) if "/c/" in part else "metadata"
            found.append(Damage(id, f"{folder}/{part}", "damaged", detail))
    return found


def _bad_chunks(files: Files, folder: str, part: str) -> str:
    """Which chunks of a shard cannot be read, (row, column) each."""
    array, _, shard = part.partition("/c/")
    try:
        opened = zarr.open_array(files.zarr(f"{folder}/{array}"), mode="r")
        shards, chunks = opened.shards or opened.chunks, opened.chunks
        at = [int(i) * n for i, n in zip(shard.split("/"), shards, strict=True)]
        bad, count = [], 0
        for y in range(at[1], min(at[1] + shards[1], opened.shape[1]), chunks[1]):
            for x in range(at[2], min(at[2] + shards[2], opened.shape[2]), chunks[2]):
                count += 1
                try:
                    np.asarray(opened[:, y : y + chunks[1], x : x + chunks[2]])
                except Exception:  # codecs raise errors of many kinds
                    bad.append(f"({y // chunks[1]}, {x // chunks[2]})")
    except Exception:  # as do damaged metadata
        return "its array's metadata are damaged, too"
    return f"chunks {', '.join(bad[:8])}{' ...' * (len(bad) > 8)} of {count}" if bad else "between the chunks"


def verify_tables(store: Location) -> list[Damage]:
    """Whether the store's labels, its list of images and the records of its quarantine are as they were written."""
    from tilestream.store.reader import Store

    files, found = layout.open_store(store), []
    with contextlib.suppress(FileNotFoundError):  # nobody gave labels
        try:
            want = json.loads(files.read("labels.json"))["sha256"]
        except (ValueError, LookupError, TypeError):
            want = None
            found.append(Damage("(all)", "labels.json", "damaged", "ingest --labels again"))
        try:
            if want and hashlib.sha256(files.read("labels.parquet")).hexdigest() != want:
                found.append(Damage("(all)", "labels.parquet", "damaged", "ingest --labels again"))
        except FileNotFoundError:
            found.append(Damage("(all)", "labels.parquet", "missing", "ingest --labels again"))
    try:
        Store(store).quarantined()
    except ValueError as error:
        found.append(Damage("(all)", "quarantine", "damaged", " ".join(str(error).split())[:200]))
    for name in sorted(_listed(files) - {e.name.removesuffix(".json") for e in files.entries("commits")}):
        found.append(Damage(layout.decode_id(name), f"commits/{name}.json", "missing", "the photograph was listed"))
    with contextlib.suppress(ValueError):  # a damaged commit is told with its photograph
        for name, data in series(files).items():
            with contextlib.suppress(FileNotFoundError):  # an ingest that was killed has not written it
                if files.read(name) != data:
                    found.append(Damage("(all)", name, "damaged", "the next ingest writes it anew"))
    return found


def _listed(files: Files) -> set[str]:
    """The photographs that the list of images names, as encoded ids."""
    try:
        names = json.loads(files.read("OME/zarr.json"))["attributes"]["ome"]["series"]
        return {str(name).split("/")[1] for name in names}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


@dataclass(frozen=True)
class Garbage:
    """What `collect` found: `removed` names, and how many attempts were too young."""

    removed: list[str]
    bytes: int
    young: int


def collect(store: Location, older_s: float = 900) -> Garbage:
    """Removes attempts that were never committed and files that were never finished.

    An attempt whose newest file is younger than `older_s` seconds may still be written, by a worker that has lost its
    driver, and stays. Call it under a `lease`.
    """
    files = layout.open_store(store)
    removed, size, young = [], 0, 0
    listed = _listed(files)  # a commit that got lost is verify's to tell: its attempt stays
    for folder in files.folders("images"):
        try:
            kept = json.loads(files.read(f"commits/{folder}.json"))["attempt"]
        except (FileNotFoundError, ValueError, LookupError):  # a damaged commit is verify's to tell: its attempt stays
            lost = folder in listed or f"{folder}.json" in {e.name for e in files.entries("commits")}
            kept = None if lost else ""
        for attempt in files.folders(f"images/{folder}"):
            if kept is None or attempt == kept:
                continue
            tree = files.tree(f"images/{folder}/{attempt}")
            if any(time.time() - entry.modified < older_s for entry in tree):
                young += 1
                continue
            files.remove(f"images/{folder}/{attempt}")
            removed.append(f"images/{folder}/{attempt}")
            size += sum(entry.bytes for entry in tree)
        if not files.folders(f"images/{folder}"):
            files.remove(f"images/{folder}")
    for entry in files.leftovers():
        if time.time() - entry.modified >= older_s:
            files.remove(entry.name)
            removed.append(entry.name)
    return Garbage(removed, size, young)
