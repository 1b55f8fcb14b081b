"""One checkpoint file a run: written whole or not at all, and refused by a run with other settings or data."""

import contextlib
import hashlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tilestream.training.config import TrainingConfig
from tilestream.training.loader import Examples

NAME = "checkpoint.pt"
FREE = {"epochs", "loader_threads", "cache_bytes"}  # settings that a resumed run may change


def weights(net: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the net's state on the CPU, contiguous."""
    state = net.state_dict()
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def fingerprint(net: nn.Module, train: Examples, validation: Examples, config: TrainingConfig) -> dict[str, str]:
    """Return what must not change between runs: settings, data, the net's shapes and trained parameters.

    Of the data it sees the labels, and pixels of the first, the middle and the last example.
    """
    shapes = [(name, tuple(value.shape)) for name, value in net.state_dict().items()]
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    result = {name: repr(value) for name, value in config.model_dump(exclude=FREE).items()}
    result["net"] = _digest(str((shapes, trained)).encode())
    for name, examples in (("train", train), ("validation", validation)):
        labels = np.asarray(examples.labels, dtype="<i8")
        some = [examples[index] for index in sorted({0, len(examples) // 2, len(examples) - 1})]
        result[f"{name} examples"] = str(len(examples))
        result[f"{name} labels"] = _digest(labels.tobytes())
        result[f"{name} pixels"] = _digest(*(_pixels(image) for image in some))
    return result


def _pixels(image: Any) -> bytes:
    """An image's bytes; of one that is read in windows, those of a corner."""
    return np.ascontiguousarray(image if isinstance(image, np.ndarray) else image[:, :256, :256]).tobytes()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def write(folder: Path, content: dict[str, Any]) -> None:
    """Replace the folder's checkpoint; whoever reads it, or finds it after a crash, sees the old one or the new."""
    handle, name = tempfile.mkstemp(prefix=f"{NAME}.", suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, folder / NAME)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read(folder: Path, wanted: dict[str, str], epochs: int) -> dict[str, Any] | None:
    """Return the folder's checkpoint, None if there is none; parts left behind by a killed run are removed.

    Args:
        folder: the run's folder, created if need be.
        wanted: the fingerprint of the run that resumes.
        epochs: the epochs of the run that resumes.

    Raises:
        ValueError: the file is damaged, of another fingerprint, or of more epochs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(f"{NAME}.*.part"):
        part.unlink(missing_ok=True)
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found: dict[str, str] = content["fingerprint"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no readable checkpoint; delete it to train anew") from error
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} was made with {name}={found.get(name)}, this run has {wanted.get(name)}; "
                "use the same or another folder"
            )
    if content["epochs"] > epochs:
        raise ValueError(f"{path} was made with epochs={content['epochs']}, epochs={epochs} must not be lower")
    return content
