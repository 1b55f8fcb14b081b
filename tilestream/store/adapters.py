"""Adapters: data sets in the forms in which they are published, to photographs, labels, patients, eyes and masks."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import pandas as pd

from tilestream.store.labels import Columns, Sheet, labels_of, read_sheet, refuse_duplicates
from tilestream.store.sources import Source, find_photographs, stored_id, walk

Adapter = Literal["csv", "classes", "eyepacs", "aptos", "idrid", "idrid-segmentation", "messidor", "dr1", "dr2"]
USUAL = Columns()
LESIONS = ("MA", "HE", "EX", "SE", "OD")
"""IDRiD's masks: microaneurysms, haemorrhages, hard exudates, soft exudates, and the optic disc (no lesion)."""

_PLACES = ("images", "train", "train_images")  # folders of the published archives
_CSVS = ("labels.csv", "trainLabels.csv", "train.csv")


@dataclass(frozen=True)
class Collection:
    """A data set to be ingested.

    sources: the photographs. labels: id (file names, as `write_labels` takes them), label, patient, eye and what else
    the data set knows of a photograph; None where there are no labels.
    """

    sources: list[Source]
    labels: pd.DataFrame | None


@dataclass(frozen=True)
class _Form:
    """How a data set's sheet is laid out; `more` are columns of integers to keep, under their names in the store."""

    columns: Columns
    more: Mapping[str, str] = field(default_factory=dict)
    grades: int = 5


_IDRID = _Form(Columns("Image name", "Retinopathy grade"), {"Risk of macular edema": "dme_risk"})
_FORMS: dict[str, tuple[_Form, ...]] = {
    "csv": (_Form(Columns("image")),),
    "eyepacs": (_Form(Columns("image", "level")),),
    "aptos": (_Form(Columns("id_code", "diagnosis")),),
    "idrid": (_Form(Columns("image", "dr_grade"), {"dme_risk": "dme_risk"}), _IDRID),
    "messidor": (replace(_IDRID, grades=4),),
}


def read_collection(
    folder: str | os.PathLike[str],
    adapter: Adapter = "csv",
    labels: str | os.PathLike[str] | None = None,
    columns: Columns = USUAL,
) -> Collection:
    """The photographs in a folder with what the data set says of them.

    `csv` reads a sheet with the named `columns` (id: "image"), and without `labels` every photograph in the folder.
    `classes` (and dr1, dr2) takes one folder a class. The others are published data sets; their sheet is looked for in
    the folder when `labels` does not say where it is, and `columns` may name other columns than the usual ones.

    Problems of one photograph are told in its `Source.problem`: as in `find_photographs`, and missing_mask. Raises
    NotADirectoryError without a folder, FileNotFoundError without the sheet, ValueError when the data set is not of the
    adapter's form.
    """
    root, sheet = Path(folder), None if labels is None else Path(labels)
    if not root.is_dir():
        raise NotADirectoryError(f"folder={str(root)!r} is not a folder")
    if adapter not in get_args(Adapter):
        raise ValueError(f"adapter={adapter!r} is unknown; use one of {', '.join(get_args(Adapter))}")
    if adapter in ("classes", "dr1", "dr2"):
        if sheet or columns != USUAL:
            raise ValueError(f"adapter={adapter} takes labels from the names of folders; leave labels and columns out")
        found = _classes(root)
    elif adapter == "csv" and sheet is None:
        if columns != USUAL:
            raise ValueError("columns are named, but no labels are given; name their CSV by --labels")
        found = Collection(find_photographs(root), None)
    elif adapter == "messidor":
        found = _messidor(root, sheet, columns)
    elif adapter == "idrid-segmentation":
        found = _segmentation(root, sheet, columns)
    elif adapter == "idrid" and not sheet and (root / "grading").is_dir() and (root / "segmentation").is_dir():
        found = _both_of_idrid(root, columns)
    else:
        found = _tabular(adapter, root, read_sheet(sheet or _csv_in(root)), columns)
    if found.labels is not None:
        refuse_duplicates(found.labels["id"].map(stored_id))
    return found


def _tabular(adapter: str, root: Path, sheet: Sheet, given: Columns) -> Collection:
    """A folder of photographs and one sheet."""
    table = _read(adapter, sheet, given)
    if adapter == "eyepacs":
        sources = _find(root, table["id"])
        names = [_eyepacs_name(source) for source in sources]
        if not given.patient:
            table["patient"] = pd.Series([patient for patient, _ in names], dtype=str)
        if not given.eye:
            table["eye"] = pd.array([eye for _, eye in names], dtype="string")
        return Collection(sources, table)
    return Collection(_find(root, table["id"]), table)


def _read(adapter: str, sheet: Sheet, given: Columns) -> pd.DataFrame:
    forms = _FORMS[adapter]
    form = next((form for form in forms if form.columns.id in sheet.header), forms[0])
    columns = _merged(form.columns, given)
    usual = columns.label == form.columns.label and adapter != "csv"
    table = labels_of(sheet, columns, form.grades if usual else None)
    for column, name in form.more.items():
        if column in sheet.header:
            table[name] = pd.array(sheet.integers(column), dtype="Int64")
    return table


def _eyepacs_name(source: Source) -> tuple[str, str | None]:
    """Patient and eye of `10_left`; ValueError for other names, unless the row will be refused anyway."""
    match = re.fullmatch(r"([0-9]+)_(left|right)", PurePosixPath(source.id).name)
    if match:
        return match[1], match[2]
    if source.problem == "outside_root":
        return source.id, None
    raise ValueError(
        f"id={source.id!r} tells no patient and eye as EyePACS's names do (10_left, 10_right); name columns by "
        "--patient-column and --eye-column with --adapter csv"
    )


def _classes(root: Path) -> Collection:
    """One folder a class: label = the folder's name where all are integers, else its place among the sorted names."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"folder={str(root)!r} holds no folders; put the photographs of each class into one")
    sources = find_photographs(root)
    above = [PurePosixPath(source.name).parts[0] if "/" in source.name else None for source in sources]
    for name in names:
        if name not in above:
            raise ValueError(
                f"folder={str(root / name)!r} of a class holds no photographs; remove it (links to folders are not "
                "followed)"
            )
    numbered = all(re.fullmatch(r"[0-9]{1,18}", name) for name in names)
    label = {name: int(name) if numbered else place for place, name in enumerate(names)}
    rows = [
        (s.name, label.get(name or ""), s.name, name) for s, name in zip(sources, above, strict=True) if _is_text(s)
    ]
    table = pd.DataFrame(rows, columns=["id", "label", "patient", "class"], dtype=object)
    return Collection(sources, _typed(table))


def _is_text(source: Source) -> bool:
    """Whether the name is UTF-8, as tables are; others are quarantined as bad_name."""
    try:
        source.name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _messidor(root: Path, sheet: Path | None, given: Columns) -> Collection:
    """A spreadsheet a base, in the folder or that of the base; photographs in BaseXX, or beside the spreadsheet."""
    sheets = [sheet] if sheet else sorted(_annotations(root))
    if not sheets:
        raise ValueError(
            f"folder={str(root)!r} holds no Annotation_BaseXX.xls, .xlsx or .csv; put them there, or give --labels"
        )
    tables = []
    for path in sheets:
        table = _read("messidor", read_sheet(path), given)
        place = _base(root, path)
        named = table["patient"] != table["id"]
        table["id"] = [(place / id).as_posix() if id else id for id in table["id"]]
        table["patient"] = table["patient"].where(named, table["id"])
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    return Collection(_find(root, table["id"]), table)


def _annotations(root: Path) -> Iterator[Path]:
    """One spreadsheet a base, the CSV where there are several."""
    found: dict[str, list[Path]] = {}
    for name in walk(root)[0]:
        match = re.fullmatch(r"annotation[ _]*(base[0-9]+)\.(csv|xlsx?)", PurePosixPath(name).name, re.IGNORECASE)
        if match:
            found.setdefault(match[1].lower(), []).append(root / name)
    for paths in found.values():
        yield min(paths, key=lambda path: (path.suffix.lower() != ".csv", path.suffix.lower() != ".xlsx", path))


def _base(root: Path, sheet: Path) -> PurePosixPath:
    """The folder, below the root, of the photographs of a spreadsheet."""
    match = re.search(r"base[0-9]+", sheet.name, re.IGNORECASE)
    base = match[0] if match else "."
    for place in (sheet.parent / base, root / base, sheet.parent):
        if place.is_dir() and place.is_relative_to(root):
            return PurePosixPath(place.relative_to(root).as_posix())
    return PurePosixPath(".")


def _segmentation(root: Path, path: Path | None, given: Columns) -> Collection:
    """A CSV that names a mask a lesion; without one, masks by name: IDRiD_01_MA.tif belongs to IDRiD_01.jpg.

    A photograph that is also among the grading ones has that one as its patient: few such pairs are the same file.
    """
    if not path and not any(root.glob("*.csv")) and given == USUAL:
        return _masks_by_name(root)
    sheet = read_sheet(path or _csv_in(root))
    codes = [code for code in LESIONS if f"{code}_mask" in sheet.header]
    if not codes:
        raise ValueError(f"{sheet.path!r} names no masks; it needs a column {LESIONS[0]}_mask, or of another lesion")
    label, patient = (
        name if name in sheet.header else "" for name in ("dr_grade_of_that_photo", "same_photo_as_grading")
    )
    columns = _merged(Columns("image", label, patient), given)
    table = labels_of(sheet, columns, 5 if columns.label == label else None)
    if columns.patient == patient:
        table["patient"] = table["patient"].map(stored_id)
    sources = _find(root, table["id"])
    for code in codes:
        if f"{code}_pixels" in sheet.header:
            table[f"{code}_pixels"] = pd.array(sheet.integers(f"{code}_pixels"), dtype="Int64")
        names = sheet.texts(f"{code}_mask")
        masks = iter(_find(root, [name for name in names if name], ("masks",)))
        sources = [_with_mask(s, code, next(masks)) if name else s for s, name in zip(sources, names, strict=True)]
    return Collection(sources, table)


def _with_mask(source: Source, code: str, mask: Source) -> Source:
    """A photograph whose mask cannot be used cannot either."""
    problem = "missing_mask" if mask.problem == "missing_file" else mask.problem
    return replace(source, problem=source.problem or problem, masks={**source.masks, code: mask.path})


def _masks_by_name(root: Path) -> Collection:
    photographs: dict[str, list[Source]] = {}
    masks: dict[str, dict[str, Source]] = {}
    for source in find_photographs(root):
        name = PurePosixPath(source.id).name
        match = re.fullmatch(rf"(.+)_({'|'.join(LESIONS)})", name)
        if not match:
            photographs.setdefault(name, []).append(source)
        elif match[2] in masks.setdefault(match[1], {}):
            masks[match[1]][match[2]] = replace(source, problem="ambiguous_name")
        else:
            masks[match[1]][match[2]] = source
    if not masks:
        raise ValueError(f"folder={str(root)!r} holds neither a CSV nor masks by the names PHOTOGRAPH_MA.tif, _HE, ...")
    sources = []
    for name in sorted(photographs.keys() | masks.keys()):
        found = photographs.get(name, [])
        source = Source(name, "", "ambiguous_name" if found else "missing_file", name)
        source = replace(found[0], id=name) if len(found) == 1 else source
        for code, mask in sorted(masks.get(name, {}).items()):
            source = _with_mask(source, code, mask)
        sources.append(source)
    names = [PurePosixPath(source.name).name for source in sources if source.path and _is_text(source)]
    table = pd.DataFrame({"id": names, "patient": names}, dtype=object)
    return Collection(sources, _typed(table))


def _both_of_idrid(root: Path, given: Columns) -> Collection:
    """Grading and segmentation photographs together, so that a split keeps those that are in both on one side."""
    if given != USUAL:
        raise ValueError("columns are those of IDRiD where both its parts are read; ingest the folder grading alone")
    grading = _tabular("idrid", root / "grading", read_sheet(_csv_in(root / "grading")), given)
    segmentation = _segmentation(root / "segmentation", None, given)
    parts = [("grading", grading), ("segmentation", segmentation)]
    sources = [replace(source, name=f"{name}/{source.name}") for name, part in parts for source in part.sources]
    return Collection(sources, pd.concat([part.labels for _, part in parts], ignore_index=True))


def _find(root: Path, ids: Sequence[str], places: Sequence[str] = _PLACES) -> list[Source]:
    """The Source of each id, in the folder itself or else in one of the `places` there."""
    found = find_photographs(root, pd.DataFrame({"id": ids}, dtype=object))
    for place in places:
        if (root / place).is_dir():
            there = find_photographs(root, pd.DataFrame({"id": [f"{place}/{id}" for id in ids]}, dtype=object))
            found = [
                replace(new, id=old.id) if old.problem == "missing_file" and new.problem != "missing_file" else old
                for old, new in zip(found, there, strict=True)
            ]
    return found


def _csv_in(root: Path) -> Path:
    found = sorted(root.glob("*.csv"))
    found = [path for path in found if path.name in _CSVS] or found
    if len(found) != 1:
        raise ValueError(
            f"folder={str(root)!r} holds {len(found)} CSV files that could be the labels; give one by --labels"
        )
    return found[0]


def _merged(usual: Columns, given: Columns) -> Columns:
    """The `given` columns, the `usual` ones where none is."""
    return Columns(*(getattr(given, each.name) or getattr(usual, each.name) for each in fields(Columns)))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """A table of names with the columns that labels have, of their types."""
    for name, kind in (("label", "Int64"), ("eye", "string"), ("class", "string")):
        if name in table or name != "class":
            table[name] = pd.array(table[name] if name in table else [None] * len(table), dtype=kind)
    first = ["id", "label", "patient", "eye"]
    return table[first + [name for name in table.columns if name not in first]].astype({"id": str, "patient": str})
