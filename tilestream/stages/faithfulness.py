"""Whether the maps of a network say what it does: deletion, insertion, and what is left of them without its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from tilestream.cluster import Job
from tilestream.engine import stream
from tilestream.methods import normalise_square, resize_square
from tilestream.methods.faithfulness import deletion_insertion, randomised_correlations
from tilestream.store import Store

from .base import Context, Stage, StageConfig, digest, write_json
from .jobs import run_jobs
from .models import locate, read_model, read_once
from .split import chosen, path_of

BLOCKS = 32
"""Blocks along the longer side that deletion and insertion exchange."""


class FaithfulnessConfig(StageConfig):
    """Checks the maps of a network of squares: deletion and insertion, and maps after its weights are drawn anew."""

    model: str = Field("first", description="model file, or the name of one of this run's models: a network of squares")
    methods: list[Literal["gradient", "guided", "deconv"]] = Field(
        ["gradient", "guided"], description="ways of going backward to check"
    )
    target: int = Field(1, ge=0, description="the logit that is differentiated")
    limit: int = Field(10, ge=1, description="photographs to check on, the first of the splits")
    splits: list[str] | None = Field(None, description="only photographs of these splits (default: all)")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of fresh weights and of the noise to compare with")


def run(config: FaithfulnessConfig, context: Context) -> None:
    """Writes faithfulness.json: by method deletion, insertion and correlations with maps of fresh weights, and noise.

    Deletion and insertion are areas under the target's probability, means over photographs: a map is good whose
    deletion lies below that of noise, and whose insertion above. `correlations`, Spearman's, should fall towards 0
    the further down, from the logits to the stem, weights were drawn anew.
    """
    model = read_model(context, config.model)
    if "average" not in model.preprocessing:
        raise ValueError(f"model={config.model!r} carries no square to squash to; give a network of squares")
    path, ids = locate(context, config.model), list(chosen(context, config.splits, config.limit)["id"])
    found: dict[str, dict[str, Any]] = {}

    def make(id: str) -> Job:
        return Job.call(
            id, one, str(context.store_path), id, str(path), digest(path), config.methods, config.target, config.seed
        )

    run_jobs(context, context.name, ids, make, found.__setitem__)
    ordered = [found[id] for id in ids]
    result: dict[str, Any] = {"photographs": len(ids), "noise": _means([f["noise"] for f in ordered])}
    for method in config.methods:
        result[method] = _means([f[method] for f in ordered])
        by_block = result[method]["correlations"]
        result[method]["correlations"] = [{"down_to": block, "spearman": value} for block, value in by_block.items()]
        last = list(by_block.values())[-1]
        context.say(
            f"{context.name}: {method}: deletion {result[method]['deletion']:.3f} (noise "
            f"{result['noise']['deletion']:.3f}), insertion {result[method]['insertion']:.3f} (noise "
            f"{result['noise']['insertion']:.3f}), correlation without weights {'-' if last is None else f'{last:.2f}'}"
        )
    write_json(context.run / f"{context.name}.json", result)


def one(
    store: str, id: str, path: str, sha256: str, methods: list[Literal["gradient", "guided", "deconv"]], target: int,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """All figures of one photograph's square, on a worker."""
    model = read_once(path, sha256)
    average = np.asarray(model.preprocessing["average"], np.float32)
    raw = resize_square(np.asarray(Store(store).square(id)[:]), average.shape[-1])
    image, streamed = normalise_square(raw, average), stream(model.net)
    noise = np.random.default_rng([seed, *id.encode()]).random(image.shape[1:])
    found = {"noise": _areas(streamed, image, noise, target)}
    for method in methods:
        with torch.no_grad():
            values = streamed.saliency(image, target, method).numpy()
        correlations = randomised_correlations(model.net, image, target=target, method=method, seed=seed)
        found[method] = {**_areas(streamed, image, values, target), "correlations": correlations}
    return found


def _areas(streamed: Any, image: Any, values: Any, target: int) -> dict[str, Any]:
    deletion, insertion = deletion_insertion(streamed, image, values, target=target, blocks=BLOCKS)
    return {"deletion": deletion.auc, "insertion": insertion.auc}


def _means(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of numbers, by name; of what is known of them, None where nothing is."""
    result: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        known = [v for v in values if v is not None]
        result[name] = _means(values) if isinstance(value, dict) else float(np.mean(known)) if known else None
    return result


def reads(config: FaithfulnessConfig, context: Context) -> Iterable[Path]:
    return [locate(context, config.model), *([path_of(context)] if config.splits else [])]


def writes(config: FaithfulnessConfig, context: Context) -> Iterable[Path]:
    return [context.run / f"{context.name}.json"]


STAGE = Stage("faithfulness", FaithfulnessConfig, run, reads, writes)
