"""Results stay what they are whatever is killed: two of the runs that benchmarks/kills.py makes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"
PIPELINE = """
stages:
  preprocess: {model: first}
  saliency: {tile_px: 512}
  crops: {size_px: 96}
  predict: {decision: stored}
"""


@pytest.mark.slow
def test_two_runs_with_ten_kills_each(made, tmp_path):
    photographs = tmp_path / "photographs"
    size = ["--height-px", "1200", "--width-px", "1600"]
    for words in (["synth", photographs, "--images", "24", "--seed", "1", *size], ["ingest", photographs, "s.zarr"]):
        subprocess.run([sys.executable, "-m", "tilestream", *map(str, words)], cwd=tmp_path, check=True)
    (tmp_path / "predict.yaml").write_text(PIPELINE)
    spec = importlib.util.spec_from_file_location("kills", SCRIPT)
    kills = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kills)
    places = [str(tmp_path / "s.zarr"), str(made.models), "--pipeline", str(tmp_path / "predict.yaml")]
    rows = kills.main([*places, "--runs", "2", "--kills", "10", "--every", "1.5", "--folder", str(tmp_path / "runs")])
    assert [row["digests"] for row in rows[1:]] == [rows[0]["digests"]] * 2
    assert min(row["kills"] for row in rows[1:]) >= 10
