"""What a second run leaves out, what it does again, and how a killed one goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import zarr

from tilestream.stages import pipeline as pipeline_module
from tilestream.stages import runner, saliency


@pytest.fixture
def copy(made, tmp_path: Path) -> Path:
    """The finished run, copied elsewhere, to be spoilt."""
    return shutil.copytree(made.run, tmp_path / "moved" / "run")


def done_again(said: str) -> list[str]:
    """The stages that were not skipped."""
    return re.findall(r"^(\w+): done in", said, re.MULTILINE)


def skipped(said: str) -> list[str]:
    return re.findall(r"^(\w+): unchanged, skipped", said, re.MULTILINE)


def results(run: Path) -> dict[str, bytes]:
    """Bytes of what a run on new photographs makes, crops as pixels: an array's attributes are not its content."""
    tables = {name: (run / f"{name}.parquet").read_bytes() for name in ("centres", "crops", "predictions")}
    return {**tables, "pixels": zarr.open_array(run / "crops.zarr" / "image", mode="r")[:].tobytes()}


def times(folder):
    """When each file was written last, but for the one that says who is at work."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_second_run_skips_everything_and_says_so(made, copy, go):
    before = times(copy)
    said = go(made.pipeline, copy)  # the folder was moved, too: paths are no reason to do work again
    assert done_again(said) == []
    assert len(skipped(said)) == 13
    assert {
        path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file() and path.name != "lock"
    } == before


def test_one_setting_redoes_what_depends_on_it(made, copy, go):
    said = go(made.pipeline, copy, ["crops.size_px=80"])
    assert done_again(said) == ["crops", "predict", "evaluate", "report"]
    assert skipped(said) == [
        "synth", "ingest", "split", "preprocess", "train", "saliency_square", "crops_train", "train_crops", "saliency",
    ]  # fmt: skip
    assert zarr.open_array(copy / "crops.zarr" / "image", mode="r").shape == (12, 3, 80, 80)


def test_a_setting_without_influence_redoes_nothing(made, copy, go):
    assert done_again(go(made.pipeline, copy, ["train.loader_threads=1"])) == []


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("centres.parquet", "saliency"),
        ("crops.zarr/image/c/3/0/0/0", "crops"),
        ("predictions.parquet", "predict"),
        ("metrics.json", "evaluate"),
        ("report.html", "report"),
    ],
)
def test_a_damaged_output_is_made_again(made, copy, go, path, stage):
    whole = (copy / path).read_bytes()
    (copy / path).write_bytes(whole[: len(whole) // 2])
    said = go(made.pipeline, copy)
    assert done_again(said) == [stage]  # what depends on it is not done again: it comes out the same
    if stage != "report":  # it holds times
        assert (copy / path).read_bytes() == whole


def test_lost_photographs_are_ingested_again(made, copy, go):
    shutil.rmtree(copy / "photographs.zarr")
    said = go(made.pipeline, copy)
    assert done_again(said)[0] == "ingest"
    assert "12 committed" in said
    assert "split" in skipped(said)  # the same photographs


def interrupt_after(monkeypatch, count: int) -> None:
    """Raises once the saliency stage has recorded `count` photographs."""
    append = runner.Journal.append

    def limited(self: runner.Journal, record: dict) -> None:
        append(self, record)
        if self.path.name == "centres.jsonl" and len(self.read()) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(saliency.Journal, "append", limited)


def journal_of(run):
    """The journal of a saliency stage that is not done; its folder's name is drawn at random."""
    return next((run / "journal").glob("saliency.partial-*/centres.jsonl"), None)


def test_resume_does_no_photograph_twice(made, new_pipeline, undisturbed, go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            go(new_pipeline, tmp_path, store=made.store.path, models=made.models)
    assert not (tmp_path / "centres.parquet").exists()
    journal = journal_of(tmp_path)
    first = [json.loads(line)["id"] for line in journal.read_text().splitlines()]
    journal.write_bytes(journal.read_bytes() + b'{"id": "torn')  # as a kill in the middle of a line leaves it
    timing = journal.with_name("timing.json")
    timing.write_text(json.dumps({**json.loads(timing.read_text()), "wall_s": 1000.0}))
    times = {id: (tmp_path / "overviews" / f"{id}.npy").stat().st_mtime_ns for id in first}
    said = go(new_pipeline, tmp_path, store=made.store.path, models=made.models, resume=True)
    assert 5 <= len(first) < 12  # those that were done by then are kept, too
    assert f"saliency: {len(first)} of 12 photographs are done already" in said
    assert f"saliency: {12 - len(first)} images done, 0 failed" in said
    assert times == {id: (tmp_path / "overviews" / f"{id}.npy").stat().st_mtime_ns for id in first}
    assert results(tmp_path) == results(undisturbed)
    assert json.loads((tmp_path / "timings.json").read_text())["saliency"]["wall_s"] > 1000


def test_without_resume_the_stage_starts_afresh(made, new_pipeline, undisturbed, go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            go(new_pipeline, tmp_path, store=made.store.path, models=made.models)
    said = go(new_pipeline, tmp_path, store=made.store.path, models=made.models)
    assert "done already" not in said
    assert "saliency: 12 images done, 0 failed" in said
    assert skipped(said) == ["preprocess"]
    assert results(tmp_path) == results(undisturbed)


def test_resume_with_another_setting_starts_afresh(made, new_pipeline, go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            go(new_pipeline, tmp_path, store=made.store.path, models=made.models)
    changed = ["saliency.border=0.2"]
    said = go(new_pipeline, tmp_path, changed, store=made.store.path, models=made.models, resume=True)
    assert "inputs or configuration changed" in said
    assert "saliency: 12 images done, 0 failed" in said
    centres = pd.read_parquet(tmp_path / "centres.parquet")
    assert centres["y_px"].between(0.2 * 301, 0.8 * 301, inclusive="neither").all()


def test_crops_survive_a_kill_after_they_were_moved(made, new_pipeline, undisturbed, go, tmp_path, monkeypatch):
    """The journal says that all crops are done, but they lie in their place already: a resumed run cuts them anew."""

    def killed(path: Path) -> str:
        if path.name == "crops.zarr":
            raise KeyboardInterrupt
        return digest(path)

    digest = runner.digest
    with monkeypatch.context() as patch:
        patch.setattr(runner, "digest", killed)
        with pytest.raises(KeyboardInterrupt):
            go(new_pipeline, tmp_path, store=made.store.path, models=made.models)
    assert (tmp_path / "crops.zarr").exists()
    assert len(list((tmp_path / "journal").glob("crops.partial-*/crops.jsonl"))) == 1
    go(new_pipeline, tmp_path, store=made.store.path, models=made.models, resume=True)
    assert results(tmp_path) == results(undisturbed)


def test_a_failed_stage_leaves_its_old_output(made, copy, go, monkeypatch):
    before = (copy / "predictions.parquet").read_bytes()

    def broken(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pandas.DataFrame.to_parquet", broken)
    with pytest.raises(OSError, match="disk full"):
        go(made.pipeline, copy, ["predict.batch_size=3"])
    assert (copy / "predictions.parquet").read_bytes() == before
    assert not [path for path in copy.rglob("*") if path.name.endswith(".tmp")]


def test_stages_are_the_pipelines_vocabulary():
    assert list(pipeline_module.STAGES) == [
        "synth", "ingest", "split", "preprocess", "train", "saliency", "crops", "windows", "predict",
        "descriptors", "bovw", "convbovw_sparse", "search", "convbovw_dense", "words", "pool", "evaluate", "localise",
        "faithfulness", "tables", "report",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_driver_is_resumed(made, new_pipeline, undisturbed, tmp_path):
    """kill -9 in the middle of the saliency stage; its workers must not outlive it."""
    command = [
        sys.executable, "-m", "tilestream", "run", str(new_pipeline), "--out", "run", "--store", str(made.store.path),
        "--models", str(made.models), "--workers", "1", "--threads", "1",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not ((journal := journal_of(tmp_path / "run")) and journal.read_bytes().count(b"\n") >= 2):
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = psutil.Process(driver.pid).children(recursive=True)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    first = [json.loads(line)["id"] for line in journal.read_text().splitlines()]
    assert len(first) < 12
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    times = {id: (tmp_path / "run" / "overviews" / f"{id}.npy").stat().st_mtime_ns for id in first}
    again = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert f"saliency: {len(first)} of 12 photographs are done already" in again.stderr
    assert times == {id: (tmp_path / "run" / "overviews" / f"{id}.npy").stat().st_mtime_ns for id in first}
    assert results(tmp_path / "run") == results(undisturbed)
