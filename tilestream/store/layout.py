"""Where things lie in a store, and how files are written so that a kill leaves the old one or the new one."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

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


def commit_path(store: Path, id: str) -> Path:
    """commits/<id>.json: its existence is what makes a photograph part of the data set."""
    return store / "commits" / f"{encode_id(id)}.json"


def quarantine_path(store: Path, id: str) -> Path:
    """quarantine/<id>.json; an id too long for a file name is kept under its hash, for no input is lost silently."""
    try:
        name = encode_id(id)
    except ValueError:
        name = hashlib.sha256(id.encode(errors="surrogatepass")).hexdigest()
    return store / "quarantine" / f"{name}.json"


def create_store(path: str | os.PathLike[str]) -> Path:
    """Make an empty store at `path` (a Zarr v3 group) and return its path; a store that is there already is kept.

    Raises ValueError when `path` is something else: a file, or a folder with other things in it.
    """
    root = Path(path)
    if (root / "zarr.json").exists():
        return check_store(root)
    with contextlib.suppress(FileExistsError):
        root.mkdir(parents=True)
    ours = {"images", "commits", "quarantine"}  # a half-made store is completed
    if not root.is_dir() or any(entry.name not in ours and not is_temporary(entry.name) for entry in root.iterdir()):
        raise ValueError(f"path={str(root)!r} is not a store and not an empty folder; give a new path")
    for folder in ours:
        (root / folder).mkdir(exist_ok=True)
    attributes = {"tilestream": {"store": FORMAT}}
    replace_json(root / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})
    return root


def check_store(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path; FileNotFoundError or ValueError when no store of this format lies there."""
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"path={str(root)!r} does not exist; make a store with `tilestream ingest`")
    try:
        found = json.loads((root / "zarr.json").read_text())["attributes"]["tilestream"]["store"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"path={str(root)!r} is not a tilestream store (no zarr.json that says so)") from None
    if found != FORMAT:
        raise ValueError(f"path={str(root)!r} has store format {found!r}; this version reads format {FORMAT}")
    return root


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a write that never finished."""
    return name.startswith(".") and name.endswith(".tmp")


@contextlib.contextmanager
def temporary(final: Path) -> Iterator[Path]:
    """A fresh name beside `final`, removed at the end if it is still there."""
    path = final.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` at `path` whole: temporary name, fsync, rename."""
    with temporary(path) as written:
        written.write_text(json.dumps(value, indent=1) + "\n")
        sync(written)
        os.replace(written, path)
    sync(path.parent)


def create_json(path: Path, value: dict[str, Any]) -> bool:
    """Write `value` at `path` whole unless something is there; whether this call was the one that wrote it."""
    with temporary(path) as written:
        written.write_text(json.dumps(value, indent=1) + "\n")
        sync(written)
        try:
            os.link(written, path)  # unlike a rename, a link never replaces
        except FileExistsError:
            return False
    sync(path.parent)
    return True


def sync_tree(folder: Path) -> tuple[dict[str, str], int]:
    """Put every file and folder under `folder` on disk; SHA-256 by relative path, and the bytes of all files."""
    hashes, size_bytes = {}, 0
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
                size_bytes += os.fstat(file.fileno()).st_size
                os.fsync(file.fileno())
        sync(Path(parent))
    return dict(sorted(hashes.items())), size_bytes
