"""tilestream: any traced CNN, forward and backward over an image of any size, exactly, in a memory budget.

>>> import tilestream as ts
>>> net = ts.nets.ResidualNet(num_classes=2).eval()
>>> streamed = ts.stream(net, memory="2 GiB")
>>> print(streamed.plan((3, 512, 512)))  # doctest: +ELLIPSIS
image 512 x 512 px, 1 x 1 tiles ...
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import nets
    from .engine import Saliency, Streamed, stream
    from .methods.estimators import CropDecision, HistogramSVM
    from .store import open_dataset

# Huge pages for PyTorch's large buffers: a third of a tile's time went into mapping them 4 KiB at a time (measured).
# PyTorch reads this once, at its first tensor, so it is set before anything of ours can make one.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["CropDecision", "HistogramSVM", "Saliency", "Streamed", "nets", "open_dataset", "stream"]

_PLACES = {
    "stream": "engine", "Streamed": "engine", "Saliency": "engine", "open_dataset": "store",
    "CropDecision": "methods.estimators", "HistogramSVM": "methods.estimators",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports on first use: `import tilestream` alone loads neither torch nor xarray."""
    if name == "nets":
        return import_module(".nets", __name__)
    if name == "__version__":
        return version("tilestream")
    if name in _PLACES:
        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
