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
from tilestream.methods.crops import UNHEALTHY_FROM
from tilestream.methods.faithfulness import deletion_insertion, randomised_correlations
from tilestream.store import Store

from .base import Context, Stage, StageConfig, digest, write_json
from .jobs import run_jobs
from .models import locate, read_model, read_once
from .split import chosen, path_of

BLOCKS = 32
"""Blocks along the longer side that deletion and insertion exchange."""
SHARES = np.linspace(0, 1, 33)
"""Shares of a photograph at which their curves are kept."""


class FaithfulnessConfig(StageConfig):
    """Checks the maps of a network of squares: deletion and insertion, and maps after its weights are drawn anew."""

    model: str = Field("first", description="model file, or the name of one of this run's models: a network of squares")
    methods: list[Literal["gradient", "guided", "deconv"]] = Field(
        ["gradient", "guided"], description="ways of going backward to check"
    )
    target: int = Field(1, ge=0, description="the logit that is differentiated")
    limit: int = Field(
        10, ge=1, description="photographs to check on, the first of the splits, unhealthy ones before others: in the "
        "others there is nothing to delete"
    )  # fmt: skip
    splits: list[str] | None = Field(None, description="only photographs of these splits (default: all)")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of fresh weights and of the noise to compare with")


def run(config: FaithfulnessConfig, context: Context) -> None:
    """Writes faithfulness.json (S.json under the name S): photographs, unhealthy (of them), shares, and for each method
    and for noise deletion, insertion, their curves, and correlations with maps of fresh weights.

    Deletion and insertion are areas under the target's probability by the share of the photograph that is exchanged
    (`deletion_curve`, `insertion_curve`, at `shares`), means over photographs: a map is good whose deletion lies below
    that of noise, and whose insertion above. `correlations`, Spearman's, should fall towards 0 the further down, from
    the logits to the stem, weights were drawn anew.
    """
    model = read_model(context, config.model)
    if "average" not in model.preprocessing:
        raise ValueError(f"model={config.model!r} carries no square to squash to; give a network of squares")
    path, samples = locate(context, config.model), chosen(context, config.splits)
    samples = samples.assign(ill=(samples["label"] >= UNHEALTHY_FROM).fillna(False).astype(bool))
    samples = samples.sort_values("ill", ascending=False, kind="stable").head(config.limit)
    ids = list(samples["id"])
    found: dict[str, dict[str, Any]] = {}

    def make(id: str) -> Job:
        return Job.call(
            id, one, str(context.store_path), id, str(path), digest(path), config.methods, config.target, config.seed
        )

    run_jobs(context, context.name, ids, make, found.__setitem__)
    ordered = [found[id] for id in ids]
    result: dict[str, Any] = {
        "photographs": len(ids), "unhealthy": int(samples["ill"].sum()), "shares": SHARES.tolist(),
        "methods": config.methods, "noise": _means([f["noise"] for f in ordered]),
    }  # fmt: skip
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
    write_json(result_path(context, context.name), result)


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
        correlations = randomised_correlations(streamed, image, target=target, method=method, seed=seed)
        found[method] = {**_areas(streamed, image, values, target), "correlations": correlations}
    return found


def _areas(streamed: Any, image: Any, values: Any, target: int) -> dict[str, Any]:
    deletion, insertion = deletion_insertion(streamed, image, values, target=target, blocks=BLOCKS)
    both = {"deletion": deletion, "insertion": insertion}
    areas = {name: curve.auc for name, curve in both.items()}
    read = {f"{name}_curve": np.interp(SHARES, c.shares, c.probabilities).tolist() for name, c in both.items()}
    return {**areas, **read}


def _means(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of numbers or curves, by name; of what is known of them, None where nothing is."""
    result: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        known = [v for v in values if v is not None]
        result[name] = _means(values) if isinstance(value, dict) else np.mean(known, axis=0).tolist() if known else None
    return result


def result_path(context: Context, name: str) -> Path:
    return context.run / f"{name}.json"


def reads(config: FaithfulnessConfig, context: Context) -> Iterable[Path]:
    return [locate(context, config.model), *([path_of(context)] if config.splits else [])]


def writes(config: FaithfulnessConfig, context: Context) -> Iterable[Path]:
    return [result_path(context, context.name)]


STAGE = Stage("faithfulness", FaithfulnessConfig, run, reads, writes)
