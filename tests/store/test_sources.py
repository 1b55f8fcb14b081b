import os
from pathlib import Path

import pandas as pd
import pytest

from tilestream.store import Source, find_photographs, stored_id


def labels(*ids: str) -> pd.DataFrame:
    return pd.DataFrame({"id": list(ids)})


@pytest.mark.parametrize(
    ("name", "id"),
    [("10_left.jpeg", "10_left"), ("A.JPG", "A"), ("x.v2.tiff", "x.v2"), ("x.v2", "x.v2"), ("a/b.png", "a/b")],
)
def test_stored_id(name: str, id: str) -> None:
    assert stored_id(name) == id


def test_a_name_is_tried_as_it_is_and_then_with_endings(folder: Path) -> None:
    (folder / "sub").mkdir()
    for name in ("a.jpg", "b.jpeg", "c.TIF", "d", "e.jpg", "e.png", "sub/f.webp"):
        (folder / name).touch()
    found = find_photographs(folder, labels("a.jpg", "b", "c", "d", "e", "e.png", "sub/f", "g", "a.png"))
    assert [(source.id, source.name, source.problem) for source in found] == [
        ("a", "a.jpg", None),
        ("b", "b.jpeg", None),
        ("c", "c.TIF", None),
        ("d", "d", None),
        ("e", "e.jpg", "ambiguous_name"),
        ("e", "e.png", None),
        ("sub/f", "sub/f.webp", None),
        ("g", "g", "missing_file"),
        ("a", "a.png", "missing_file"),
    ]
    assert found[1].path == str(folder / "b.jpeg")


def test_ids_do_not_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").touch()
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "up").symlink_to(tmp_path)
    (folder / "there.jpg").touch()
    (folder / "inside.jpg").symlink_to(folder / "there.jpg")
    ids = [
        "../secret",
        "x/../there",
        "link",
        "up/secret",
        str(tmp_path / "secret"),
        "x\0y",
        ".",
        "..",
        "a/../../secret",
    ]
    assert [source.problem for source in find_photographs(folder, labels(*ids))] == ["outside_root"] * len(ids)
    assert find_photographs(folder, labels("inside"))[0].problem is None
    walked = {source.id: source.problem for source in find_photographs(folder)}
    assert walked == {"inside": None, "link": "outside_root", "there": None, "up/": "outside_root"}


def test_a_folder_hides_no_photograph(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    (folder / "a.JpG").touch()
    assert find_photographs(folder, labels("a")) == [Source("a", str(folder / "a.JpG"), None, "a.JpG")]
    assert find_photographs(folder, labels("b"))[0].path == str(folder / "b")  # told when it is opened: not_a_file


def test_a_link_to_a_folder_is_not_left_out_silently(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jpg").touch()
    (folder / "sub").mkdir()
    (folder / "sub" / "a.jpg").touch()
    (folder / "sub" / "away").symlink_to(tmp_path / "elsewhere")
    (folder / "same").symlink_to(folder / "sub")  # its photographs are found where they are
    found = {source.id: source.problem for source in find_photographs(folder)}
    assert found == {"sub/a": None, "sub/away/": "outside_root"}


def test_odd_names_are_missing_and_do_not_raise(folder: Path) -> None:
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    found = find_photographs(folder, labels("loop", "gone", "n" * 300, "no/" + "n" * 300, "loop.jpg/a"))
    assert [source.problem for source in found] == ["missing_file"] * 5


def test_without_labels_every_photograph_is_found(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / ".hidden").mkdir()
    for name in ("b.jpg", "a.PNG", "notes.txt", "._b.jpg", "sub/b.jpg", "two.jpg", "two.png", ".hidden/x.jpg"):
        (folder / name).touch()
    found = {source.id: source for source in find_photographs(folder)}
    assert list(found) == ["a", "b", "sub/b", "two"]
    assert found["two"].problem == "ambiguous_name"
    assert found["a"] == Source("a", str(folder / "a.PNG"), None, "a.PNG")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        find_photographs(tmp_path / "none")


def test_a_folder_that_cannot_be_listed_is_not_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "shut").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:  # by hand, for the superuser may list every folder
        if Path(path).name == "shut":
            raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        find_photographs(folder)
