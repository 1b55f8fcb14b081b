"""The same store in a folder and in a bucket of a local S3 server."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tilestream.store import (
    Source,
    Store,
    collect,
    create_store,
    ingest_photograph,
    lease,
    open_dataset,
    open_store,
    verify_photograph,
    verify_tables,
    write_labels,
    write_series,
)
from tilestream.store.files import Bucket, files_at


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket; credentials in the environment, as users have them."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    settings = {
        "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            for _ in range(300):
                try:
                    urllib.request.urlopen(url, timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
            client.create_bucket(Bucket="photos")
            client.close()
            yield "s3://photos"
            server.kill()


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new store may go."""
    if request.param == "folder":
        return str(tmp_path / "store.zarr")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}.zarr"


@pytest.fixture
def photograph(tmp_path: Path, noise: Callable[..., np.ndarray]) -> Source:
    Image.fromarray(noise(600, 1300)).save(tmp_path / "a.png")
    return Source("a b", str(tmp_path / "a.png"), name="a.png")


def test_names_are_made_once(place: str) -> None:
    files = files_at(place)
    create_store(place)
    assert files.create("commits/x.json", b"1")
    assert not files.create("commits/x.json", b"2")
    assert files.read("commits/x.json") == b"1"
    files.write("commits/x.json", b"33")
    assert [(entry.name, entry.bytes) for entry in files.entries("commits")] == [("x.json", 2)]
    assert pickle.loads(pickle.dumps(files)).read("commits/x.json") == b"33"
    files.remove("commits/x.json")
    files.remove("commits/x.json")
    assert files.entries("commits") == []
    with pytest.raises(FileNotFoundError):
        files.read("commits/x.json")


def test_there_and_back(place: str, photograph: Source, noise: Callable[..., np.ndarray]) -> None:
    create_store(place)
    assert ingest_photograph(place, photograph)["status"] == "committed"
    assert ingest_photograph(place, photograph)["status"] == "skipped"
    store = Store(place)
    np.testing.assert_array_equal(store.image("a b")[...], noise(600, 1300).transpose(2, 0, 1))
    assert store.samples()["id"].tolist() == ["a b"]
    assert store.samples()["id"].tolist() == ["a b"]  # from its file
    dataset = open_dataset(place)
    np.testing.assert_array_equal(dataset.photographs["a b"], noise(600, 1300).transpose(2, 0, 1))
    assert dataset["square"].shape == (1, 3, 1024, 1024)
    assert verify_photograph(place, "a b") == []
    write_series(place)
    series = json.loads(files_at(place).read("OME/zarr.json"))["attributes"]["ome"]["series"]
    assert series == [f"images/a%20b/{store.commit('a b')['attempt']}"]


def test_damage_is_named(place: str, photograph: Source) -> None:
    create_store(place)
    ingest_photograph(place, photograph)
    files, attempt = files_at(place), f"images/a%20b/{Store(place).commit('a b')['attempt']}"
    shard = f"{attempt}/s0/image/c/0/0/0"
    data = bytearray(files.read(shard))
    data[-20_000] ^= 4  # in the last chunk of six
    files.write(shard, bytes(data))
    files.remove(f"{attempt}/s1/image/c/0/0/0")
    files.remove(f"{attempt}/train1024/zarr.json")
    found = {damage.file.removeprefix(f"{attempt}/"): damage for damage in verify_photograph(place, "a b")}
    assert {name: damage.what for name, damage in found.items()} == {
        "s0/image/c/0/0/0": "damaged", "s1/image/c/0/0/0": "missing", "train1024/zarr.json": "missing"
    }  # fmt: skip
    assert found["s0/image/c/0/0/0"].detail == "chunks (1, 2) of 6"
    commit = json.loads(files.read("commits/a%20b.json"))
    for damaged in (json.dumps({**commit, "height": 601}).encode(), b"[]", b"{", b""):
        files.write("commits/a%20b.json", damaged)
        assert [damage.what for damage in verify_photograph(place, "a b")] == ["damaged"]
        with pytest.raises(ValueError, match=r"commits/a%20b.json is damaged; 'tilestream verify'"):
            Store(place).samples()


def test_damage_beside_the_photographs_is_named(place: str, photograph: Source) -> None:
    create_store(place)
    ingest_photograph(place, photograph)
    write_labels(place, pd.DataFrame({"id": ["a b"], "label": [3], "patient": ["p"]}))
    write_series(place)
    files, store = files_at(place), Store(place)
    assert store.samples()["label"].tolist() == [3]
    assert verify_tables(place) == []
    files.write("samples.parquet", b"no table")  # it is made of the others
    assert store.samples()["label"].tolist() == [3]
    labels = files.read("labels.parquet")
    files.write("labels.parquet", labels[:-30] + bytes([labels[-30] ^ 1]) + labels[-29:])
    series = files.read("OME/zarr.json")
    files.write("OME/zarr.json", series.replace(b'"0.5"', b'"0.6"'))
    assert [damage.file for damage in verify_tables(place)] == ["labels.parquet", "OME/zarr.json"]
    files.write("OME/zarr.json", series)
    record = files.read("labels.json")
    for text in (b"{", b"[]", b"{}"):
        files.write("labels.json", text)
        assert [damage.file for damage in verify_tables(place)] == ["labels.json"]
    files.write("labels.json", record)
    files.remove("labels.parquet")
    commit = files.read("commits/a%20b.json")
    files.remove("commits/a%20b.json")
    found = {damage.file: damage.what for damage in verify_tables(place)}
    assert found["labels.parquet"] == found["commits/a%20b.json"] == "missing"
    assert collect(place, older_s=-60).removed == []  # the photograph may still be saved
    files.create("commits/a%20b.json", commit)
    assert verify_photograph(place, "a b") == []


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    with pytest.raises(
        ConnectionError, match=r"s3://nobody-has-this/store.zarr cannot be listed; check bucket"
    ) as caught:
        create_store("s3://nobody-has-this/store.zarr")
    assert len(str(caught.value)) < 500


def test_a_lease_that_is_no_record_holds_nothing(place: str) -> None:
    create_store(place)
    files = open_store(place)
    for name, text in enumerate((b"[1]", b"{}", b""), start=1):
        files.write(f"leases/00000{name}.json", text)
    files.write("leases/notes.json", b"{}")
    with lease(files, "gc"):
        assert "000004.json" in {entry.name for entry in files.entries("leases")}


def test_one_at_a_time(place: str) -> None:
    create_store(place)
    files = open_store(place)
    busy = rf"'ingest' \(process {os.getpid()} on .*\) is at work on this store; 'gc' has to wait"
    with lease(files, "ingest"), pytest.raises(ValueError, match=busy), lease(files, "gc"):
        pass
    with lease(files, "gc"):
        assert len(files.entries("leases")) == 1
    assert files.entries("leases") == []


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_who_died_holds_nothing(place: str, host: str) -> None:
    """A process of this machine that is gone, or a machine that has not been heard of for a minute."""
    create_store(place)
    files = open_store(place)
    name = socket.gethostname() if host == "here" else "elsewhere"
    beat = time.time() - (0 if host == "here" else 70)
    record = {"work": "ingest", "host": name, "pid": 1, "born": 1.0, "beat": beat}
    files.write("leases/000004.json", json.dumps(record).encode())
    with lease(files, "gc"):
        assert "000005.json" in {entry.name for entry in files.entries("leases")}
    assert files.entries("leases") == []
    if host == "elsewhere":
        files.write("leases/000004.json", json.dumps({**record, "beat": time.time() - 30}).encode())
        with pytest.raises(ValueError, match="process 1 on elsewhere"), lease(files, "gc"):
            pass


def test_orphans_are_collected(place: str, photograph: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    create_store(place)
    ingest_photograph(place, photograph)
    committed = Store(place).commit("a b")["attempt"]
    files = files_at(place)
    for name in ("images/a%20b/dead", "images/other/dead"):
        writer = files.writer(f"{name}/s0/zarr.json")
        writer.write(b"{}")
        writer.close()
    young = collect(place, older_s=900)
    assert (young.removed, young.young) == ([], 2)
    gone = collect(place, older_s=-60)
    assert (sorted(gone.removed), gone.bytes, gone.young) == (["images/a%20b/dead", "images/other/dead"], 4, 0)
    assert files.folders("images/a%20b") == [committed]
    assert files.folders("images") == ["a%20b"]
    assert verify_photograph(place, "a b") == []


def test_files_never_finished_are_collected_once_they_are_old(store: Path) -> None:
    half = store / "commits" / ".a.json.1.tmp"
    half.write_text("{")
    assert collect(store, older_s=900).removed == []
    os.utime(half, (0, 0))
    assert collect(store, older_s=900).removed == ["commits/.a.json.1.tmp"]


def test_a_store_without_its_empty_folders_is_one(store: Path, photograph: Source) -> None:
    """Copying by tools that know only files, as object stores do, leaves them out."""
    for folder in [path for path in store.iterdir() if path.is_dir() and not any(path.iterdir())]:
        folder.rmdir()
    assert (Store(store).ids, verify_tables(store)) == ([], [])
    assert ingest_photograph(store, photograph)["status"] == "committed"
    with lease(open_store(store), "gc"):
        assert collect(store).removed == []
    assert verify_photograph(store, "a b") == []


def test_a_folder_that_is_not_a_store(place: str) -> None:
    files = files_at(place)
    if isinstance(files, Bucket):
        files.write("thesis.txt", b"thesis")
    else:
        Path(place).mkdir()
        (Path(place) / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not a store and not"):
        create_store(place)
    with pytest.raises(ValueError, match="is not a tilestream store"):
        open_store(place)
