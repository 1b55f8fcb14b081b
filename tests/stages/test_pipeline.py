"""Pipelines as files: what is read, what is refused and in which words."""

from pathlib import Path

import pytest

from tilestream.stages import load
from tilestream.stages.train import TrainConfig

GOOD = "stages: {split: {seed: 1}, first: {stage: train, epochs: 3, parameters: {widths: [4, 8]}}, report: }"


@pytest.fixture
def write(tmp_path: Path):
    def one(text: str) -> Path:
        path = tmp_path / "p.yaml"
        path.write_text(text)
        return path

    return one


@pytest.mark.parametrize(
    "name",
    ["bovw", "convbovw_dense", "convbovw_sparse", "demo", "listing1", "listing2", "naive", "paper_a", "predict"],
)
def test_shipped_pipelines_are_valid(name):
    pipeline = load(Path(name))
    assert pipeline.description
    assert pipeline.steps[-1].stage.verb == "report"


def test_steps_keep_their_order_and_names(write):
    pipeline = load(write(GOOD))
    assert [(step.name, step.stage.verb) for step in pipeline.steps] == [
        ("split", "split"), ("first", "train"), ("report", "report"),
    ]  # fmt: skip
    assert pipeline.store is None


def test_settings_are_yaml_and_go_deep(write):
    settings = [
        "first.epochs=5",
        "first.parameters.widths=[2, 2]",
        "report.title=A: B",
        "first.init=null",
        "store=x.zarr",
    ]
    settings[2] = "report.title='A: B'"
    pipeline = load(write(GOOD), settings)
    config = pipeline.steps[1].config
    assert isinstance(config, TrainConfig)
    assert (config.epochs, config.parameters, config.init) == (5, {"widths": [2, 2]}, None)
    assert pipeline.steps[2].config.title == "A: B"
    assert pipeline.store == Path("x.zarr")


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("[1, 2]", [], ["must be a mapping"]),
        ("just words", [], ["must be a mapping"]),
        ("stages: [split]", [], ["must be a mapping"]),
        ("stages: {split: 3}", [], ["stages.split", "mapping of settings", "3"]),
        ("stages: {split: ", [], ["is not YAML"]),
        ("stages: {}\nstagse: {}", [], ["stagse", "did you mean 'stages'"]),
        ("stages: {salency: {}}", [], ["'salency' is not known", "did you mean 'saliency'"]),
        ("stages: {a: {stage: trian}}", [], ["'trian' is not known", "did you mean 'train'"]),
        ("stages: {train: {epoch: 3}}", [], ["train.epoch is not known", "did you mean 'epochs'"]),
        ("stages: {train: {epochs: many}}", [], ["train.epochs='many'"]),
        ("stages: {saliency: {border: 0.5}}", [], ["saliency.border=0.5", "less than 0.5"]),
        (GOOD, ["split.seed"], ["split.seed", "stage.key=value"]),
        (GOOD, ["=3"], ["stage.key=value"]),
        (GOOD, ["split..seed=3"], ["stage.key=value"]),
        (GOOD, ["stages=3"], ["stages=3", "stage.key=value"]),
        (GOOD, ["splt.seed=3"], ["no stage 'splt'", "did you mean 'split'"]),
        (GOOD, ["split.sed=3"], ["split.sed is not known", "did you mean 'seed'"]),
        (GOOD, ["split.seed=[1"], ["split.seed=[1", "not YAML"]),
        (GOOD, ["first.epochs.x=1"], ["epochs=3 has no settings"]),
        ("stages: {split: 3}", ["split.seed=1"], ["split=3 has no settings"]),
    ],
)
def test_refusals_are_one_line_with_a_way_out(write, text, settings, words):
    with pytest.raises(ValueError, match=r"\S") as caught:
        load(write(text), settings)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_pipeline_names_the_nearest():
    with pytest.raises(FileNotFoundError, match="did you mean 'listing2'"):
        load(Path("listing"))
