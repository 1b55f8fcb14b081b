import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tilestream.store import Store, create_store, find_photographs, ingest_photograph, write_labels
from tilestream.store.files import Folder


def labels(**values: int | None) -> pd.DataFrame:
    label = pd.array(list(values.values()), dtype="Int64")
    return pd.DataFrame({"id": list(values), "label": label, "patient": ["p"] * len(values)})


def test_reading(filled: Path, noise: Callable[..., np.ndarray]) -> None:
    store = Store(filled)
    assert store.ids == ["a", "b", "c"]
    assert store.levels("b") == [(3, 600, 1300), (3, 300, 650)]
    image = store.image("b")
    assert (image.shape, image.dtype, image.chunks, image.shards) == (
        (3, 600, 1300), np.uint8, (3, 512, 512), (3, 1024, 1536)
    )  # fmt: skip
    pixels = noise(600, 1300, seed=1).transpose(2, 0, 1)
    np.testing.assert_array_equal(image[...], pixels)
    np.testing.assert_array_equal(image[:, 500:530, 500:], pixels[:, 500:530, 500:])
    assert store.image("b", level=1).shape == (3, 300, 650)
    assert store.square("b").shape == (3, 1024, 1024)
    assert pickle.loads(pickle.dumps(store)).ids == store.ids
    with pytest.raises(ValueError, match=r"read-only|mode"):
        image[0, 0, 0] = 1


def test_what_is_not_there(filled: Path, tmp_path: Path) -> None:
    store = Store(filled)
    with pytest.raises(ValueError, match=r"id='aa' is not in the store .*did you mean 'a'\?"):
        store.image("aa")
    for level in (1, -1):
        with pytest.raises(ValueError, match=rf"level={level} of id='a' must be in \[0, 1\)"):
            store.image("a", level)
    with pytest.raises(FileNotFoundError, match=r"none.*does not exist"):
        Store(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a tilestream store"):
        Store(tmp_path)
    (filled / "zarr.json").write_text(json.dumps({"attributes": {"tilestream": {"store": 99}}}))
    with pytest.raises(ValueError, match="store format 99; this version reads format 1"):
        Store(filled)


def test_samples(filled: Path) -> None:
    samples = Store(filled).samples()
    assert samples.columns.tolist() == [
        "id", "label", "patient", "eye", "height", "width", "source_sha256", "low", "high", "megapixels", "bytes"
    ]  # fmt: skip
    assert samples["label"].isna().all()
    assert samples["patient"].tolist() == ["a", "b", "c"]
    write_labels(filled, labels(b=2, a=0, elsewhere=4))
    samples = Store(filled).samples()
    assert samples["id"].tolist() == ["a", "b", "c"]
    assert samples["label"].tolist() == [0, 2, pd.NA]
    assert samples["label"].dtype == "Int64"
    assert samples["patient"].tolist() == ["p", "p", "c"]
    assert samples["height"].tolist() == [70, 600, 70]
    assert samples["megapixels"].tolist() == [0.0063, 0.78, 0.0063]
    assert (samples["low"] == 0).all()
    assert (samples["high"] == 255).all()


def test_samples_of_an_empty_store(store: Path) -> None:
    for _ in range(2):
        samples = Store(store).samples()
        assert len(samples) == 0
        assert samples["label"].dtype == "Int64"
    assert Store(store).info()["images"] == 0


def test_samples_are_rebuilt_only_when_stale(
    filled: Path, folder: Path, noise: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(filled)
    before = store.samples()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_join", lambda self: pytest.fail("rebuilt"))
        pd.testing.assert_frame_equal(store.samples(), before)
    Image.fromarray(noise(seed=9)).save(folder / "d.png")
    ingest_photograph(filled, find_photographs(folder)[-1])
    assert store.samples()["id"].tolist() == ["a", "b", "c", "d"]
    write_labels(filled, labels(d=3))
    assert store.samples()["label"].tolist() == [pd.NA, pd.NA, pd.NA, 3]
    write_labels(filled, labels(d=4))
    assert store.samples()["label"].tolist()[-1] == 4
    (filled / "commits" / "a.json").unlink()
    assert store.samples()["id"].tolist() == ["b", "c", "d"]
    # the same id committed again, from other pixels
    (filled / "commits" / "d.json").unlink()
    Image.fromarray(noise(50, 50)).save(folder / "d.png")
    ingest_photograph(filled, find_photographs(folder)[-1])
    assert store.samples()["height"].tolist()[-1] == 50


def test_a_store_that_cannot_be_written_is_read(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "writable", lambda files: False)
    assert Store(filled).samples()["id"].tolist() == ["a", "b", "c"]
    assert not (filled / "samples.parquet").exists()


def test_info(filled: Path, folder: Path) -> None:
    write_labels(filled, labels(a=0, b=2))
    (folder / "z.jpg").write_text("text")
    ingest_photograph(filled, find_photographs(folder)[-1])
    info = json.loads(json.dumps(Store(filled).info()))
    size_bytes = sum(path.stat().st_size for path in (filled / "images").rglob("*") if path.is_file())
    assert info == {
        "images": 3,
        "quarantined": 1,
        "megapixels": 0.7926,
        "bytes": size_bytes,
        "patients": 2,
        "labels": {"0": 1, "2": 1},
        "unlabelled": 1,
        "sizes": {"70x90": 2, "600x1300": 1},
        "reasons": {"unsupported_format": 1},
    }


def test_every_flipped_byte_is_found_on_reading(filled: Path) -> None:
    store = Store(filled)
    shard = store.group("a") / "image" / "c" / "0" / "0" / "0"
    whole = shard.read_bytes()
    want = store.image("a")[...]
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises((RuntimeError, ValueError)):
            store.image("a")[...]
    shard.write_bytes(whole)
    np.testing.assert_array_equal(store.image("a")[...], want)


def test_temporary_files_are_no_commits(store: Path) -> None:
    (store / "commits" / ".0123.tmp").write_text("{")
    assert Store(store).ids == []
    assert create_store(store) == store
