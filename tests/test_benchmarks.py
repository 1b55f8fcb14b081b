"""A tiny version of each benchmark runs: numbers come out, and mean what they say."""

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def neighbours(monkeypatch):
    """Benchmarks find each other, as when they are run as scripts."""
    monkeypatch.syspath_prepend(ROOT)


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_engine(tmp_path, capsys):
    out = tmp_path / "engine.json"
    budget = "150MiB"  # it must cut the image
    words = [
        "--net",
        "ResidualNet",
        "--size",
        "1024x1024",
        "--budgets",
        f"{budget},bf16 tile=256",
        "--repeats",
        "1",
        "--threads",
        "1",
    ]
    rows = load("engine").main([*words, "--out", str(out)])
    short = "channels-last folded bf16"
    assert [row["variant"] for row in rows] == ["plain", "channels-last folded", short, budget, "bf16 tile=256"]
    assert all((0.01 < row["error"] < 0.5) == ("bf16" in row["variant"]) for row in rows)
    assert all(row["seconds"] > 0 and row["useful_gflops"] > 0 for row in rows)
    plain, _, _, cut, _ = rows
    assert cut["overhead"] > 1 == plain["overhead"]
    assert cut["bytes"] < plain["bytes"]
    assert cut["bytes"] <= cut["predicted_bytes"] <= 150 * 2**20
    assert "of peak" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == rows


PEER = ["--task", "weights", "--net", "resnet18", "--size", "256x256", "--budgets", "300MiB", "--repeats", "1"]
PEER += ["--skip", "plain,channels-last,checkpoint", "--threads", "1"]


def test_engine_runs_the_peer_with_its_own_python(tmp_path):
    python = tmp_path / "python"  # stands in for that environment's: lightstream is not to be had in this one
    numbers = {"seconds": 2, "bytes": 3, "predicted_bytes": 0, "overhead": 1, "useful_gflops": 4}
    line = json.dumps(numbers | {"convolution_gflops": 5})
    python.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/words\necho '{line}'\n")
    python.chmod(0o755)
    rows = load("engine").main([*PEER, "--lightstream", f"{python}:1024,2048"])
    assert [row["variant"] for row in rows] == ["lightstream 1024", "lightstream 2048", "300MiB"]
    assert [row["seconds"] for row in rows[:2]] == [2, 2]
    words = f"{ROOT}/peer.py --net resnet18 --size 256x256 --threads 1 --tile"
    assert (tmp_path / "words").read_text().splitlines() == [f"{words} 1024", f"{words} 2048"]


def test_engine_says_what_the_peer_lacks(capsys):
    with pytest.raises(RuntimeError, match="'lightstream 1024' failed: ModuleNotFoundError: No module named"):
        load("engine").main([*PEER, "--lightstream", f"{sys.executable}:1024"])
    with pytest.raises(SystemExit, match="2"):
        load("engine").main(["--task", "saliency", "--lightstream", f"{sys.executable}:1024"])
    assert "with --task weights" in capsys.readouterr().err


def test_a_call_that_fails_ends():
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        load("engine").watched(lambda: 1 / 0)
    assert threading.active_count() == threads


def test_sizes(tmp_path, capsys):
    out = tmp_path / "sizes.json"
    rows = load("sizes").main(["--sizes", "256,512", "--memory", "100MiB", "--threads", "1", "--out", str(out)])
    assert [row["size"] for row in rows] == [256, 512]
    assert all(0 < row["bytes"] <= row["predicted_bytes"] <= 100 * 2**20 for row in rows)
    assert "ns/px" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == rows


def test_dense(tmp_path, capsys):
    out = tmp_path / "dense.json"
    words = ["--size", "512x640", "--words", "9", "--memory", "60MiB", "--repeats", "1", "--threads", "1"]
    rows = load("dense").main([*words, "--out", str(out)])
    assert [(row["task"], row["variant"]) for row in rows] == [
        (task, variant) for task in ("forward", "weights") for variant in ("plain", "channels-last", "60MiB")
    ]
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in rows)
    assert all(row["bytes"] <= row["predicted_bytes"] <= 60 * 2**20 for row in rows if row["variant"] == "60MiB")
    assert 0 < rows[-1]["gone_back"] < rows[-1]["back_tiles"]  # a winner is in one tile of each segment, or some
    assert "tiles back" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == rows


@pytest.fixture
def photographs(tmp_path):
    """Five JPEG files, 600 x 700."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 60, (600, 700, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


def test_ingest(photographs):
    command = [sys.executable, str(ROOT / "ingest.py"), str(photographs), "--count", "4", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # it starts processes that import it
    lines = done.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == ["floor", "tilestream", "Pillow and zarr"]
    assert all(float(line.split()[-3]) > 0 for line in lines)


def test_memory_of_ingest():
    small, large = load("ingest").main(["--memory", "--megapixels", "1,9"])
    assert small["variant"] == "992 x 992 px"
    assert 50 < small["peak_mib"] < large["peak_mib"] * 1.1 < 1000


def test_storage(photographs, tmp_path):
    out = tmp_path / "storage.json"
    rows = load("storage").main([str(photographs), "--count", "2", "--crops", "2", "--out", str(out)])
    assert [row["codec"] for row in rows] == ["zstd", "lz4", "jpegxl"]
    assert all(row["crop_of_chunks"] > 0 and row["of_jpeg"] > 0 for row in rows)
    assert rows[1]["mb_each"] > rows[0]["mb_each"] > rows[2]["mb_each"]
    assert json.loads(out.read_text())["rows"] == rows


def test_cluster_of_a_network_that_does_nothing(tmp_path):
    out = tmp_path / "window.json"
    rows = load("cluster").main(["--stub", "60", "--out", str(out)])
    assert [row["images"] for row in rows] == list(range(6, 61, 6))
    assert all(row["ms_a_task"] > 0 and row["scheduler_mib"] > 20 and row["driver_mib"] > 20 for row in rows)
    assert json.loads(out.read_text())["rows"] == rows
