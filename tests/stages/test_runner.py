"""What keeps a run's folder whole: the journal, files that appear at once, hashes."""

import json
from pathlib import Path

import pytest

from tilestream.stages import Context
from tilestream.stages.base import Stage, StageConfig, digest, replacing, write_json
from tilestream.stages.runner import Journal, Meter, execute


def test_a_journal_forgets_what_a_kill_tore_off(tmp_path: Path):
    path = tmp_path / "j.jsonl"
    Journal(path).append({"id": "a", "n": 1})
    path.write_bytes(path.read_bytes() + b'{"id": "b"')
    assert Journal(path).read() == {"a": {"id": "a", "n": 1}}
    journal = Journal(path)
    journal.append({"id": "c", "n": 3})
    journal.append({"id": "d", "n": 4})
    assert list(journal.read()) == ["a", "c", "d"]
    assert path.read_bytes().count(b"\n") == 3


def test_a_journal_takes_no_nan(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        Journal(tmp_path / "j.jsonl").append({"id": "a", "value": float("nan")})
    assert not (tmp_path / "j.jsonl").exists() or not (tmp_path / "j.jsonl").read_bytes()


def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path: Path):
    path = tmp_path / "sub" / "x.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_digest_sees_names_and_bytes(tmp_path: Path):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = digest(folder)
    (folder / "a").rename(folder / "b")
    renamed = digest(folder)
    (folder / "b").write_text("2")
    assert len({first, renamed, digest(folder), digest(tmp_path / "none")}) == 4


class Config(StageConfig):
    """For a stage of two lines."""

    text: str = "x"
    speed: int = 1


def make_stage(calls: list[str]) -> Stage:
    def run(config: Config, context: Context) -> None:
        calls.append(config.text)
        (context.run / "out.txt").write_text(config.text)

    return Stage(
        "write", Config, run, writes=lambda _, context: [context.run / "out.txt"], uses_store=False,
        operational=frozenset({"speed"}),
    )  # fmt: skip


def test_a_stage_runs_when_its_settings_or_output_changed(tmp_path: Path):
    calls: list[str] = []
    stage = make_stage(calls)
    with Context(tmp_path) as context:
        assert execute("write", stage, Config(), context)
        assert not execute("write", stage, Config(), context)
        assert not execute("write", stage, Config(speed=2), context)
        assert execute("write", stage, Config(text="y"), context)
        (tmp_path / "out.txt").unlink()
        assert execute("write", stage, Config(text="y"), context)
    assert calls == ["x", "y", "y"]


def test_a_run_folder_named_another_way_is_the_same(tmp_path: Path, monkeypatch):
    calls: list[str] = []
    stage = make_stage(calls)
    monkeypatch.chdir(tmp_path)
    assert execute("write", stage, Config(), Context(Path("run")))
    assert not execute("write", stage, Config(), Context(tmp_path / "run"))
    monkeypatch.chdir("run")
    assert not execute("write", stage, Config(), Context(Path()))


def test_a_meter_goes_on_from_a_killed_beginning(tmp_path):
    before = {"wall_s": 100.0, "peak_driver_bytes": 2**45, "peak_worker_bytes": 7}
    (tmp_path / "timing.json").write_text(json.dumps(before))
    with Meter(tmp_path / "timing.json") as meter:
        meter._done.wait(0.2)
    kept = json.loads((tmp_path / "timing.json").read_text())
    assert kept == meter.record()
    assert 100.2 <= kept["wall_s"] < 110
    assert kept["peak_bytes"] == kept["peak_driver_bytes"] == 2**45


def test_a_meter_sees_memory_come_and_go(tmp_path):
    with Meter(tmp_path / "timing.json") as meter:
        block = bytearray(200 * 2**20)
        block[::4096] = b"x" * len(block[::4096])
        meter._done.wait(0.3)
    del block
    assert meter.record()["peak_driver_bytes"] > 200 * 2**20
    assert meter.record()["wall_s"] >= 0.3
