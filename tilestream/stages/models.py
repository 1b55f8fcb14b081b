"""Model files by name or path."""

from __future__ import annotations

from pathlib import Path

from tilestream.nets import Model, load_model

from .base import Context, nearest


def locate(context: Context, model: str) -> Path:
    """The file of a model: a path as it is, a bare name in the run's models (or in those of an old run)."""
    if model.endswith(".safetensors") or "/" in model:
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
