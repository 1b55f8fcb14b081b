"""Where things lie in a store."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from tilestream.store.files import Files, Location, files_at, is_temporary, is_url

FORMAT = 1
MAX_NAME_BYTES = 200  # of a percent-encoded id: file systems stop at 255, and ".json" and temporary names need room


def encode_id(id: str) -> str:
    """The id as one file name: percent-encoded, a leading dot too (an id ".." must not climb).

    Raises ValueError when the name would be longer than a file system takes.
    """
    name = quote(id, safe="", errors="surrogatepass")
    name = name.replace(".", "%2E", 1) if name.startswith(".") else name
    if not name or len(name) > MAX_NAME_BYTES:
        raise ValueError(f"id={id!r} percent-encodes to {len(name)} bytes; it must be 1 to {MAX_NAME_BYTES}")
    return name


def decode_id(name: str) -> str:
    """The id that `encode_id` made this file name from."""
    return unquote(name, errors="surrogatepass")


def commit_name(id: str) -> str:
    """commits/<id>.json: its existence is what makes a photograph part of the data set."""
    return f"commits/{encode_id(id)}.json"


def quarantine_name(id: str) -> str:
    """quarantine/<id>.json; an id too long for a file name is kept under its hash, for no input is lost silently."""
    try:
        name = encode_id(id)
    except ValueError:
        name = hashlib.sha256(id.encode(errors="surrogatepass")).hexdigest()
    return f"quarantine/{name}.json"


def attempt_name(id: str, attempt: str) -> str:
    """images/<id>/<attempt>: a photograph's arrays."""
    return f"images/{encode_id(id)}/{attempt}"


def create_store(location: Location) -> Path | str:
    """Make an empty store (a Zarr v3 group) at a path or URL and return that; a store that is there already is kept.

    Raises ValueError when something else is there: a file, or a folder with other things in it.
    """
    place = os.fspath(location) if is_url(location) else Path(location)
    files = files_at(place)
    if isinstance(place, Path):
        if not (place / "zarr.json").exists():
            _make_folders(place)
    elif not _is_group(files) and _is_used(files):
        raise ValueError(f"path={place!r} is not a store and not empty; give a new URL")
    if not _is_group(files):
        attributes = {"tilestream": {"store": FORMAT}, "ome": {"version": "0.5", "bioformats2raw.layout": 3}}
        files.write("zarr.json", to_json({"zarr_format": 3, "node_type": "group", "attributes": attributes}))
    open_store(place)
    return place


def _make_folders(root: Path) -> None:
    with contextlib.suppress(FileExistsError):
        root.mkdir(parents=True)
    ours = {"images", "commits", "quarantine", "leases", "OME"}  # a half-made store is completed
    if not root.is_dir() or any(entry.name not in ours and not is_temporary(entry.name) for entry in root.iterdir()):
        raise ValueError(f"path={str(root)!r} is not a store and not an empty folder; give a new path")
    for folder in ours:
        (root / folder).mkdir(exist_ok=True)


def _is_used(files: Files) -> bool:
    try:
        return bool(files.folders("") or files.entries(""))
    except Exception as error:  # an object store's own, which tells all that it tried
        why = " ".join(str(error).split()).partition("Debug source")[0][:300]
        raise ConnectionError(f"{files.location} cannot be listed; check bucket, keys and endpoint: {why}") from None


def _is_group(files: Files) -> bool:
    try:
        files.read("zarr.json")
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def open_store(location: Location) -> Files:
    """The files of a store; FileNotFoundError or ValueError when no store of this format lies there."""
    files = files_at(location)
    if not is_url(location) and not Path(location).exists():
        raise FileNotFoundError(f"path={files.location!r} does not exist; make a store with `tilestream ingest`")
    try:
        found = json.loads(files.read("zarr.json"))["attributes"]["tilestream"]["store"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"path={files.location!r} is not a tilestream store (no zarr.json that says so)") from None
    if found != FORMAT:
        raise ValueError(f"path={files.location!r} has store format {found!r}; this version reads format {FORMAT}")
    return files


def read_commit(files: Files, name: str) -> dict[str, Any]:
    """The facts of a commit. Raises FileNotFoundError, and ValueError for one that is not as it was written."""
    data = files.read(name)
    try:
        facts = json.loads(data)
        whole = facts["seal"] == seal(facts)
    except (ValueError, LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{files.location}: {name} is damaged; 'tilestream verify' lists what else is")
    return dict(facts)


def seal(facts: dict[str, Any]) -> str:
    """SHA-256 of a commit's facts, which the commit carries as `seal`."""
    rest = {name: value for name, value in facts.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
