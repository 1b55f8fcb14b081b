"""Where a store's files lie: a folder, or a bucket by URL. A kill leaves a file as it was, or whole.

`Files` is all that the store asks of a place. Names are relative, with slashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Location = str | os.PathLike[str]


@dataclass(frozen=True)
class Entry:
    """A file in a folder: its name there, bytes, when it was written (s since 1970), what changes when it is again."""

    name: str
    bytes: int
    modified: float
    stamp: str


class Writer:
    """A new file, written from the front; `sha256` and `bytes` tell of what was written."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def close(self) -> None:
        """The file is whole, and on disk."""
        if hasattr(self._file, "fileno"):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class Files(Protocol):
    """Files by relative name."""

    @property
    def location(self) -> str: ...

    def read(self, name: str) -> bytes:
        """A file's bytes; FileNotFoundError."""

    def write(self, name: str, data: bytes) -> None:
        """Writes a file whole, over the one that was there."""

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file whole unless one is there; whether this call was the one that wrote it."""

    def writer(self, name: str) -> Writer:
        """Starts a new file in a folder that is this caller's alone."""

    def entries(self, folder: str) -> list[Entry]:
        """The files in a folder, those of writes that never finished left out; none where there is no folder."""

    def folders(self, folder: str) -> list[str]:
        """The names of the folders in a folder."""

    def tree(self, folder: str) -> list[Entry]:
        """All files below a folder, by name from there."""

    def settle(self, folder: str) -> None:
        """Puts the folder's names, those below and its own on disk."""

    def remove(self, name: str) -> None:
        """Removes a file or a folder with all that is in it, if it is there."""

    def leftovers(self) -> list[Entry]:
        """What writes that never finished have left."""

    def zarr(self, name: str) -> Any:
        """A group or an array of this name, as zarr-python takes it."""

    def writable(self) -> bool: ...


def files_at(location: Location) -> Files:
    """The files at a path, or at a URL like s3://bucket/prefix (which takes the extra `s3`)."""
    text = os.fspath(location)
    return Bucket(text) if is_url(text) else Folder(Path(text))


def is_url(location: Location) -> bool:
    return "://" in os.fspath(location)


class Folder:
    """Files on a file system; every write waits until it is on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def location(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        final = self.path / name
        with temporary(final) as written:
            _write_synced(written, data)
            os.replace(written, final)
        sync(final.parent)

    def create(self, name: str, data: bytes) -> bool:
        final = self.path / name
        with temporary(final) as written:
            _write_synced(written, data)
            try:
                os.link(written, final)  # unlike a rename, a link never replaces
            except FileExistsError:
                return False
        sync(final.parent)
        return True

    def writer(self, name: str) -> Writer:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return Writer(path.open("xb"))

    def entries(self, folder: str) -> list[Entry]:
        try:
            with os.scandir(self.path / folder) as found:
                return [_entry(e.name, e) for e in found if e.is_file() and not is_temporary(e.name)]
        except FileNotFoundError:
            return []

    def folders(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.path / folder) as found:
                return [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    def tree(self, folder: str) -> list[Entry]:
        root = self.path / folder
        return [_entry(path.relative_to(root).as_posix(), path) for path in root.rglob("*") if path.is_file()]

    def settle(self, folder: str) -> None:
        for below, _, _ in os.walk(self.path / folder, topdown=False):
            sync(Path(below))
        for parent in (self.path / folder).parents[: len(Path(folder).parts) - 1]:
            sync(parent)

    def remove(self, name: str) -> None:
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def leftovers(self) -> list[Entry]:
        folders = ("", "commits", "quarantine", "leases", "OME")
        found = (path for folder in folders if (self.path / folder).is_dir() for path in (self.path / folder).iterdir())
        return [_entry(path.relative_to(self.path).as_posix(), path) for path in found if is_temporary(path.name)]

    def zarr(self, name: str) -> Any:
        return self.path / name

    def writable(self) -> bool:
        return os.access(self.path, os.W_OK)


class Bucket:
    """Files in an object store: a PUT is whole or not at all, and creates by condition."""

    def __init__(self, url: str) -> None:
        try:
            from obstore.store import from_url
        except ImportError:
            raise ValueError(f"{url}: stores by URL need the extra s3; pip install 'tilestream[s3]'") from None
        self.url = url.rstrip("/")
        self.store = from_url(self.url)

    def __reduce__(self) -> Any:
        return Bucket, (self.url,)

    @property
    def location(self) -> str:
        return self.url

    def read(self, name: str) -> bytes:
        return bytes(self.store.get(name).bytes())

    def write(self, name: str, data: bytes) -> None:
        self.store.put(name, data)

    def create(self, name: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            self.store.put(name, data, mode="create", use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
        return True

    def writer(self, name: str) -> Writer:
        import obstore

        return Writer(obstore.open_writer(self.store, name))

    def entries(self, folder: str) -> list[Entry]:
        found = self.store.list_with_delimiter(f"{folder}/" if folder else None)["objects"]
        return [_object(folder, each) for each in found]

    def folders(self, folder: str) -> list[str]:
        found = self.store.list_with_delimiter(f"{folder}/" if folder else None)["common_prefixes"]
        return [prefix.rstrip("/").rpartition("/")[2] for prefix in found]

    def tree(self, folder: str) -> list[Entry]:
        return [_object(folder, each) for batch in self.store.list(f"{folder}/") for each in batch]

    def settle(self, folder: str) -> None:
        pass

    def remove(self, name: str) -> None:
        below = [f"{name}/{entry.name}" for entry in self.tree(name)]
        for each in below or [name]:
            with contextlib.suppress(FileNotFoundError):
                self.store.delete(each)

    def leftovers(self) -> list[Entry]:
        return []

    def zarr(self, name: str) -> Any:
        from zarr.storage import ObjectStore, StorePath

        return StorePath(ObjectStore(self.store, read_only=True), name)

    def writable(self) -> bool:
        return True


def _entry(name: str, found: Any) -> Entry:
    facts = found.stat()
    return Entry(name, facts.st_size, facts.st_mtime, str(facts.st_mtime_ns))


def _object(folder: str, found: Any) -> Entry:
    name = found["path"][len(folder) + 1 if folder else 0 :]
    written = found["last_modified"]
    return Entry(name, found["size"], written.timestamp(), str(found["e_tag"] or written))


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a write that never finished."""
    return name.startswith(".") and name.endswith(".tmp")


@contextlib.contextmanager
def temporary(final: Path) -> Iterator[Path]:
    """A fresh name beside `final`, removed at the end if it is still there."""
    path = final.parent / f".{uuid.uuid4().hex}.tmp"
    path.parent.mkdir(exist_ok=True)
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


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
