"""Photographs that kill their reader, or never end."""

import io
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tilestream.store import Limits, Settings, Source, Store, child, ingest_guarded


@pytest.fixture(autouse=True)
def end_children() -> Iterator[None]:
    yield
    if found := getattr(child._children, "one", None):
        found[1].end()
        del child._children.one


@pytest.fixture
def source(folder: Path, noise: Callable[..., np.ndarray]) -> Source:
    Image.fromarray(noise(2000, 3000)).save(folder / "a.png")
    return Source("a", str(folder / "a.png"))


def own_children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "child.serve" in " ".join(each.cmdline())]


def test_one_process_takes_one_photograph_after_the_other(
    store: Path, folder: Path, source: Source, noise: Callable[..., np.ndarray]
) -> None:
    assert ingest_guarded(str(store), source, Settings(), Limits())["status"] == "committed"
    (first,) = own_children()
    (folder / "b.jpg").write_text("text")
    result = ingest_guarded(str(store), Source("b", str(folder / "b.jpg")), Settings(), Limits())
    assert result["reason"] == "unsupported_format"
    assert own_children() == [first]
    np.testing.assert_array_equal(Store(store).image("a")[...], noise(2000, 3000).transpose(2, 0, 1))


def test_an_answer_that_nobody_waited_for_is_not_the_next_ones(
    store: Path, folder: Path, source: Source, noise: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(child.select, "select", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ingest_guarded(str(store), source, Settings(), Limits())
    Image.fromarray(noise(seed=7)).save(folder / "b.png")
    assert ingest_guarded(str(store), Source("b", str(folder / "b.png")), Settings(), Limits())["id"] == "b"


def test_what_takes_too_long(store: Path, source: Source) -> None:
    started = time.monotonic()
    result = ingest_guarded(str(store), source, Settings(), Limits(seconds=0.2))
    assert result["reason"] == "too_slow"
    assert time.monotonic() - started < 5
    assert own_children() == []
    assert Store(store).quarantined()["message"].tolist() == ["not done in 0.2 s; --time-limit raises it"]


def test_what_takes_too_much_memory(store: Path, source: Source) -> None:
    result = ingest_guarded(str(store), source, Settings(), Limits(memory=2**20))
    assert result["reason"] in ("too_much_memory", "decoder_died")
    assert "--memory-limit raises it" in Store(store).quarantined()["message"][0]


def test_sides_beyond_the_limit(store: Path, source: Source) -> None:
    result = ingest_guarded(str(store), source, Settings(max_side_px=2999), Limits())
    assert result["reason"] == "too_large"
    assert "--max-side raises it" in Store(store).quarantined()["message"][0]
    result = ingest_guarded(str(store), source, Settings(max_side_px=3000), Limits(side_px=299))  # libvips' own limit
    assert result["reason"] == "damaged"
    assert ingest_guarded(str(store), source, Settings(), Limits())["status"] == "committed"


def test_a_process_that_dies_twice(store: Path, source: Source) -> None:
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.05):
            for each in own_children():
                os.kill(each.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = ingest_guarded(str(store), source, Settings(), Limits())
    ended.set()
    killer.join()
    assert result["reason"] == "decoder_died"
    assert "was ended by SIGKILL" in Store(store).quarantined()["message"][0]
    assert ingest_guarded(str(store), source, Settings(), Limits())["status"] == "committed"
    assert len(Store(store).quarantined()) == 0


def test_three_hundred_mutations(store: Path, folder: Path, noise: Callable[..., np.ndarray]) -> None:
    """Whatever comes is committed or quarantined, and the process lives."""
    chance, wholes = random.Random(0), []
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(noise(64, 80)).save(buffer, kind)
        wholes.append(buffer.getvalue())
    statuses = Counter()
    for i in range(300):
        data = bytearray(chance.choice(wholes))
        for _ in range(chance.choice([1, 1, 3, 20])):
            at = chance.randrange(len(data) if chance.random() < 0.5 else 100)
            action = chance.random()
            if action < 0.6:
                data[at] = chance.randrange(256)
            elif action < 0.8:
                del data[at : at + chance.randrange(1, 50)]
            else:
                data[at:at] = chance.randbytes(chance.randrange(1, 50))
        (folder / f"{i}.x").write_bytes(data)
        source = Source(str(i), str(folder / f"{i}.x"))
        result = ingest_guarded(str(store), source, Settings(max_megapixels=50), Limits(memory=2**30))
        statuses[result["reason"] or result["status"]] += 1
    assert statuses["committed"] > 20
    assert statuses["damaged"] > 100
    assert not {"decoder_died", "too_slow"} & set(statuses)
    assert len(own_children()) == 1


def test_errors_of_the_store_are_raised(tmp_path: Path, source: Source) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ingest_guarded(str(tmp_path / "none"), source, Settings(), Limits())
