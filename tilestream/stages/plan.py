"""The tile plan of a network and a size, without running anything."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

from tilestream.engine import parse_bytes, plan, trace
from tilestream.nets import build, load_model

from .models import FILES


def plan_text(net: str, size: str, memory: str | None, tile: int | None, as_json: bool) -> str:
    """The plan for `net` (a name, package.module:factory or a model file) on a photograph of `size`, HEIGHTxWIDTH.

    Raises ValueError for a size that is none, an unknown network, a budget that is too small.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", size)
    if not match:
        raise ValueError(f"size={size!r} must be HEIGHTxWIDTH in px, like 2848x4288")
    if memory is not None and tile is not None:
        raise ValueError(f"memory={memory} and tile={tile} both fix the tiles; give one of them")
    module = load_model(net).net if net.endswith(FILES) else build(net)
    budget = None if tile is not None else parse_bytes(memory or "2 GiB")
    layout = plan(trace(module), (int(match[1]), int(match[2])), memory=budget, tile=tile)
    if not as_json:
        return str(layout)
    facts = asdict(layout)
    tiles = facts.pop("tiles")
    return json.dumps({**facts, "tiles": len(tiles), "halo_px": layout.halo_px, "overhead": layout.overhead}, indent=2)
