"""Pipelines: YAML that names stages in order, each with its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from . import (
    bovw,
    convbovw,
    convbovw_dense,
    crops,
    descriptors,
    evaluate,
    faithfulness,
    ingest,
    localise,
    pool,
    predict,
    preprocess,
    report,
    saliency,
    search,
    split,
    synth,
    tables,
    train,
    windows,
    words,
)
from .base import Context, Stage, StageConfig, nearest, parse
from .runner import execute

_IN_ORDER = (
    synth, ingest, split, preprocess, train, saliency, crops, windows, predict, descriptors, bovw, convbovw, search,
    convbovw_dense, words, pool, evaluate, localise, faithfulness, tables, report,
)  # fmt: skip
STAGES: dict[str, Stage] = {s.STAGE.verb: s.STAGE for s in _IN_ORDER}
KEYS = ("description", "store", "models", "stages")


@dataclass(frozen=True)
class Step:
    """A stage under its name in the pipeline, with its checked configuration."""

    name: str
    stage: Stage
    config: StageConfig


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline. `store` is below the run's folder unless absolute; `models` is a folder of an old run."""

    steps: tuple[Step, ...]
    description: str = ""
    store: Path | None = None
    models: Path | None = None


def load(path: Path, settings: Sequence[str] = ()) -> Pipeline:
    """Reads a pipeline, applies `stage.key=value` settings, checks everything before anything runs.

    Raises FileNotFoundError, or ValueError in one line that names an unknown key and the nearest known one.
    """
    try:
        raw = yaml.safe_load(find(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"pipeline {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("stages"), dict):
        raise ValueError(f"pipeline {str(path)!r} must be a mapping with 'stages', a mapping from names to settings")
    for setting in settings:
        _apply(raw, setting)
    for key in raw:
        if key not in KEYS:
            raise ValueError(f"{key} is not known in a pipeline; {nearest(str(key), KEYS)}")
    steps = tuple(_step(name, values) for name, values in raw["stages"].items())
    store, models = (Path(str(raw[key])) if raw.get(key) else None for key in ("store", "models"))
    return Pipeline(steps, str(raw.get("description", "")), store, models)


def find(path: Path) -> Path:
    """A pipeline's file: the path as it is, or one of those that come with the package, by name."""
    shipped = [Path(str(resources.files("tilestream"))) / "pipelines", Path(__file__).parents[2] / "pipelines"]
    names = {path.name, f"{path.name}.yaml"} if len(path.parts) == 1 or path.parts[0] == "pipelines" else set()
    for candidate in [path, *(folder / name for folder in shipped for name in sorted(names))]:
        if candidate.is_file():
            return candidate
    known = sorted({p.stem for folder in shipped if folder.is_dir() for p in folder.glob("*.yaml")})
    raise FileNotFoundError(f"pipeline {str(path)!r} does not exist; {nearest(path.stem, known)}")


def run_pipeline(pipeline: Pipeline, context: Context) -> None:
    """Runs the steps in order; those whose configuration and inputs did not change are skipped, and say so."""
    with ExitStack() as held:  # by the first step that has to run, until the last is done
        for step in pipeline.steps:
            execute(step.name, step.stage, step.config, context, held)


def _step(name: str, values: Any) -> Step:
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(f"stages.{name} must be a mapping of settings, got {values!r}")
    verb = str(values.get("stage", name))
    if verb not in STAGES:
        raise ValueError(f"stage {verb!r} is not known; {nearest(verb, STAGES)}")
    settings = {key: value for key, value in values.items() if key != "stage"}
    return Step(str(name), STAGES[verb], parse(STAGES[verb].config, settings, name))


def _apply(raw: dict[str, Any], setting: str) -> None:
    """Sets `stage.key[.key]=value` (the value is YAML), or a top-level `store=` or `models=`."""
    path, equals, value = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {setting!r} must look like stage.key=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {setting!r}: the value is not YAML: {' '.join(str(error).split())}") from None
    if len(keys) == 1:
        if keys[0] not in ("store", "models"):
            raise ValueError(f"--set {setting!r} must look like stage.key=value, store=PATH or models=PATH")
        raw[keys[0]] = parsed
        return
    target = raw["stages"]
    if keys[0] not in target:
        raise ValueError(f"--set {setting!r}: this pipeline has no stage {keys[0]!r}; {nearest(keys[0], target)}")
    for key in keys[:-1]:
        target[key] = {} if target.get(key) is None else target[key]
        target = target[key]
        if not isinstance(target, dict):
            raise ValueError(f"--set {setting!r}: {key}={target!r} has no settings of its own")
    target[keys[-1]] = parsed
