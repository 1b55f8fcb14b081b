from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from tilestream.store import read_labels, write_labels


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_untidy_file_is_read(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf image , level ,who,,\r\n IDRiD_001.jpg, 3 ,p1,,\r\n10_left,,,,\r\n,,,,\r\n'x', -1.0,p1\r\n"
    table = read_labels(write(tmp_path / "l.csv", text), id_column="image", label_column="level", patient_column="who")
    assert list(table.columns) == ["id", "label", "patient", "eye"]
    assert table["eye"].isna().all()
    assert table["id"].tolist() == ["IDRiD_001.jpg", "10_left", "'x'"]
    assert table["label"].dtype == "Int64"
    assert table["label"].tolist() == [3, pd.NA, -1]
    assert table["patient"].tolist() == ["p1", "10_left", "p1"]


def test_labels_and_patients_are_optional(tmp_path: Path) -> None:
    table = read_labels(write(tmp_path / "l.csv", "image\n001\nNA\n"), id_column="image")
    assert table["id"].tolist() == ["001", "NA"]  # nothing is guessed: neither a number nor a missing value
    assert table["patient"].tolist() == ["001", "NA"]
    assert table["label"].isna().all()
    assert table["label"].dtype == "Int64"


def test_eyes_in_all_spellings(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", "image,side\na,left\nb,R\nc,OS\nd,od\ne,\nf,Right\n")
    table = read_labels(path, id_column="image", eye_column="side")
    assert table["eye"].tolist() == ["left", "right", "left", "right", pd.NA, "right"]
    with pytest.raises(ValueError, match="line 3: eye='both' in column 'side' is unknown; use left, right"):
        read_labels(write(path, "image,side\na,L\nb,both\n"), id_column="image", eye_column="side")


def test_headers_without_rows(tmp_path: Path) -> None:
    table = read_labels(write(tmp_path / "l.csv", "image,level\n"), id_column="image", label_column="level")
    assert len(table) == 0
    assert table["label"].dtype == "Int64"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,levle\na,1\n", r"column 'level' is not in .*it has 'image', 'levle'; did you mean 'levle'\?"),
        ("image,level,level\na,1,2\n", r"column 'level' occurs 2 times"),
        ("image,level\na,1\nb,2\na,3\n", r"id='a' occurs more than once"),
        ("image,level\na,1\n\nb,two\n", r"line 4: label='two' in column 'level'"),
        ("image,level\na,1.5\n", r"label='1.5'"),
        ("image,level\na,nan\n", r"label='nan'"),
        ("image,level\n,1\n", r"line 2 .* empty id"),
        ("image,level\na,1,2\n", r"line 2 .* more cells than the 2 headers"),
        ("", r"is empty"),
        (b"image,level\n\xff\xfe,1\n", r"no UTF-8 CSV"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(write(tmp_path / "l.csv", text), id_column="image", label_column="level")


def test_write_labels_drops_endings_and_replaces_all(store: Path) -> None:
    first = pd.DataFrame({"id": ["a.jpg", "b"], "label": pd.array([1, None], dtype="Int64"), "patient": ["a.jpg", "p"]})
    write_labels(store, first)
    table = pq.read_table(store / "labels.parquet").to_pandas()
    assert table["id"].tolist() == ["a", "b"]
    assert table["patient"].tolist() == ["a", "p"]
    assert table["label"].tolist() == [1, pd.NA]
    write_labels(store, first.iloc[1:])
    assert pq.read_table(store / "labels.parquet").to_pandas()["id"].tolist() == ["b"]
    assert not list(store.glob(".*.tmp"))


def test_write_labels_keeps_eyes_and_other_columns(store: Path) -> None:
    table = pd.DataFrame(
        {
            "class": ["mild", None],
            "id": ["a.jpg", "b"],
            "label": pd.array([1, None], dtype="Int64"),
            "eye": ["left", None],
            "patient": ["p", None],
            "MA_pixels": pd.array([7, None], dtype="Int64"),
        },
        index=[5, 3],
    )
    write_labels(store, table)
    stored = pq.read_table(store / "labels.parquet").to_pandas()
    assert list(stored.columns) == ["id", "label", "patient", "eye", "class", "MA_pixels"]
    assert stored["patient"].tolist() == ["p", "b"]  # an unknown patient is nobody else's
    assert stored["eye"].tolist() == ["left", pd.NA]
    assert stored["MA_pixels"].tolist() == [7, pd.NA]
    with pytest.raises(ValueError, match="column 'width' of labels is named like a fact"):
        write_labels(store, table.assign(width=1))


def test_write_labels_refuses_ids_that_become_one(store: Path) -> None:
    twice = pd.DataFrame({"id": ["a.jpg", "a.png"], "label": pd.array([1, 2], dtype="Int64"), "patient": ["p", "p"]})
    with pytest.raises(ValueError, match="id='a' occurs"):
        write_labels(store, twice)
    with pytest.raises(ValueError, match="column 'patient' is not in"):
        write_labels(store, twice[["id", "label"]])
    assert not (store / "labels.parquet").exists()
