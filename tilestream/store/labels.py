"""Labels: a sheet as people make them in (CSV, or a spreadsheet), one Parquet file of the store out."""

import csv
import difflib
import hashlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tilestream.store.files import Location
from tilestream.store.layout import open_store, to_json
from tilestream.store.sources import stored_id

FACTS = ("height", "width", "source_sha256", "low", "high", "megapixels", "bytes")
"""Columns of the samples that come from the photographs; labels have none of these names."""

_EYES = {"left": "left", "l": "left", "os": "left", "right": "right", "r": "right", "od": "right", "": None}
_SPREADSHEETS = (".xls", ".xlsx")


@dataclass(frozen=True)
class Columns:
    """The names of a sheet's columns that hold photographs' names, labels, patients and eyes; "" where none does."""

    id: str = ""
    label: str = ""
    patient: str = ""
    eye: str = ""


@dataclass(frozen=True)
class Sheet:
    """The text of a sheet, without blanks around cells, blank rows, and empty columns at the end.

    rows: (line number, a cell for each header).
    """

    path: str
    header: list[str]
    rows: list[tuple[int, list[str]]]

    def texts(self, column: str) -> list[str]:
        """A column's cells. Raises ValueError when the column is not there, or more than once."""
        place = _find_column(self.header, column.strip(), self.path)
        return [cells[place] for _, cells in self.rows]

    def integers(self, column: str, name: str = "", stop: int | None = None) -> list[int | None]:
        """A column of integers in [0, stop) (any, without `stop`), None where the cell is empty.

        Raises ValueError, naming the line, for anything else; `name` is what the error calls the value.
        """
        name, numbers = name or column, []
        for (line, _), cell in zip(self.rows, self.texts(column), strict=True):
            number = _parse_integer(cell, f"line {line}: {name}={cell!r} in column {column!r} of {self.path!r}")
            if number is not None and stop is not None and not 0 <= number < stop:
                raise ValueError(f"line {line}: {name}={number} in column {column!r} must be in [0, {stop})")
            numbers.append(number)
        return numbers


def read_sheet(path: str | os.PathLike[str]) -> Sheet:
    """Read a CSV file (UTF-8, with or without a byte-order mark), or the first sheet of an .xls or .xlsx file.

    Raises ValueError when it is neither, is empty, or a row has more cells than there are headers, or when the package
    that reads spreadsheets is not installed.
    """
    path = Path(path)
    rows = _read_spreadsheet(path) if path.suffix.lower() in _SPREADSHEETS else _read_csv(path)
    rows = [(line, cells) for line, cells in rows if any(cells)]
    if not rows:
        raise ValueError(f"csv_path={str(path)!r} is empty; it needs a line of headers")
    header = rows.pop(0)[1]
    for line, cells in rows:
        if any(cells[len(header) :]):
            raise ValueError(f"line {line} of {str(path)!r} has more cells than the {len(header)} headers")
    width = len(header)
    return Sheet(str(path), header, [(line, (cells + [""] * width)[:width]) for line, cells in rows])


def read_labels(
    csv_path: str | os.PathLike[str],
    *,
    id_column: str,
    label_column: str | None = None,
    patient_column: str | None = None,
    eye_column: str | None = None,
) -> pd.DataFrame:
    """Read photographs' labels from a sheet: `labels_of` of `read_sheet`."""
    return labels_of(
        read_sheet(csv_path), Columns(id_column, label_column or "", patient_column or "", eye_column or "")
    )


def labels_of(sheet: Sheet, columns: Columns, stop: int | None = None) -> pd.DataFrame:
    """The photographs' labels in a sheet, in its order.

    Returns columns id (str, as the sheet has it), label (Int64 in [0, stop), NA where the cell is empty or no column is
    named), patient (str, the id where the cell is empty or no column is named) and eye ("left", "right" or NA).

    Raises ValueError, naming the culprit: a missing column, an id twice or empty, a label that is not an integer or out
    of range, an unknown eye.
    """
    ids = sheet.texts(columns.id)
    for (line, _), id in zip(sheet.rows, ids, strict=True):
        if not id:
            raise ValueError(f"line {line} of {sheet.path!r} has an empty id (column {columns.id!r})")
    labels = sheet.integers(columns.label, "label", stop) if columns.label else [None] * len(ids)
    patients = sheet.texts(columns.patient) if columns.patient else ids
    table = pd.DataFrame(
        {
            "id": pd.Series(ids, dtype=str),
            "label": pd.array(labels, dtype="Int64"),
            "patient": pd.Series([patient or id for patient, id in zip(patients, ids, strict=True)], dtype=str),
            "eye": pd.array(_eyes(sheet, columns.eye), dtype="string"),
        }
    )
    refuse_duplicates(table["id"])
    return table


def write_labels(store_path: Location, labels: pd.DataFrame) -> None:
    """Replace the store's labels by `labels` (columns id, label, patient, eye, others), whole: labels get corrected.

    Ids lose their file ending, and so do patients that are named like their photograph. A column eye is added if there
    is none. Raises ValueError when an id then occurs twice, or a column is missing or named like a fact of photographs.
    """
    files = open_store(store_path)
    for column in ("id", "label", "patient"):
        _find_column(list(labels.columns), column, "labels")
    for column in labels.columns:
        if column in FACTS:
            raise ValueError(f"column {column!r} of labels is named like a fact of the photographs; rename it")
    ids = labels["id"].map(stored_id).astype(str)
    refuse_duplicates(ids)
    named = labels["patient"].notna() & (labels["patient"] != labels["id"])
    patients = labels["patient"].where(named, ids).astype(str)
    eyes = labels["eye"] if "eye" in labels else pd.Series(pd.NA, labels.index)
    table = pd.DataFrame(
        {"id": ids, "label": labels["label"].astype("Int64"), "patient": patients, "eye": eyes.astype("string")}
    )
    table = table.join(labels.drop(columns=table.columns, errors="ignore"))
    data = table_bytes(pa.Table.from_pandas(table, preserve_index=False))
    files.write("labels.parquet", data)
    files.write("labels.json", to_json({"sha256": hashlib.sha256(data).hexdigest(), "rows": len(table)}))


def table_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def refuse_duplicates(ids: "pd.Series[str]") -> None:
    """Raises ValueError when an id occurs more than once."""
    twice = ids[ids.duplicated()]
    if len(twice):
        raise ValueError(f"id={twice.iloc[0]!r} occurs more than once ({len(twice)} surplus rows); keep one row an id")


def _read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, stripped cells) of every row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            return [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"csv_path={str(path)!r} is no UTF-8 CSV file: {error}") from None


def _read_spreadsheet(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, stripped cells) of every row of the first sheet."""
    try:
        frame = pd.read_excel(path, header=None, dtype=str, keep_default_na=False, engine="calamine")
    except ImportError:
        raise ValueError(
            f"path={str(path)!r} needs the package python-calamine; pip install python-calamine, or save the sheet as "
            f"{path.with_suffix('.csv').name!r}"
        ) from None
    except OSError:
        raise
    except Exception as error:  # the package's own, which derives from nothing else
        raise ValueError(f"path={str(path)!r} is no spreadsheet: {error}") from None
    cells = frame.fillna("").to_numpy().tolist()
    return [(line, [str(cell).strip() for cell in row]) for line, row in enumerate(cells, start=1)]


def _find_column(header: list[str], column: str, csv_path: object) -> int:
    found = header.count(column)
    if found > 1:
        raise ValueError(f"column {column!r} occurs {found} times in {str(csv_path)!r}; it must be there once")
    if not found:
        there = [name for name in header if name]
        near = difflib.get_close_matches(column, there, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"column {column!r} is not in {str(csv_path)!r}; it has {', '.join(map(repr, there))}{hint}")
    return header.index(column)


def _parse_integer(cell: str, where: str) -> int | None:
    if not cell:
        return None
    # "2.0" is how pandas writes an integer column that has gaps
    if not re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", cell):
        raise ValueError(f"{where} is not an integer; leave it empty if unknown")
    return int(cell.split(".")[0])


def _eyes(sheet: Sheet, column: str) -> list[str | None]:
    eyes = []
    for (line, _), cell in zip(sheet.rows, sheet.texts(column) if column else [""] * len(sheet.rows), strict=True):
        if cell.lower() not in _EYES:
            raise ValueError(
                f"line {line}: eye={cell!r} in column {column!r} is unknown; use left, right, L, R, OS or OD, or "
                "leave it empty"
            )
        eyes.append(_EYES[cell.lower()])
    return eyes
