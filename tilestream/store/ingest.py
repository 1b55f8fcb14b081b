"""Take one photograph into the store: written beside all others, then committed by one exclusive file."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from tilestream.store import decode, layout
from tilestream.store.pyramid import Pixels, write_attempt
from tilestream.store.sources import Source

_PROBLEMS = {
    "missing_file": "no such file in the folder",
    "outside_root": "the name leads out of the folder",
    "ambiguous_name": "several files of this name, with different endings; give the ending in the labels",
}


def ingest_photograph(store_path: str | os.PathLike[str], source: Source) -> dict[str, Any]:
    """Ingest one photograph: committed, skipped (the same bytes are committed already) or quarantined.

    Returns {"id", "status": "committed" | "skipped" | "quarantined", "reason", "megapixels", "bytes"}: reason is the
    quarantine's code or None, megapixels and bytes (in the store) are 0 for what was quarantined. A bad photograph
    never raises; a store that is none, or cannot be written (a full disk), does. Idempotent, safe beside other writers
    of the same store and of the same photograph.
    """
    store = layout.check_store(store_path)
    digest: str | None = None
    try:
        if source.problem:
            raise decode.Unusable(source.problem, _PROBLEMS.get(source.problem, source.problem))
        commit = _check_id(store, source.id)
        data = decode.read_regular(source.path)
        digest = hashlib.sha256(data).hexdigest()
        status = "skipped"
        if not commit.exists():
            facts = _write(store, source, decode.decode(data), digest)
            status = "committed" if _commit(store, commit, facts) else "skipped"
        facts = json.loads(commit.read_text())
        if facts["source_sha256"] != digest:
            raise decode.Unusable("conflicting_source", "other bytes are committed under this id already")
    except decode.Unusable as problem:
        record = {"id": source.id, "path": source.name, "sha256": digest, "reason": problem.reason}
        layout.replace_json(layout.quarantine_path(store, source.id), {**record, "message": str(problem)})
        return _result(source.id, "quarantined", problem.reason, 0, 0)
    layout.quarantine_path(store, source.id).unlink(missing_ok=True)
    return _result(source.id, status, None, facts["height"] * facts["width"], facts["bytes"])


def _result(id: str, status: str, reason: str | None, pixels: int, size_bytes: int) -> dict[str, Any]:
    return {"id": id, "status": status, "reason": reason, "megapixels": pixels / 1e6, "bytes": size_bytes}


def _check_id(store: Path, id: str) -> Path:
    """Where the photograph's commit goes. An id that fits no table (UTF-8) or no file name is a bad name."""
    try:
        id.encode()
        return layout.commit_path(store, id)
    except ValueError as error:  # UnicodeEncodeError is one
        raise decode.Unusable("bad_name", str(error)) from None


def _write(store: Path, source: Source, pixels: Pixels, digest: str) -> dict[str, Any]:
    """Write an attempt, durably; the facts to commit it with. What was written is removed if this fails."""
    attempt = uuid.uuid4().hex
    parent = store / "images" / layout.encode_id(source.id)
    folder = parent / attempt
    try:
        levels = write_attempt(folder, pixels, source.id)
        files, size_bytes = layout.sync_tree(folder)
        layout.sync(parent)
        layout.sync(parent.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    height, width = pixels.shape[:2]
    planes = pixels.transpose(2, 0, 1)
    return {
        "format": layout.FORMAT,
        "id": source.id,
        "attempt": attempt,
        "source_name": source.name or Path(source.path).name,
        "source_sha256": digest,
        "height": height,
        "width": width,
        "low": [int(plane.min()) for plane in planes],
        "high": [int(plane.max()) for plane in planes],
        "levels": levels,
        "bytes": size_bytes,
        "files": files,
    }


def _commit(store: Path, commit: Path, facts: dict[str, Any]) -> bool:
    """Commit the attempt unless another one is committed; then this one goes."""
    won = layout.create_json(commit, facts)
    if not won:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(store / "images" / layout.encode_id(facts["id"]) / facts["attempt"])
    return won
