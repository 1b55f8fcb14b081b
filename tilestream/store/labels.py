"""Labels: a CSV as people make them in, one Parquet file of the store out."""

import csv
import difflib
import io
import os
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tilestream.store.files import Location
from tilestream.store.layout import open_store
from tilestream.store.sources import stored_id


def read_labels(
    csv_path: str | os.PathLike[str],
    *,
    id_column: str,
    label_column: str | None = None,
    patient_column: str | None = None,
) -> pd.DataFrame:
    """Read photographs' labels from a CSV file (UTF-8, with or without a byte-order mark).

    Returns columns id (str, as the file has it), label (Int64, NA where the cell is empty or no column is given) and
    patient (str, the id where the cell is empty or no column is given), in the file's order. Blanks around headers and
    cells, blank lines and empty columns at the end are of no consequence.

    Raises ValueError, naming the culprit: a missing column, an id twice or empty, a label that is not an integer, more
    cells than headers, a file that is no UTF-8 CSV.
    """
    rows = _read_rows(Path(csv_path))
    if not rows:
        raise ValueError(f"csv_path={str(csv_path)!r} is empty; it needs a line of headers")
    header = rows.pop(0)[1]
    wanted = [column for column in (id_column, label_column, patient_column) if column is not None]
    place = {column: _find_column(header, column.strip(), csv_path) for column in wanted}
    ids: list[str] = []
    labels: list[int | None] = []
    patients: list[str] = []
    for line, cells in rows:
        if any(cells[len(header) :]):
            raise ValueError(f"line {line} of {str(csv_path)!r} has more cells than the {len(header)} headers")
        cells += [""] * (len(header) - len(cells))
        id = cells[place[id_column]]
        if not id:
            raise ValueError(f"line {line} of {str(csv_path)!r} has an empty id (column {id_column!r})")
        ids.append(id)
        labels.append(_parse_label(cells[place[label_column]], line, label_column) if label_column else None)
        patients.append((cells[place[patient_column]] if patient_column else "") or id)
    table = pd.DataFrame({"id": ids, "label": pd.array(labels, dtype="Int64"), "patient": patients}).astype(
        {"id": str, "patient": str}
    )
    _refuse_duplicates(table["id"])
    return table


def write_labels(store_path: Location, labels: pd.DataFrame) -> None:
    """Replace the store's labels by `labels` (columns id, label, patient), whole: labels get corrected.

    Ids lose their file ending, and so do patients that are named like their photograph. Raises ValueError when an id
    then occurs twice, or a column is missing.
    """
    files = open_store(store_path)
    for column in ("id", "label", "patient"):
        _find_column(list(labels.columns), column, "labels")
    ids = labels["id"].map(stored_id).astype(str)
    _refuse_duplicates(ids)
    patients = labels["patient"].where(labels["patient"] != labels["id"], ids).astype(str)
    table = pd.DataFrame({"id": ids, "label": labels["label"].astype("Int64"), "patient": patients})
    files.write("labels.parquet", table_bytes(pa.Table.from_pandas(table, preserve_index=False)))


def table_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, stripped cells) of every row that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"csv_path={str(path)!r} is no UTF-8 CSV file: {error}") from None
    return [(line, cells) for line, cells in rows if any(cells)]


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


def _parse_label(cell: str, line: int, column: str) -> int | None:
    if not cell:
        return None
    # "2.0" is how pandas writes an integer column that has gaps
    if not re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", cell):
        raise ValueError(
            f"line {line}: label={cell!r} in column {column!r} is not an integer; leave it empty if unknown"
        )
    return int(cell.split(".")[0])


def _refuse_duplicates(ids: "pd.Series[str]") -> None:
    twice = ids[ids.duplicated()]
    if len(twice):
        raise ValueError(f"id={twice.iloc[0]!r} occurs more than once ({len(twice)} surplus rows); keep one row an id")
