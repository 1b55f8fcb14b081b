"""Model files: safetensors whose metadata holds the architecture, its parameters and the preprocessing."""

from __future__ import annotations

import importlib
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

_EXTRA = "preprocessing."
_NAMES = ("ResidualNet", "ConvBoVW")


@dataclass(frozen=True)
class Model:
    """A model file, read: `net` in evaluation mode, `preprocessing` as it was saved, tensors included."""

    net: nn.Module
    architecture: str
    parameters: dict[str, Any]
    preprocessing: dict[str, Any] = field(default_factory=dict)


def build(architecture: str, parameters: Mapping[str, Any] | None = None) -> nn.Module:
    """The network that `architecture` makes: a name of `tilestream.nets` (resnet18) or package.module:factory.

    Raises ValueError that names what is missing.
    """
    module_name, _, name = architecture.rpartition(":")
    try:
        factory = getattr(importlib.import_module(module_name or __package__ or ""), name, None)
    except ImportError as error:
        hint = "" if not module_name else "; its folder must be on PYTHONPATH, on every worker too"
        raise ValueError(f"net={architecture!r}: {error}{hint}") from error
    if not callable(factory) or (not module_name and not (name.startswith("resnet") or name in _NAMES)):
        known = "ResidualNet, ConvBoVW, resnet18, resnet34, resnet50 or package.module:factory"
        raise ValueError(f"net={architecture!r} is not known; use {known}")
    try:
        net = factory(**dict(parameters or {}))
    except TypeError as error:
        raise ValueError(f"net={architecture!r} does not take parameters={dict(parameters or {})}: {error}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"net={architecture!r} made a {type(net).__name__}; it must make a torch.nn.Module")
    return net.eval()


def save_model(
    path: str | os.PathLike[str],
    net: nn.Module,
    *,
    architecture: str,
    parameters: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model file, whole or not at all. Values of `preprocessing` are tensors or whatever JSON can hold."""
    extra = dict(preprocessing or {})
    tensors = {f"{_EXTRA}{k}": v.detach().cpu().contiguous() for k, v in extra.items() if isinstance(v, Tensor)}
    tensors.update({k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()})
    metadata = {
        "format": "pt",
        "architecture": architecture,
        "parameters": json.dumps(dict(parameters or {}), sort_keys=True),
        "preprocessing": json.dumps({k: v for k, v in extra.items() if not isinstance(v, Tensor)}, sort_keys=True),
    }
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load_model(
    path: str | os.PathLike[str], *, architecture: str | None = None, parameters: Mapping[str, Any] | None = None
) -> Model:
    """Reads a model file and rebuilds its network; `architecture` is for files whose metadata do not name one.

    Raises FileNotFoundError, or ValueError for a file that is no model or does not fit the architecture.
    """
    metadata, state = _read(path)
    architecture = architecture or metadata.get("architecture")
    if architecture is None:
        raise ValueError(
            f"model file {os.fspath(path)!r} does not name its architecture; give --net package.module:factory"
        )
    kwargs = dict(parameters) if parameters is not None else json.loads(metadata.get("parameters", "{}"))
    preprocessing = json.loads(metadata.get("preprocessing", "{}"))
    preprocessing.update({k[len(_EXTRA) :]: state.pop(k) for k in list(state) if k.startswith(_EXTRA)})
    net = build(architecture, kwargs)
    floats = {t.dtype for t in state.values() if t.is_floating_point()}
    if len(floats) == 1:
        net.to(floats.pop())
    _fill(net, state, path, architecture)
    return Model(net.eval(), architecture, kwargs, preprocessing)


def load_weights(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fills `net` with the weights of a model file or any safetensors state dict of the same network.

    Raises FileNotFoundError, or ValueError for a file that is none or does not fit.
    """
    _, state = _read(path)
    _fill(net, {key: v for key, v in state.items() if not key.startswith(_EXTRA)}, path, type(net).__name__)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    architecture: str,
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Makes a model file from a checkpoint that torch.save wrote, of tensors alone: nothing that it may hold is run.

    The weights may lie under the key state_dict, model or net, and their names may begin with `module.`. Raises
    FileNotFoundError, or ValueError for a file that holds more than tensors or does not fit the architecture.
    """
    if not Path(source).is_file():
        raise FileNotFoundError(f"checkpoint {os.fspath(source)!r} does not exist")
    try:
        with open(source, "rb") as file:  # torch.load goes by a name's ending
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        state = None
    for key in ("state_dict", "model", "net"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"checkpoint {os.fspath(source)!r} is no state dict of tensors alone; save net.state_dict(), convert that"
        )
    net = build(architecture, parameters)
    _fill(net, {key.removeprefix("module."): value for key, value in state.items()}, source, architecture)
    save_model(target, net, architecture=architecture, parameters=parameters)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"model file {os.fspath(path)!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return file.metadata() or {}, state
    except SafetensorError as error:
        with open(path, "rb") as opened:
            pickled = opened.read(2) in (b"PK", b"\x80\x02")
        if pickled:
            raise ValueError(
                f"model file {os.fspath(path)!r} is a pickle, which may run any code when it is read; convert it once: "
                f"tilestream convert {os.fspath(path)} MODEL.safetensors --net NAME"
            ) from None
        raise ValueError(f"model file {os.fspath(path)!r} is not a safetensors file: {error}") from error


def _fill(net: nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str], architecture: str) -> None:
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"model file {os.fspath(path)!r} does not fit net={architecture!r}: {first[:200]}") from error
