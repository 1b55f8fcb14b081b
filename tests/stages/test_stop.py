"""Told to stop, a run keeps what is finished, ends in time, and says how."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tilestream import cli


def test_the_first_signal_raises_and_the_second_ends_the_process(monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(cli, "STOP_S", 1e6)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with cli.stoppable() as received:
            with pytest.raises(cli.Stopped):
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # the same, told twice
            monkeypatch.setattr(cli, "SAME_S", -1.0)
            with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
                signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGTERM]
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, before if number == signal.SIGTERM else signal.default_int_handler)


def test_without_a_signal_handlers_are_as_before():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with cli.stoppable() as received:
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (received, (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))) == ([], before)


@pytest.fixture
def start(made, new_pipeline, tmp_path: Path):
    """start(*more words): a run that has finished some photographs, the ids in its journal, and its command."""
    command = [
        sys.executable, "-m", "tilestream", "run", str(new_pipeline), "--out", "run", "--store", str(made.store.path),
        "--models", str(made.models), "--workers", "1",
    ]  # fmt: skip

    def begin(*more: str) -> tuple[subprocess.Popen, Callable[[], list[str]], list[str]]:
        with (tmp_path / "log").open("w") as log:
            driver = subprocess.Popen([*command, *more], cwd=tmp_path, stdout=log, stderr=log)

        def ids() -> list[str]:
            found = (tmp_path / "run" / "journal").glob("saliency.partial-*/centres.jsonl")
            return [json.loads(line)["id"] for path in found for line in path.read_text().splitlines()]

        deadline = time.monotonic() + 120
        while len(ids()) < 2:
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return driver, ids, command

    return begin


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on(start, undisturbed, tmp_path, number):
    driver, ids, command = start()
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(number)
    assert driver.wait(30) == 128 + number
    said = (tmp_path / "log").read_text()
    assert f"tilestream: stopped by {number.name}; --resume continues" in said
    assert "Traceback" not in said
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert not (tmp_path / "run" / "cluster.json").exists()
    kept = ids()
    assert 2 <= len(kept) < 12
    again = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert f"saliency: {len(kept)} of 12 photographs are done already" in again.stderr
    for name in ("centres", "crops", "predictions"):
        assert (tmp_path / "run" / f"{name}.parquet").read_bytes() == (undisturbed / f"{name}.parquet").read_bytes()


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(start):
    driver, _, _ = start()
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGTERM)
    time.sleep(cli.SAME_S + 0.1)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(2) in (143, -signal.SIGTERM)  # Python may be closing by then, with handlers of its own
    assert not psutil.wait_procs(children, timeout=10)[1], "workers end with their driver"


@pytest.mark.slow
def test_a_run_that_goes_on_shows_its_page(start, tmp_path):
    driver, _, _ = start("--set", "saliency.tile_px=64")  # it takes a while
    try:
        command = [sys.executable, "-m", "tilestream", "dashboard", "run"]
        found = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["page"].endswith("/tilestream")
        second = subprocess.run([*driver.args], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert f"is in use by process {driver.pid} on" in second.stderr.splitlines()[-1]
    finally:
        driver.kill()
        driver.wait()
    gone = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert gone.returncode == 2
    assert "does not answer" in gone.stderr
