import errno
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tilestream.store import Source, Store, create_store, find_photographs, ingest_photograph
from tilestream.store import ingest as ingest_module
from tilestream.store.files import Folder


@pytest.fixture
def source(folder: Path, noise: Callable[..., np.ndarray]) -> Source:
    Image.fromarray(noise()).save(folder / "a b.png")
    return find_photographs(folder)[0]


def test_commit_says_what_was_ingested(store: Path, source: Source, noise: Callable[..., np.ndarray]) -> None:
    result = ingest_photograph(store, source)
    commit = json.loads((store / "commits" / "a%20b.json").read_text())
    files = {path: path.read_bytes() for path in (store / "images" / "a%20b").rglob("*") if path.is_file()}
    size_bytes = sum(map(len, files.values()))
    assert result == {
        "id": "a b", "status": "committed", "reason": None, "megapixels": 0.0063, "bytes": size_bytes
    }  # fmt: skip
    assert commit["source_name"] == "a b.png"
    assert commit["source_sha256"] == hashlib.sha256(Path(source.path).read_bytes()).hexdigest()
    assert (commit["height"], commit["width"], commit["levels"]) == (70, 90, [[70, 90]])
    assert commit["low"] == noise().min(axis=(0, 1)).tolist()
    assert commit["high"] == noise().max(axis=(0, 1)).tolist()
    attempt = store / "images" / "a%20b" / commit["attempt"]
    want = {path.relative_to(attempt).as_posix(): hashlib.sha256(data).hexdigest() for path, data in files.items()}
    assert commit["files"] == want
    assert len(want) == 7  # the group, and group, array and shard of s0 and of train1024
    assert str(store.parent) not in json.dumps(commit)


def test_result_and_arguments_travel(store: Path, source: Source) -> None:
    work = pickle.loads(pickle.dumps((ingest_photograph, store, source)))
    assert pickle.loads(pickle.dumps(work[0](*work[1:])))["status"] == "committed"


def test_a_second_ingest_skips(store: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ingest_photograph(store, source)
    monkeypatch.setattr(ingest_module.decode, "photograph", lambda *_: pytest.fail("decoded again"))
    assert ingest_photograph(store, source) == {**first, "status": "skipped"}


def test_other_bytes_under_a_committed_id_are_a_conflict(
    store: Path, source: Source, noise: Callable[..., np.ndarray]
) -> None:
    ingest_photograph(store, source)
    Image.fromarray(noise(seed=5)).save(source.path)
    assert ingest_photograph(store, source)["reason"] == "conflicting_source"
    np.testing.assert_array_equal(Store(store).image("a b")[...], noise().transpose(2, 0, 1))
    Image.fromarray(noise()).save(source.path)
    assert ingest_photograph(store, source)["status"] == "skipped"
    assert len(Store(store).quarantined()) == 0


def test_bad_photographs_are_quarantined_and_tried_again(
    store: Path, folder: Path, noise: Callable[..., np.ndarray]
) -> None:
    Image.fromarray(noise()).save(folder / "cut.jpg")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:-400])
    (folder / "text.jpg").write_text("text")
    os.mkfifo(folder / "fifo.jpg")
    labels = pd.DataFrame({"id": ["cut", "text", "fifo", "none", "../up", "n" * 300]})
    results = [ingest_photograph(store, source) for source in find_photographs(folder, labels)]
    reasons = ["damaged", "unsupported_format", "not_a_file", "missing_file", "outside_root", "missing_file"]
    assert [result["reason"] for result in results] == reasons
    assert {result["status"] for result in results} == {"quarantined"}
    table = Store(store).quarantined().set_index("id")
    assert len(table) == 6
    assert table.loc["cut", "sha256"] == hashlib.sha256(whole[:-400]).hexdigest()
    assert table.loc["none", "sha256"] is None
    assert table.loc["cut", "path"] == "cut.jpg"
    assert Store(store).ids == []
    assert [path for path in (store / "images").rglob("*") if path.is_file()] == []
    (folder / "cut.jpg").write_bytes(whole)
    assert ingest_photograph(store, find_photographs(folder, labels)[0])["status"] == "committed"
    assert "cut" not in set(Store(store).quarantined()["id"])


@pytest.mark.parametrize("id", ["..", ".", ".hidden", "a/b", "50%", "ünï", "a\\b", "~"])
def test_any_id_stays_in_its_folder(store: Path, source: Source, id: str) -> None:
    assert ingest_photograph(store, Source(id, source.path))["status"] == "committed"
    assert Store(store).ids == [id]
    assert len(list((store / "images").iterdir())) == 1
    assert Store(store).image(id).shape == (3, 70, 90)


@pytest.mark.parametrize("id", ["n" * 201, "\udcff", "", "a\x07", "a\x1fb"])
def test_ids_that_fit_no_file_or_table(store: Path, source: Source, id: str) -> None:
    assert ingest_photograph(store, Source(id, source.path))["reason"] == "bad_name"
    assert Store(store).quarantined()["id"].tolist() == [id]


def test_a_kill_before_the_commit_leaves_no_image(
    store: Path, source: Source, noise: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "create", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ingest_photograph(store, source)
    assert len(list((store / "images" / "a%20b").iterdir())) == 1
    assert Store(store).ids == []
    assert len(Store(store).samples()) == 0
    assert ingest_photograph(store, source)["status"] == "committed"
    np.testing.assert_array_equal(Store(store).image("a b")[...], noise().transpose(2, 0, 1))


def test_the_second_writer_loses_cleanly(store: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ingest_module.write_attempt

    def overtaken(*arguments: object) -> object:
        monkeypatch.setattr(ingest_module, "write_attempt", write)
        assert ingest_photograph(store, source)["status"] == "committed"
        return write(*arguments)

    monkeypatch.setattr(ingest_module, "write_attempt", overtaken)
    assert ingest_photograph(store, source)["status"] == "skipped"
    attempts = [path.name for path in (store / "images" / "a%20b").iterdir()]
    assert attempts == [Store(store).commit("a b")["attempt"]]
    assert not [path for path in (store / "commits").iterdir() if path.suffix != ".json"]


def test_eight_writers_one_commit(store: Path, source: Source, noise: Callable[..., np.ndarray]) -> None:
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: ingest_photograph(store, source)["status"], range(8)))
    assert sorted(statuses) == ["committed"] + ["skipped"] * 7
    np.testing.assert_array_equal(Store(store).image("a b")[...], noise().transpose(2, 0, 1))


def test_a_full_disk_raises_and_leaves_nothing(store: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(files: Folder, folder: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Folder, "settle", full)
    with pytest.raises(OSError, match="No space left"):
        ingest_photograph(store, source)
    assert list((store / "images" / "a%20b").iterdir()) == []
    assert len(Store(store).quarantined()) == 0


def test_no_store_raises(tmp_path: Path, source: Source) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ingest_photograph(tmp_path / "none", source)


def test_create_store(tmp_path: Path, store: Path) -> None:
    assert create_store(store) == store
    (tmp_path / "half" / "images").mkdir(parents=True)
    assert Store(create_store(tmp_path / "half")).ids == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        create_store(tmp_path / "full")
    with pytest.raises(ValueError, match="not an empty folder"):
        create_store(tmp_path / "full" / "thesis.txt")


def test_a_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Folder(tmp_path)
    place.write("x.json", b'{"a": 1}')

    def fail(descriptor: int) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        place.write("x.json", b'{"a": 2}')
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
