"""What progress shows, on a terminal and elsewhere, and the ticks that come from workers."""

import io
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tilestream.cluster import Job, Reduction, progress, run


def _console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_do_not_flood(scheduler: dict[str, Any]) -> None:
    console = _console()
    jobs = [Job.call(f"image-{i}", int, size=2.5) for i in range(20)]
    with progress("ingest", total_images=20, total_parts=20, console=console) as state:
        run(jobs, window=4, on_result=lambda job, result: None, progress=state, **scheduler)
    [line] = _text(console).splitlines()  # less than ten seconds: the summary alone
    assert line.startswith("ingest: 20 images done, 0 failed, 20 tiles in ")


def test_plain_lines_now_and_then() -> None:
    console = _console()
    with progress("saliency", total_images=4, total_parts=8, console=console, interval_s=0.05) as state:
        for i in range(4):
            state.start(f"image-{i}", 2)
            for _ in range(2):
                time.sleep(0.06)
                state.tick(f"image-{i}")
            state.finish(f"image-{i}", 10.0, failed=i == 2)
    *lines, last = _text(console).splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("saliency: 0/4 images, 1/8 tiles, 0:00:0")
    assert lines[-1].startswith("saliency: 3/4 images, 1 failed, 8/8 tiles, 0:00:00 left, ")
    assert lines[-1].endswith(" elapsed")
    assert last.startswith("saliency: 3 images done, 1 failed, 8 tiles in ")


def test_a_terminal_gets_a_bar_and_a_summary() -> None:
    console = _console(terminal=True)
    with progress("predict", total_images=2, console=console) as state:
        state.start("a", 1)
        state.finish("a", 1.0)
        time.sleep(0.3)
    text = _text(console)
    assert "1/2 images" in text
    assert "━" in text
    assert "predict: 1 images done, 0 failed in" in text.splitlines()[-1]


def test_an_exception_still_gets_its_summary() -> None:
    console = _console()
    with pytest.raises(KeyboardInterrupt), progress("train", console=console):
        raise KeyboardInterrupt
    assert _text(console).startswith("train: stopped, 0 images done")


@pytest.mark.parametrize("scheduler", ["threads", "distributed"], indirect=True)
def test_tiles_tick_while_their_image_runs(scheduler: dict[str, Any], tmp_path: Path) -> None:
    """The last tile waits until the driver has seen the other three."""
    gate = tmp_path / "gate"

    def work(part: int) -> dict[int, int]:
        end_s = time.monotonic() + 10
        while part == 3 and not gate.exists() and time.monotonic() < end_s:
            time.sleep(0.01)
        return {0: part}

    seen = []

    def watch() -> None:
        end_s = time.monotonic() + 5
        while state.parts_done < 3 and time.monotonic() < end_s:
            time.sleep(0.01)
        seen.append((state.images, state.parts_done))
        gate.touch()

    job = Job("image", Reduction((0, 1, 2, 3), work, {0: (0, 1, 2, 3)}, lambda _, pieces: pieces, max), size=1.0)
    with progress("saliency", total_images=1, total_parts=4, console=_console()) as state:
        watcher = threading.Thread(target=watch)
        watcher.start()
        run([job], window=1, on_result=lambda job, result: None, progress=state, **scheduler)
        watcher.join()
    assert seen == [(0, 3)]
    assert (state.images, state.parts_done) == (1, 4)


def test_ticks_of_lost_work_do_not_count() -> None:
    with progress("saliency", total_images=1, total_parts=2, console=_console()) as state:
        state.start("first try", 2)
        for _ in range(3):  # a tile that is computed again ticks again
            state.tick("first try")
        assert state.parts_done == 2
        state.drop("first try")
        state.tick("first try")
        assert state.parts_done == 0
        state.start("second try", 2)
        state.tick("second try")
        assert state.fraction == 0.5
        state.finish("second try", 1.0)
        assert state.parts_done == 2


def test_failed_jobs_are_counted(scheduler: dict[str, Any]) -> None:
    jobs = [Job.call("good", int, size=1.0), Job.call("bad", lambda: 1 / 0, size=1.0)]
    with progress("predict", console=_console()) as state:
        run(jobs, window=1, on_result=lambda *_: None, on_error=lambda *_: None, progress=state, **scheduler)
    assert (state.images, state.failed, state.megapixels) == (2, 1, 1.0)
