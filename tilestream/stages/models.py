"""Model files by name or path."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
import yaml

from tilestream.nets import Model, convert, load_model

from .base import Context, nearest

FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")
"""Endings of files; those of pickles are refused when they are read, and what converts them is named."""


def locate(context: Context, model: str) -> Path:
    """The file of a model: a path as it is, a bare name in the run's models (or in those of an old run)."""
    if model.endswith(FILES) or "/" in model:
        return Path(model).absolute()
    return context.models_path / f"{model}.safetensors"


def read_model(context: Context, model: str, net: str | None = None) -> Model:
    """A model, read; FileNotFoundError names the models that are there."""
    path = locate(context, model)
    if not path.is_file():
        there = [p.stem for p in sorted(path.parent.glob("*.safetensors"))] if path.parent.is_dir() else []
        hint = f"; {nearest(path.stem, there)}" if there else ""
        raise FileNotFoundError(f"model file {str(path)!r} does not exist{hint}")
    return load_model(path, architecture=net)


@lru_cache(maxsize=2)
def read_once(path: str, sha256: str, net: str | None = None) -> Model:
    """On a worker: a model, once a process; ValueError where the file is not the one that the driver saw."""
    if hashlib.sha256(Path(path).read_bytes()).hexdigest() != sha256:
        raise ValueError(f"model file {path!r} changed while the run was going on; start the run again")
    return load_model(path, architecture=net)


def own_device(context: Context) -> str:
    """Where this process runs networks by itself: on its GPU, if it has one and that is not declined, or on the CPU."""
    return "cuda" if context.cluster.device != "cpu" and torch.cuda.is_available() else "cpu"


def steady(device: str, threads: int | None) -> None:
    """On a worker, for each task anew: torch's threads (None leaves them), and the same bits on every run of a GPU."""
    if threads is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if device == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def convert_checkpoint(checkpoint: Path, out: Path, net: str, parameters: str) -> None:
    """A model file from a pickled checkpoint; `parameters` of the network are YAML."""
    try:
        given = yaml.safe_load(parameters)
    except yaml.YAMLError as error:
        raise ValueError(f"parameters={parameters!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ValueError(f"parameters={parameters!r} must be a mapping like {{num_classes: 2}}")
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already; give another name")
    convert(checkpoint, out, net, given)
