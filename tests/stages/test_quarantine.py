"""A photograph at which worker processes die, and what else a stage refuses or says of its workers."""

import io
import json
import os
from dataclasses import replace

import dask
import pandas as pd
import pytest
import torch
from rich.console import Console

from tilestream.cluster import Reduction
from tilestream.stages import STAGES, ClusterConfig, Context, execute, runner
from tilestream.stages import saliency_tasks as tasks

BAD = "3_left"


@pytest.fixture
def saliency(made, tmp_path):
    """saliency(cluster, **settings): the stage in a run of its own; what was said, and the context."""

    def one(cluster: ClusterConfig, resume: bool = False, **settings):
        said = io.StringIO()
        console = Console(file=said, soft_wrap=True, width=1000)
        stage = STAGES["saliency"]
        with Context(tmp_path, made.store.path, cluster, made.models, resume, console=console) as context:
            try:
                execute("saliency", stage, stage.config(tile_px=256, **settings), context)
            finally:
                text = said.getvalue()
        return text

    return one


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_photograph_that_kills_workers_is_quarantined_and_the_rest_done(saliency, made, tmp_path, monkeypatch):
    original = tasks.reduction

    def poisoned(task: tasks.Task) -> Reduction:
        found = original(task)
        return replace(found, map=lambda *part: os._exit(1)) if task.id == BAD else found

    monkeypatch.setattr(tasks, "reduction", poisoned)
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        said = saliency(ClusterConfig(workers=2))
    assert f"saliency: {BAD} is quarantined: its tasks ended 1 worker processes in a row while nothing else ran" in said
    assert f"saliency: 1 photographs are quarantined: {BAD}" in said
    centres = pd.read_parquet(tmp_path / "centres.parquet")
    assert set(centres["id"]) == set(made.store.ids) - {BAD}
    (lost,) = json.loads((tmp_path / "quarantine" / "saliency.json").read_text())
    assert lost["id"] == BAD
    whole = pd.read_parquet(made.run / "centres.parquet")
    pd.testing.assert_frame_equal(centres, whole[whole["id"] != BAD].reset_index(drop=True))


def test_unfinished_work_goes_on_only_with_the_threads_it_was_begun_with(saliency, address, monkeypatch):
    append = runner.Journal.append

    def interrupt(self, record):
        append(self, record)
        if self.path.name == "centres.jsonl":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner.Journal, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            saliency(ClusterConfig(scheduler=address, threads=1))
    with pytest.raises(ValueError, match=r"threads=2, but the unfinished work was done with threads=1.*--threads 1"):
        saliency(ClusterConfig(scheduler=address, threads=2), resume=True)


def test_a_worker_with_less_memory_than_the_budget_is_named(saliency, address):
    with pytest.raises(ValueError, match=r"worker tcp://127.0.0.1:\d+ may take .* GiB, memory=1024.0 GiB"):
        saliency(ClusterConfig(scheduler=address, memory="1TiB"))


def test_a_gpu_that_nobody_offers(saliency, address):
    with pytest.raises(
        ValueError, match="device='cuda', but no worker offers a GPU; start them with --resources GPU=1"
    ):
        saliency(ClusterConfig(scheduler=address, device="cuda"))


def test_bf16_says_how_far_it_is_from_float32(saliency, address, tmp_path):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        with pytest.raises(ValueError, match="this cpu has no bfloat16; use float32"):
            saliency(ClusterConfig(scheduler=address), precision="bf16")
        return
    said = saliency(ClusterConfig(scheduler=address), precision="bf16")
    (line,) = [line for line in said.splitlines() if "bf16 differs from float32 by" in line]
    assert 0 < float(line.split("by ")[1].split("%")[0]) < 100
    assert len(pd.read_parquet(tmp_path / "centres.parquet")) == 12


def test_progress_as_json(made, address, tmp_path, capfd):
    cluster = ClusterConfig(scheduler=address, as_json=True)
    with Context(tmp_path, made.store.path, cluster, made.models) as context:
        stage = STAGES["saliency"]
        execute("saliency", stage, stage.config(tile_px=256), context)
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert {line["action"] for line in lines} == {"say", "state"}
    last = [line for line in lines if line["action"] == "state" and line["stage"] == "saliency"][-1]
    assert (last["images"], last["total_images"], last["failed"], last["ended"]) == (12, 12, 0, True)
    assert last["tiles"] == last["total_tiles"] > 12
    assert last["run"] == str(tmp_path)
