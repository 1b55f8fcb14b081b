"""Generated photographs: noise, for it hides nothing; and stores of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tilestream.store import create_store, find_photographs, ingest_photograph

Pixels = npt.NDArray[np.uint8]


@pytest.fixture
def noise() -> Callable[..., Pixels]:
    """noise(height, width, channels, seed): random uint8 pixels."""

    def make(height: int = 70, width: int = 90, channels: int = 3, seed: int = 0) -> Pixels:
        shape = (height, width, channels) if channels > 1 else (height, width)
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for photographs."""
    path = tmp_path / "photographs"
    path.mkdir()
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """An empty store."""
    return create_store(tmp_path / "store.zarr")


@pytest.fixture
def filled(store: Path, folder: Path, noise: Callable[..., Pixels]) -> Path:
    """A store of three photographs: a (70 x 90), b (600 x 1300), c (70 x 90), noise of seeds 0, 1, 2."""
    for seed, (name, size) in enumerate({"a": (70, 90), "b": (600, 1300), "c": (70, 90)}.items()):
        Image.fromarray(noise(*size, seed=seed)).save(folder / f"{name}.png")
    for source in find_photographs(folder):
        assert ingest_photograph(store, source)["status"] == "committed"
    return store
