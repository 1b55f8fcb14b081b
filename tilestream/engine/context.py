"""What is switched on around a call and must not change its numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def as_it_stands(function: Function) -> Function:
    """Runs without the caller's autocast, which would shorten maps, and outside inference mode: it has no way back.

    On a GPU convolutions are deterministic and in full float32: TF32, which torch allows them, is an approximation.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with (
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.backends.cudnn.flags(
                torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
            ),
        ):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]
