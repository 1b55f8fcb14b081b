"""What `ingest` does to labels when it is run again."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tilestream.stages import STAGES, ClusterConfig, Context
from tilestream.store import Store


@pytest.fixture
def ingest(tmp_path: Path, address: str):
    """ingest(folder, {name: label}, seed): photographs of noise and their CSV go to one store; what was said."""

    def one(folder: str, labels: dict[str, int], seed: int = 0) -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        for number, name in enumerate(labels):
            pixels = np.random.default_rng([seed, number]).integers(0, 256, (60, 80, 3), np.uint8)
            Image.fromarray(pixels).save(place / f"{name}.png")
        (place / "labels.csv").write_text("image,level\n" + "".join(f"{n},{v}\n" for n, v in labels.items()))
        said = io.StringIO()
        context = Context(tmp_path, tmp_path / "s.zarr", ClusterConfig(scheduler=address), console=Console(file=said))
        stage = STAGES["ingest"]
        with context:
            stage.run(stage.config(folder=place, labels=place / "labels.csv", label_column="level"), context)
        return " ".join(said.getvalue().split())

    return one


def test_labels_that_get_lost_are_told(ingest, tmp_path):
    assert "warning" not in ingest("first", {"a": 0, "b": 3})
    assert "warning: 2 stored photographs are not in these labels" in ingest("second", {"c": 4}, seed=1)
    assert Store(tmp_path / "s.zarr").samples().set_index("id")["label"].dropna().to_dict() == {"c": 4}


def test_labels_of_other_photographs_do_not_replace_those_stored(ingest, tmp_path):
    ingest("first", {"a": 0, "b": 3})
    with pytest.raises(ValueError, match="2 photographs are not those stored"):
        ingest("other", {"a": 4, "b": 4}, seed=1)
    assert Store(tmp_path / "s.zarr").samples()["label"].tolist() == [0, 3]
