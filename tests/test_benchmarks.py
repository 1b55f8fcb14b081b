"""A tiny version of each benchmark runs: numbers come out, and mean what they say."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent / "benchmarks"


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
        budget,
        "--repeats",
        "1",
        "--threads",
        "1",
    ]
    rows = load("engine").main([*words, "--out", str(out)])
    assert [row["variant"] for row in rows] == ["plain", "channels-last folded", budget]
    assert all(row["seconds"] > 0 and row["useful_gflops"] > 0 for row in rows)
    plain, _, cut = rows
    assert cut["overhead"] > 1 == plain["overhead"]
    assert cut["bytes"] < plain["bytes"]
    assert cut["bytes"] <= cut["predicted_bytes"] <= 150 * 2**20
    assert "of peak" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == rows


def test_sizes(tmp_path, capsys):
    out = tmp_path / "sizes.json"
    rows = load("sizes").main(["--sizes", "256,512", "--memory", "100MiB", "--threads", "1", "--out", str(out)])
    assert [row["size"] for row in rows] == [256, 512]
    assert all(0 < row["bytes"] <= row["predicted_bytes"] <= 100 * 2**20 for row in rows)
    assert "ns/px" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == rows
