import pandas as pd

from tilestream.store.duplicates import duplicate_notes, duplicates


def samples(**rows: tuple[int | None, str]) -> pd.DataFrame:
    labels = pd.array([label for label, _ in rows.values()], dtype="Int64")
    return pd.DataFrame({"id": list(rows), "label": labels, "source_sha256": [digest for _, digest in rows.values()]})


def test_sets_of_the_same_file() -> None:
    found = duplicates(samples(d=(1, "y"), c=(2, "x"), a=(0, "x"), b=(1, "y"), e=(3, "z"), f=(None, "x")))
    assert found["source_sha256"].tolist() == ["x", "y"]
    assert found["ids"].tolist() == [["a", "c", "f"], ["b", "d"]]
    assert found["labels"].tolist() == [[0, 2, None], [1, 1]]
    assert found["differ"].tolist() == [True, False]


def test_different_labels_name_both() -> None:
    notes = duplicate_notes(samples(IDRiD_391=(2, "x"), IDRiD_021=(1, "x"), a=(0, "y"), b=(0, "y"), c=(4, "z")))
    assert notes[0].startswith("4 photographs are byte-identical to another (2 different files)")
    assert len(notes) == 2
    assert notes[1].startswith("warning: IDRiD_021 (label 1) and IDRiD_391 (label 2) are byte-identical")


def test_an_unknown_label_is_no_other_label() -> None:
    table = samples(a=(1, "x"), b=(None, "x"))
    assert duplicates(table)["differ"].tolist() == [False]
    assert len(duplicate_notes(table)) == 1


def test_no_duplicates() -> None:
    for table in (samples(a=(1, "x"), b=(1, "y")), samples()):
        assert duplicates(table).empty
        assert list(duplicates(table).columns) == ["source_sha256", "ids", "labels", "differ"]
        assert duplicate_notes(table) == []
