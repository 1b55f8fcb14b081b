"""Which photographs a folder holds, or which of those that a list of labels names."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

import pandas as pd

ENDINGS = (".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Source:
    """A photograph to be ingested.

    id: its name without a known file ending. path: where it lies now. problem: a reason code when it can be told
    without opening the file that it cannot be used. name: path relative to its folder, the only one that a store keeps.
    masks: the file of each lesion's mask, by the lesion's code ("MA"), of the photograph's size, 0 where it is not.
    """

    id: str
    path: str
    problem: str | None = None
    name: str = ""
    masks: dict[str, str] = field(default_factory=dict, hash=False)


def stored_id(name: str) -> str:
    """The id under which a photograph is stored: its name without a known ending (upper or lower case)."""
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def find_photographs(folder: str | os.PathLike[str], labels: pd.DataFrame | None = None) -> list[Source]:
    """The photographs in `folder`: one Source for each row of `labels`, or without labels for each photograph there.

    An id in `labels` is tried as it is, then with the known endings; it may name a file in a subfolder. A folder of
    that name hides no photograph. Without labels the folder is walked, subfolders too (the id is then `sub/name`),
    names with a leading dot left out. What cannot be used is told in `Source.problem`: missing_file, outside_root (a
    linked folder, too, when it lies elsewhere), ambiguous_name (several endings).
    Raises NotADirectoryError when there is no such folder, OSError when a part of it cannot be listed.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"folder={str(root)!r} is not a folder")
    real = os.path.realpath(root)
    if labels is None:
        files, links = walk(root)
        names = [name for name in files if stored_id(name) != name]
        away = [Source(f"{link}/", "", "outside_root", link) for link in links if not _inside(real, root / link)]
        return [_source(root, real, id, names) for id, names in sorted(_by_id(names).items())] + away

    @cache
    def listing(parent: Path) -> dict[str, list[str]]:
        try:
            return _by_id(os.listdir(parent))
        except PermissionError:
            raise
        except OSError:  # no such folder, a name that is too long: its photographs are missing
            return {}

    return [_named(root, real, id, listing) for id in labels["id"]]


def walk(root: Path) -> tuple[list[str], list[str]]:
    """The files below a folder, and links to folders (not followed); no names with a leading dot. Raises OSError."""

    def fail(error: OSError) -> None:  # os.walk would leave the folder out and say nothing
        raise error

    files, links = [], []
    for parent, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(parent).relative_to(root)
        files += [(below / name).as_posix() for name in names if not name.startswith(".")]
        links += [(below / name).as_posix() for name in folders if os.path.islink(os.path.join(parent, name))]
    return files, links


def _by_id(names: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(stored_id(name), []).append(name)
    return groups


def _named(root: Path, real: str, id: str, listing: Callable[[Path], dict[str, list[str]]]) -> Source:
    """The Source of a labels row. Nothing outside the root is looked at."""
    wanted = PurePosixPath(id)
    climbs = "\0" in id or wanted.is_absolute() or ".." in wanted.parts or not wanted.parts
    if climbs or not _inside(real, root / wanted.parent):
        return Source(stored_id(id), "", "outside_root", id)
    there = listing(root / wanted.parent)
    names = there.get(wanted.name, [])
    if len(names) > 1 and (root / wanted).is_dir():
        names = [name for name in names if name != wanted.name]
    elif wanted.name in there.get(stored_id(wanted.name), []):
        names = [wanted.name]
    return _source(root, real, stored_id(id), [(wanted.parent / name).as_posix() for name in names] or [id])


def _source(root: Path, real: str, id: str, names: list[str]) -> Source:
    """The Source of an id and the files that carry it, one unless something is wrong."""
    name = min(names)
    path = root / name
    problem = None
    if len(names) > 1:
        problem = "ambiguous_name"
    elif not _inside(real, path):
        problem = "outside_root"
    elif not os.path.exists(path):
        problem = "missing_file"
    return Source(id, str(path), problem, name)


def _inside(real: str, path: Path) -> bool:
    """Whether `path`, its symbolic links followed, lies in the folder `real` (which has none)."""
    return Path(os.path.realpath(path)).is_relative_to(real)
