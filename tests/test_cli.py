"""The command line: its fixed forms, and one clear line for whatever the caller can mend."""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zarr

from tilestream import cli, nets
from tilestream.store import Store


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of a refusal."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("tilestream: ")
        assert "Traceback" not in self.err
        return lines[0]


Command = Callable[..., Said]


@pytest.fixture
def tilestream(capfd: pytest.CaptureFixture[str]) -> Command:
    """tilestream(*words): the command line, in this process."""

    def run(*words: object) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(word) for word in words])
        found = capfd.readouterr()
        return Said(int(left.value.code or 0), found.out, found.err)

    return run


@dataclass(frozen=True)
class Place:
    """Four photographs, ingested, and models: one as training writes it, one without an average image."""

    folder: Path
    store: Path
    models: Path

    @property
    def first(self) -> Path:
        return self.models / "first.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, address: str) -> Place:
    """Made by the command line itself; tests only read it."""
    root = tmp_path_factory.mktemp("cli")
    made = Place(root / "photographs", root / "store.zarr", root / "models")
    size = ["--height-px", "256", "--width-px", "320"]
    at = ["--scheduler", address]
    for words in (
        ["synth", made.folder, "--images", "4", "--seed", "1", *size, *at],
        ["ingest", made.folder, made.store, "--labels", made.folder / "labels.csv", "--id-column", "image",
         "--label-column", "level", *at],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            cli.main([str(word) for word in words])
        assert not left.value.code
    made.models.mkdir()
    torch.manual_seed(0)
    parameters = {"widths": [4, 4, 6, 8, 8]}
    net = nets.build("ResidualNet", parameters)
    average = {"average": torch.full((3, 64, 64), 80.0)}
    for name, extra in (("first", average), ("bare", {})):
        path = made.models / f"{name}.safetensors"
        nets.save_model(path, net, architecture="ResidualNet", parameters=parameters, preprocessing=extra)
    torch.save(net.state_dict(), made.models / "pickled.safetensors")
    return made


def tree(folder: Path) -> dict[str, int]:
    """Every file below a folder, with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# the fixed forms


def test_synth_writes_photographs_labels_and_lesions(place):
    table = pd.read_csv(place.folder / "labels.csv")
    assert list(table.columns) == ["image", "level"]
    assert {path.stem for path in place.folder.glob("*.jpeg")} == set(table["image"])
    assert {path.stem for path in (place.folder / "lesions").iterdir()} == set(table["image"])


def test_synth_makes_the_same_files_again(place, tilestream, tmp_path, address):
    size = ("--height-px", 256, "--width-px", 320)
    assert (
        tilestream("synth", tmp_path / "again", "--images", 4, "--seed", 1, *size, "--scheduler", address).status == 0
    )
    for path in place.folder.glob("*.jpeg"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_info_for_people_and_for_machines(place, tilestream):
    facts = json.loads(tilestream("info", place.store, "--json").out)
    assert facts["images"] == 4
    assert facts["quarantined"] == 0
    assert facts["megapixels"] == pytest.approx(4 * 256 * 320 / 1e6)
    assert facts["bytes"] > 4 * 256 * 320
    said = tilestream("info", place.store)
    assert said.status == 0
    assert "images       4" in said.out


def test_plan_prints_tiles_memory_and_flops(tilestream):
    said = tilestream("plan", "--net", "resnet18", "--size", "2848x4288", "--memory", "2GiB")
    assert said.status == 0
    assert "image 2848 x 4288 px" in said.out
    for word in ("tiles", "halo", "peak", "FLOP"):
        assert word in said.out
    facts = json.loads(tilestream("plan", "--size", "300x400", "--tile", 128, "--json").out)
    assert (facts["tiles"], facts["image"]) == (12, [300, 400])


def test_plan_takes_a_model_file(place, tilestream):
    assert tilestream("plan", "--net", place.first, "--size", "300x400").status == 0


def test_saliency_of_a_model_file(place, tilestream, tmp_path, address):
    said = tilestream(
        "saliency", place.store, tmp_path / "run", "--model", place.first, "--workers", 2, "--memory", "2GiB",
        "--scheduler", address, "--limit", 2, "--write",
    )  # fmt: skip
    assert said.status == 0, said.err
    centres = pd.read_parquet(tmp_path / "run" / "centres.parquet")
    assert list(centres.columns[:4]) == ["id", "y_px", "x_px", "value"]
    for row in centres.itertuples():
        written = np.asarray(zarr.open_array(tmp_path / "run" / "saliency.zarr" / row.id, mode="r")[:])
        assert written[row.y_px, row.x_px] == np.float32(row.value)


def test_relative_paths_reach_workers_elsewhere(place, tilestream, tmp_path, address, monkeypatch):
    """The workers were started in another folder than the command."""
    shutil.copytree(place.store, tmp_path / "s.zarr")
    shutil.copy(place.first, tmp_path / "m.safetensors")
    monkeypatch.chdir(tmp_path)
    at = ("--scheduler", address)
    said = tilestream("saliency", "s.zarr", "run", "--model", "m.safetensors", "--limit", 1, *at)
    assert said.status == 0, said.err
    assert tilestream("crops", "s.zarr", "run", "--size-px", 64, *at).status == 0
    assert tilestream("report", "s.zarr", "run").status == 0
    assert (tmp_path / "run" / "report.html").exists()
    shutil.copytree(place.folder, tmp_path / "photographs")
    assert tilestream("ingest", "photographs", "t.zarr", *at).status == 0


def test_run_takes_settings_models_and_skips(place, tilestream, tmp_path, address):
    (tmp_path / "p.yaml").write_text("stages: {preprocess: {model: first}, saliency: {limit: 1}, crops: {size_px: 64}}")
    words = (
        "run", tmp_path / "p.yaml", "--store", place.store, "--out", tmp_path / "run", "--models", place.models,
        "--set", "saliency.tile_px=256", "--set", "crops.size_px=32", "--scheduler", address,
    )  # fmt: skip
    said = tilestream(*words)
    assert said.status == 0, said.err
    assert zarr.open_array(tmp_path / "run" / "crops.zarr" / "image", mode="r").shape == (1, 3, 32, 32)
    assert tilestream(*words).err.count("unchanged, skipped") == 3


@pytest.mark.parametrize("verb", ["synth", "ingest", "info", "plan", "saliency", "run", "demo", "train", "predict"])
def test_every_verb_explains_itself(tilestream, verb):
    said = tilestream(verb, "--help")
    assert said.status == 0
    assert "Usage: tilestream" in said.out


def test_demo_takes_a_folder(tilestream):
    assert "--out" in tilestream("demo", "--help").out


def test_python_m_tilestream():
    done = subprocess.run([sys.executable, "-m", "tilestream", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "saliency" in done.stdout


def test_import_alone_loads_no_torch():
    heavy = "[m for m in ('torch', 'dask', 'zarr', 'xarray', 'pandas') if m in sys.modules]"
    code = f"import sys, tilestream; tilestream.__version__; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# what the caller can mend


def test_refusals_before_anything_is_written(place, tilestream, tmp_path):
    run, bare = tmp_path / "run", tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "text.yaml").write_text("just words")
    (tmp_path / "p.yaml").write_text("stages: {train: {epoch: 3}}")
    (tmp_path / "good.yaml").write_text("stages: {split: {}}")
    to = ("--store", place.store, "--out", run)
    saliency = ("saliency", place.store, run, "--model")
    refusals: list[tuple[tuple[object, ...], list[str]]] = [
        (("ingest", tmp_path / "none", tmp_path / "s.zarr"), ["none", "not a folder"]),
        (("ingest", bare, tmp_path / "s.zarr"), ["bare", "no photographs"]),
        (("ingest", place.folder, tmp_path / "s.zarr", "--labels", tmp_path / "none.csv"), ["none.csv"]),
        (("ingest", place.folder, tmp_path / "s.zarr", "--labels", place.folder / "labels.csv", "--id-column", "imag"),
         ["'imag'", "'image'", "'level'"]),
        (("ingest", place.folder, place.folder), ["not a store"]),
        (("info", tmp_path / "none.zarr"), ["none.zarr", "does not exist"]),
        (("info", bare), ["bare", "not a tilestream store"]),
        (("plan", "--size", "large"), ["size='large'", "HEIGHTxWIDTH"]),
        (("plan", "--size", "300x400", "--net", "resnet81"), ["net='resnet81'", "resnet18"]),
        (("plan", "--size", "300x400", "--memory", "2GiB", "--tile", "128"), ["give one of them"]),
        (("plan", "--size", "2848x4288", "--net", "resnet18", "--memory", "1MiB"), ["memory=1048576 bytes"]),
        (("run", "listing", *to), ["'listing'", "did you mean 'listing2'"]),
        (("run", tmp_path / "text.yaml", *to), ["must be a mapping"]),
        (("run", tmp_path / "p.yaml", *to), ["train.epoch", "did you mean 'epochs'"]),
        (("run", tmp_path / "good.yaml", *to, "--set", "split.seed"), ["stage.key=value"]),
        (("run", tmp_path / "good.yaml", *to, "--set", "splitt.seed=1"), ["'splitt'", "did you mean 'split'"]),
        (("run", tmp_path / "good.yaml", "--out", run), ["--store"]),
        (("run", tmp_path / "good.yaml", "--out", run, "--store", bare), ["not a tilestream store"]),
        (("train", place.store, run, "--parameters", "{widths: [4"), ["parameters"]),
        (("train", place.store, run, "--epochs", "many"), ["epochs='many'"]),
        ((*saliency, place.first, "--memory", "much"), ["memory='much'"]),
        ((*saliency, place.first, "--workers", "0"), ["workers='0'"]),
        ((*saliency, place.first, "--methd", "x"), ["--methd"]),
        (("salincy", place.store), ["salincy"]),
    ]  # fmt: skip
    for words, expected in refusals:
        before = tree(tmp_path)
        said = tilestream(*words)
        assert said.status == 2, (words, said)
        for word in expected:
            assert word in said.line
        assert tree(tmp_path) == before, words
        assert not run.exists(), words


def test_refusals_by_stages_leave_no_result(place, tilestream, tmp_path):
    run = tmp_path / "run"
    saliency = ("saliency", place.store, run, "--model")
    refusals: list[tuple[tuple[object, ...], list[str]]] = [
        ((*saliency, place.models / "frist.safetensors"), ["does not exist", "did you mean 'first'"]),
        ((*saliency, place.models / "pickled.safetensors"), ["pickled.safetensors", "is a pickle, which may run"]),
        ((*saliency, place.models / "bare.safetensors", "--resolution", "square"), ["resolution=full"]),
        ((*saliency, place.first, "--memory", "100KiB"), ["memory=102400 bytes", "smallest budget", "MiB"]),
        ((*saliency, place.first, "--tile-px", "100"), ["100", "128"]),
        ((*saliency, place.first, "--target", "2"), ["target=2"]),
        ((*saliency, place.first, "--splits", "test"), ["splits.parquet", "tilestream split"]),
        (("preprocess", place.store, run, "--model", place.models / "bare.safetensors"), ["no average image"]),
        (("preprocess", place.store, run), ["splits.parquet", "tilestream split"]),
        (("train", place.store, run), ["average.npy", "tilestream preprocess"]),
        (("crops", place.store, run), ["centres.parquet", "tilestream saliency"]),
        (("predict", place.store, run), ["crops.parquet", "tilestream crops"]),
        (("evaluate", place.store, run), ["predictions.parquet", "tilestream predict"]),
        (("split", place.store, run, "--fractions", "0.5,0.5,0.5"), ["fractions", "sum to 1"]),
    ]  # fmt: skip
    for words, expected in refusals:
        said = tilestream(*words)
        assert said.status == 2, (words, said)
        last = said.err.splitlines()[-1]
        assert last.startswith("tilestream: ")
        for word in expected:
            assert word in last, (words, said.err)
        assert said.err.count("tilestream: ") == 1
        assert "Traceback" not in said.err
        shutil.rmtree(run / "journal")
        shutil.rmtree(run / "plans", ignore_errors=True)  # plans are no results
        assert not [path for path in run.rglob("*") if path.is_file()], words


def test_initial_weights_that_do_not_fit(place, tilestream, tmp_path, address):
    run = tmp_path / "run"
    run.mkdir()
    ids = Store(place.store).ids
    pd.DataFrame({"id": ids, "split": ["train", "validation"] * 2}).to_parquet(run / "splits.parquet")
    assert tilestream("preprocess", place.store, run, "--size-px", 64, "--scheduler", address).status == 0
    for init, word in (
        (place.models / "pickled.safetensors", "is a pickle, which may run any code"),
        (place.models / "none.safetensors", "none.safetensors"),
        (place.first, "does not fit"),
    ):
        said = tilestream("train", place.store, run, "--init", init, "--parameters", "{widths: [4, 8]}")
        assert said.status == 2, said
        assert word in said.err.splitlines()[-1]
        assert not (run / "models").exists()


def test_an_unknown_scheduler_is_said_quickly(place, tilestream, tmp_path):
    started = time.monotonic()
    said = tilestream("ingest", place.folder, tmp_path / "s.zarr", "--scheduler", "tcp://127.0.0.1:1")
    assert said.status == 2
    assert "tcp://127.0.0.1:1" in said.line
    assert time.monotonic() - started < 30


def test_missing_and_unreadable_photographs_are_quarantined(place, tilestream, tmp_path, address):
    shutil.copytree(place.folder, tmp_path / "photographs")
    bad = tmp_path / "photographs" / "2_left.jpeg"
    bad.write_bytes(bad.read_bytes()[:3000])
    (tmp_path / "photographs" / "1_right.jpeg").unlink()
    labels = ("--labels", tmp_path / "photographs" / "labels.csv", "--label-column", "level")
    said = tilestream("ingest", tmp_path / "photographs", tmp_path / "s.zarr", *labels, "--scheduler", address)
    assert said.status == 0
    assert "1_right quarantined: missing_file" in said.err
    assert "2_left quarantined" in said.err
    assert "4 photographs = 2 committed + 0 there already + 2 quarantined" in said.err
    facts = json.loads(tilestream("info", tmp_path / "s.zarr", "--json").out)
    assert (facts["images"], facts["quarantined"]) == (2, 2)


def test_debug_shows_the_traceback(tilestream, tmp_path):
    said = tilestream("info", tmp_path / "none.zarr", "--debug")
    assert said.status == 2
    assert "Traceback" in said.err
    assert said.err.splitlines()[-1].startswith("tilestream: path=")


def test_a_failure_that_is_not_the_callers_is_status_1(tilestream, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tilestream.stages.plan_text", broken)
    said = tilestream("plan", "--size", "300x400")
    assert said.status == 1
    assert "No space left" in said.line


def test_an_interrupt_is_status_130(tilestream, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tilestream.stages.plan_text", stop)
    said = tilestream("plan", "--size", "300x400")
    assert said.status == 130
    assert "--resume" in said.line


# watching and converting


def test_the_page_of_a_cluster(tilestream, address):
    said = tilestream("dashboard", "--scheduler", address)
    assert (said.status, said.err) == (0, "")
    assert said.out.strip().startswith("http://127.0.0.1:")
    assert said.out.strip().endswith("/tilestream")
    page = json.loads(tilestream("dashboard", "--scheduler", address, "--json").out)
    assert page == {"page": said.out.strip(), "json": f"{said.out.strip()}.json"}
    with urllib.request.urlopen(page["json"], timeout=10) as answer:
        assert json.load(answer)["version"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the folder of a run that goes on, or --scheduler ADDRESS"),
        (["none"], "no run with a cluster goes on in 'none'"),
        (["none", "--scheduler", "tcp://127.0.0.1:1"], "give the folder of a run that goes on, or --scheduler ADDRESS"),
        (["--scheduler", "tcp://10.0.0.5:8786"], "is beyond this machine and not encrypted"),
    ],
)
def test_no_page(tilestream, words, message):
    said = tilestream("dashboard", *words)
    assert said.status == 2
    assert message in said.line


def test_checkpoints_become_model_files(place, tilestream, tmp_path):
    old, new = place.models / "pickled.safetensors", tmp_path / "new.safetensors"
    words = ["convert", old, new, "--net", "ResidualNet", "--parameters", "{widths: [4, 4, 6, 8, 8]}"]
    assert tilestream(*words) == Said(0, "", "")
    assert torch.equal(nets.load_model(new).net.stem.weight, nets.load_model(place.first).net.stem.weight)
    for more, message in (
        (words, "is there already; give another name"),
        ([*words[:2], tmp_path / "x", "--net", "resnet18"], "does not fit net='resnet18'"),
        ([*words[:2], tmp_path / "x", "--net", "resnet18", "--parameters", "["], "is not YAML"),
        ([*words[:2], tmp_path / "x", "--net", "resnet18", "--parameters", "3"], "must be a mapping"),
    ):
        said = tilestream(*more)
        assert said.status == 2
        assert message in said.line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--host", "0.0.0.0"], "host='0.0.0.0' listens beyond this machine"),
        (["--scheduler", "tcp://10.0.0.5:8786"], "is beyond this machine and not encrypted"),
        (["--scheduler", "tls://127.0.0.1:1"], "speaks TLS; give tls_ca, tls_cert and tls_key"),
        (["--scheduler", "tcp://127.0.0.1:1", "--tls"], "tls makes credentials for a new cluster"),
        (["--tls-ca", "ca.pem"], "tls_cert is not given"),
        (["--stall-timeout", "inf"], "stall_timeout"),
        (["--device", "tpu"], "device"),
    ],
)
def test_what_is_refused_of_a_cluster(place, tilestream, tmp_path, option, message):
    said = tilestream("ingest", place.folder, tmp_path / "s.zarr", *(option if "--device" not in option else []))
    if "--device" in option:
        said = tilestream("saliency", place.store, tmp_path / "run", *option)
    assert said.status == 2
    assert message in said.err.splitlines()[-1]
