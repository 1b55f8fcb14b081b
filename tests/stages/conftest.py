"""One small run of all stages, from drawing photographs to the report, that many tests look at."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
import zarr
from PIL import Image
from rich.console import Console

from tilestream.stages import ClusterConfig, Context, load, run_pipeline
from tilestream.store import Store

NET = {"widths": [4, 4, 6, 8, 8]}
STAGES: dict[str, dict[str, Any]] = {
    "synth": {"images": 12, "seed": 5, "height_px": 301, "width_px": 397},
    "ingest": {"folder": "photographs", "labels": "photographs/labels.csv", "label_column": "level"},
    "split": {"fractions": [0.5, 0.25, 0.25], "seed": 0},
    "preprocess": {"size_px": 64},
    "train": {"epochs": 2, "batch_size": 4, "parameters": NET},
    "saliency_square": {"stage": "saliency", "resolution": "square", "splits": ["train", "validation"]},
    "crops_train": {"stage": "crops", "centres": "saliency_square", "select": "training", "size_px": 64},
    "train_crops": {
        "stage": "train", "examples": "crops", "model": "crops", "epochs": 2, "batch_size": 4, "parameters": NET,
    },
    "saliency": {"tile_px": 256, "write": True},
    "crops": {"size_px": 96},
    "predict": {},
    "evaluate": {"split": "test"},
    "report": {"title": "A small run"},
}  # fmt: skip
NEW = {
    "preprocess": {"model": "first"},
    "saliency": {"tile_px": 256},
    "crops": {"size_px": 96},
    "predict": {"decision": "stored"},
}
"""What new photographs go through: no training, so that runs can be compared byte for byte."""


@dataclass(frozen=True)
class Made:
    """A finished run."""

    run: Path
    store: Store
    pipeline: Path
    said: str

    @property
    def models(self) -> Path:
        return self.run / "models"


Go = Callable[..., str]


@pytest.fixture(scope="session")
def go(address: str) -> Go:
    """go(pipeline, run, ...): runs a pipeline on the tests' cluster, returns what it said."""

    def run(pipeline: Path, run: Path, settings: Sequence[str] = (), store: Path | None = None, **options: Any) -> str:
        torch.set_num_threads(1)
        loaded = load(pipeline, settings)
        place = store or (run / loaded.store if loaded.store else None)
        heard = io.StringIO()
        console = Console(file=heard, soft_wrap=True, width=1000)
        with Context(run, place, ClusterConfig(scheduler=address, workers=2), console=console, **options) as context:
            run_pipeline(loaded, context)
        return heard.getvalue()

    return run


@pytest.fixture(scope="session")
def write_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """write_pipeline(stages): a pipeline's file, its store below the run's folder."""

    def write(stages: dict[str, Any]) -> Path:
        path = tmp_path_factory.mktemp("pipeline") / "small.yaml"
        path.write_text(yaml.safe_dump({"store": "photographs.zarr", "stages": stages}, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, go: Go, write_pipeline: Callable[..., Path]) -> Made:
    """The run; tests only read it."""
    run, pipeline = tmp_path_factory.mktemp("made"), write_pipeline(STAGES)
    said = go(pipeline, run)
    return Made(run, Store(run / "photographs.zarr"), pipeline, said)


@pytest.fixture(scope="session")
def new_pipeline(write_pipeline: Callable[..., Path]) -> Path:
    """NEW as a file."""
    return write_pipeline(NEW)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, go: Go, made: Made, new_pipeline: Path) -> Path:
    """NEW on the run's photographs with the run's models, in a folder of its own; tests only read it."""
    run = tmp_path_factory.mktemp("undisturbed")
    go(new_pipeline, run, store=made.store.path, models=made.models)
    return run


@pytest.fixture(scope="session")
def spotted(tmp_path_factory: pytest.TempPathFactory, go: Go, write_pipeline: Callable[..., Path]) -> Path:
    """A run's folder, to be copied: 32 photographs of 120 x 150 px, with a bright spot in those of grade 2; splits,
    average image, bags of up to 20 descriptors of 8 numbers: one lies far out where there is a spot; one bag is empty.
    """
    run, rng = tmp_path_factory.mktemp("spotted"), np.random.default_rng(0)
    (run / "photographs").mkdir()
    rows, bags = ["image,level"], []
    for i in range(32):
        pixels, bag = rng.integers(40, 80, (120, 150, 3)), rng.normal(size=(rng.integers(1, 20), 8))
        if i % 2:
            y, x = rng.integers(20, 90, 2)
            pixels[y : y + 9, x : x + 9], bag[0] = 230, [6, *[0] * 7]
        Image.fromarray(pixels.astype(np.uint8)).save(run / "photographs" / f"{i:02d}.png")
        rows.append(f"{i:02d},{i % 2 * 2}")
        bags.append(bag[:0] if i == 4 else bag)
    (run / "photographs" / "labels.csv").write_text("\n".join(rows))
    stages = {name: STAGES[name] for name in ("ingest", "split", "preprocess")}
    go(write_pipeline(stages), run)
    group, counts = zarr.create_group(run / "descriptors.zarr"), [len(bag) for bag in bags]
    group.create_array("descriptors", data=np.concatenate(bags).astype(np.float32), chunks=(64, 8))
    group.create_array("keypoints", data=np.zeros((sum(counts), 4), np.float32), chunks=(64, 4))
    starts = np.cumsum([0, *counts[:-1]])
    table = pd.DataFrame({"id": [f"{i:02d}" for i in range(32)], "start": starts, "count": counts})
    table.to_parquet(run / "descriptors.parquet")
    return run
