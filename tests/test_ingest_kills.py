"""kill -9 at random moments of an ingest leaves whole photographs or none; the next one finishes the rest."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tilestream.store import Store, collect, verify_photograph

COUNT, KILLS = 40, 20


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(COUNT):
        Image.fromarray(pixels(i)).save(tmp_path / "in" / f"{i}.png", compress_level=0)
    command = [sys.executable, "-m", "tilestream", "ingest", "in", "out.zarr", "--workers", "1"]
    chance, finished, seen = random.Random(0), 0, set[str]()
    for _ in range(KILLS):
        process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
        store = tmp_path / "out.zarr" / "zarr.json"
        begun, before = time.monotonic(), len(seen)
        while process.poll() is None and time.monotonic() - begun < 60:  # until it has come to work
            if store.exists() and (len(Store(store.parent).ids) > before or before == COUNT):
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        for pid in chance.sample(family, len(family)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        finished += process.wait() == 0
        ids = set(Store(store.parent).ids)
        assert seen <= ids  # nothing that was there is lost
        assert [damage for id in ids for damage in verify_photograph(store.parent, id)] == []
        seen = ids
    assert len(seen) > 0
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stderr
    assert f"{COUNT - len(seen)} committed + {len(seen)} there already + 0 quarantined" in done
    opened = Store(tmp_path / "out.zarr")
    for i in range(COUNT):
        assert opened.image(str(i))[...].transpose(1, 2, 0).tobytes() == pixels(i).tobytes()
    hashes = {i: hashlib.sha256((tmp_path / "in" / f"{i}.png").read_bytes()).hexdigest() for i in range(COUNT)}
    assert {id: opened.commit(id)["source_sha256"] for id in opened.ids} == {str(i): h for i, h in hashes.items()}
    collect(opened.path, older_s=0)
    folders = [path for path in (tmp_path / "out.zarr" / "images").iterdir()]
    assert {len(list(folder.iterdir())) for folder in folders} == {1}
