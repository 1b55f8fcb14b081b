"""Where centres and crops lie against lesions that are known, each rate beside what chance gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd
from pydantic import Field

from tilestream.cluster import Job
from tilestream.methods import localisation as loc
from tilestream.store import Store, is_url
from tilestream.store.adapters import read_collection
from tilestream.training import groups

from .base import Context, Stage, StageConfig, write_json
from .ingest import located
from .jobs import run_jobs
from .runner import Journal
from .saliency import candidates_path, centres_path
from .saliency_config import BORDER_RULE, field_of_view
from .split import chosen, path_of, read_table, write_table

ANATOMY = frozenset({"OD"})
"""IDRiD's masks that are no lesion: the optic disc."""


class LocaliseConfig(StageConfig):
    """Measures where centres and crops lie against known lesions, beside chance: random centres by the same rule."""

    lesions: str | None = Field(
        None,
        description="the lesions: a folder that synth made, or IDRiD's segmentation folder, below the run's folder or "
        "anywhere (default: the masks that were ingested with the photographs)",
    )
    centres: str = Field("saliency", description="the stage whose centres, and candidates, to measure")
    crops_px: int = Field(512, ge=1, description="side of a crop")
    border_rule: Literal["frame", "circle"] = Field("frame", description=BORDER_RULE)
    border: float = Field(0.1, ge=0, lt=0.5, description="kappa of the rule that the centres obey")
    tolerance_px: float = Field(
        0, ge=0, le=1000, allow_inf_nan=False, description="a point this near to a lesion is on it"
    )
    candidate_distance_px: int = Field(
        256, ge=0, description="least distance between a photograph's candidates, which random ones obey too"
    )
    draws: int = Field(200, ge=1, description="sets of random crops a photograph, for the chance of several crops")
    seed: int = Field(0, ge=0, description="seed of these, and of the intervals")
    splits: list[str] | None = Field(None, description="only photographs of these splits (default: all)")


@dataclass(frozen=True)
class Truth:
    """Where a photograph's lesions are drawn: a label image with what its values mean, files by kind, masks stored."""

    image: str = ""
    legend: Mapping[int, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    stored: tuple[str, ...] = ()


def run(config: LocaliseConfig, context: Context) -> None:
    """Writes localisation.json, and localisation.parquet with a row a photograph (S.json, S.parquet under the name S).

    Photographs without ground truth or centre are left out and counted. Rates are over photographs with a lesion;
    those without count for FROC's false positives alone. Where `lesions` names no folder and the store holds no masks,
    this is said and nothing is written, so that a pipeline for any data set may hold this stage.
    """
    _check_rule(config, context)
    samples = chosen(context, config.splits)
    truths, points = ground_truth(config, context, list(samples["id"])), _points(config, context)
    known = samples["id"].isin(list(truths))
    seen = samples["id"].isin(list(points))
    rows = samples[known & seen].reset_index(drop=True)
    if config.lesions is None and not known.any():
        for ending in (".json", ".parquet"):
            result_path(context, context.name, ending).unlink(missing_ok=True)
        context.say(f"{context.name}: no photograph was ingested with masks, so there is nothing to measure against")
        return
    if not len(rows):
        raise ValueError(f"lesions={config.lesions!r} are known for no photograph that has a centre; check its names")
    journal = Journal(context.partial_path / "photographs.jsonl")
    records = {id: record for id, record in journal.read().items() if id in set(rows["id"])}

    def make(id: str) -> Job:
        return Job.call(id, measure, str(context.store_path), id, truths[id], points[id], config)

    def result(id: str, record: dict[str, Any]) -> None:
        journal.append(record)
        records[id] = record

    run_jobs(context, context.name, [id for id in rows["id"] if id not in records], make, result)
    ordered = [records[id] for id in rows["id"]]
    counts = {
        "photographs": len(rows),
        "without_ground_truth": int((~known).sum()),
        "without_centre": int((known & ~seen).sum()),
    }
    found = summary(config, ordered, groups(rows))
    write_json(result_path(context, context.name), {**config.model_dump(mode="json"), **counts, **found})
    write_table(result_path(context, context.name, ".parquet"), _table(rows, ordered))
    context.say(f"{context.name}: {_line(counts, found)}")


def _check_rule(config: LocaliseConfig, context: Context) -> None:
    """Chance is that of the rule by which the centres were found, as far as this run knows it."""
    path = context.run / "journal" / f"{config.centres}.json"
    settings = json.loads(path.read_text())["config"] if path.exists() else {}
    for name in ("border_rule", "border", "candidate_distance_px"):
        mine, theirs = getattr(config, name), settings.get(name, getattr(config, name))
        if mine != theirs:
            raise ValueError(f"{name}={mine}, but centres={config.centres!r} were found with {theirs}; use {theirs}")


def _points(config: LocaliseConfig, context: Context) -> dict[str, list[tuple[int, int, float]]]:
    """Centres by photograph, y, x and value: the candidates in their order where there are any, else the one."""
    table = read_table(centres_path(context, config.centres), "saliency").assign(rank=0)
    if candidates_path(context, config.centres).exists():
        table = pd.read_parquet(candidates_path(context, config.centres)).sort_values(["id", "rank"])
    return {
        str(id): [(int(r.y_px), int(r.x_px), float(r.value)) for r in part.itertuples()]
        for id, part in table.groupby("id", sort=False)
    }


def ground_truth(config: LocaliseConfig, context: Context, ids: list[str]) -> dict[str, Truth]:
    """The photographs whose lesions are known; ValueError where a folder is of neither form."""
    if config.lesions is None:
        stored = {id: context.store.commit(id).get("masks") for id in ids}
        return {
            id: Truth(stored=tuple(sorted(m for m in masks if m not in ANATOMY)))
            for id, masks in stored.items()
            if masks
        }
    folder = located(Path(config.lesions), context)
    if (folder / "lesions").is_dir():
        images = {id: folder / "lesions" / f"{id}.png" for id in ids}
        sheet = pd.read_csv(folder / "legend.csv")
        legend = {int(row.value): str(row.kind) for row in sheet.itertuples()}
        return {id: Truth(str(path), legend) for id, path in images.items() if path.exists()}
    if not (folder / "masks").is_dir():
        raise ValueError(f"lesions={str(folder)!r} has neither a folder lesions (synth) nor a folder masks (IDRiD)")
    wanted, truths = set(ids), {}
    for source in read_collection(folder, "idrid-segmentation").sources:
        if source.id in wanted and source.problem is None:
            truths[source.id] = Truth(files={k: str(p) for k, p in sorted(source.masks.items()) if k not in ANATOMY})
    return truths


def read_masks(truth: Truth, store: Store, id: str) -> dict[str, np.ndarray]:
    """Masks (H, W), not 0 where the lesions of a kind are, by kind."""
    if truth.image:
        labels = _read(truth.image)
        values = np.unique(labels[labels > 0]).tolist()
        if unknown := [value for value in values if value not in truth.legend]:
            raise ValueError(f"{truth.image} holds the value {unknown[0]}, which its legend.csv does not name")
        return {truth.legend[value]: labels == value for value in values}
    stored = {kind: np.asarray(store.mask(id, kind)[0]) for kind in truth.stored}
    return {kind: _read(path) for kind, path in truth.files.items()} | stored


def _read(path: str) -> np.ndarray:
    image: np.ndarray | None = cv2.imread(path, cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise ValueError(f"{path} is no image that can be read; make or fetch it again")
    return image


def measure(
    store: str, id: str, truth: Truth, points: list[tuple[int, int, float]], config: LocaliseConfig
) -> dict[str, Any]:
    """One photograph, on a worker: what its centres meet, what chance would, and its marks for FROC; values of JSON."""
    cv2.setNumThreads(1)
    opened = Store(store)
    facts = opened.commit(id)
    extent = (int(facts["height"]), int(facts["width"]))
    lesions = loc.find_lesions(read_masks(truth, opened, id), extent)
    allowed = loc.allowed_centres(extent, config.border, field_of_view(opened, id), config.border_rule)
    centres = np.array([point[:2] for point in points])
    marks = loc.mark(lesions, centres, [value for _, _, value in points], allowed, config.tolerance_px)
    covered = loc.coverage(lesions, centres, config.crops_px)
    rng = np.random.default_rng([config.seed, int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big")])
    expected, any_held = loc.coverage_chance(
        lesions,
        allowed,
        config.crops_px,
        len(points),
        rng,
        draws=config.draws,
        distance_px=config.candidate_distance_px,
    )
    any_held[0] = loc.holding_chance(lesions, allowed, config.crops_px)  # of one crop it is known exactly
    kinds = sorted(set(lesions.kinds))
    of_kind = {kind: np.array(lesions.kinds) == kind for kind in kinds}
    away = lesions.distances_px(centres[:1])
    return {
        "id": id,
        "centre": points[0],
        "kinds": {kind: int(of_kind[kind].sum()) for kind in kinds},
        "distance_px": float(away.min()) if len(lesions) else None,
        "hit": int(len(lesions) > 0 and away.min() <= config.tolerance_px),
        "hit_chance": marks.share,
        "holds": covered.any(axis=1).astype(int).tolist(),
        "holds_chance": any_held.tolist(),
        "covered": {kind: covered[:, mine].sum(axis=1).tolist() for kind, mine in of_kind.items()},
        "covered_chance": {kind: expected[:, mine].sum(axis=1).tolist() for kind, mine in of_kind.items()},
        "false": marks.false.tolist(),
        "found": [None if np.isinf(score) else score for score in marks.found.tolist()],
        "shares": marks.shares.tolist(),
    }


def summary(config: LocaliseConfig, records: list[dict[str, Any]], patients: np.ndarray) -> dict[str, Any]:
    """The rates of all photographs with their intervals, by draws of whole patients."""
    has = np.array([bool(record["kinds"]) for record in records])
    ill, of = [record for record in records if record["kinds"]], patients[has]
    kinds = sorted({kind for record in ill for kind in record["kinds"]})
    totals = {kind: sum(record["kinds"].get(kind, 0) for record in ill) for kind in kinds}
    result: dict[str, Any] = {"without_lesions": int((~has).sum()), "lesions_by_kind": totals}
    ones = np.ones(len(ill))
    hits, chances = [r["hit"] for r in ill], [r["hit_chance"] for r in ill]
    result["pointing_game"] = loc.beside_chance(hits, ones, chances, of, seed=config.seed)
    most = max((len(record["holds"]) for record in ill), default=1)
    steps = [k for k in (2**i for i in range(most.bit_length())) if k < most] + [most]

    def at(values: list[float], k: int) -> float:
        """After k crops, or all of a photograph that has fewer."""
        return values[min(k, len(values)) - 1]

    def covered(k: int, which: list[str]) -> dict[str, Any]:
        total = [sum(record["kinds"].get(kind, 0) for kind in which) for record in ill]
        seen, expected = (
            [sum(at(record[name][kind], k) for kind in which if kind in record[name]) for record in ill]
            for name in ("covered", "covered_chance")
        )
        return loc.beside_chance(seen, total, expected, of, seed=config.seed)

    result["crops_hold_lesion"] = []
    for k in steps:
        held, expected = ([at(record[name], k) for record in ill] for name in ("holds", "holds_chance"))
        result["crops_hold_lesion"].append(
            {"crops": k, **loc.beside_chance(held, ones, expected, of, seed=config.seed)}
        )
    result["crop_holds_lesion"] = {key: v for key, v in result["crops_hold_lesion"][0].items() if key != "crops"}
    result["coverage"] = [
        {"crops": k, **covered(k, kinds), "kinds": {kind: covered(k, [kind]) for kind in kinds}} for k in steps
    ]
    result["froc"] = loc.froc([_marks(r) for r in records], patients, seed=config.seed) if ill else None
    return result


def _marks(record: dict[str, Any]) -> loc.Marks:
    found = [-np.inf if score is None else score for score in record["found"]]
    false, scores, shares = (np.asarray(v, np.float64) for v in (record["false"], found, record["shares"]))
    return loc.Marks(false, scores, shares, record["hit_chance"])


def _table(rows: pd.DataFrame, records: list[dict[str, Any]]) -> pd.DataFrame:
    """What the gallery shows of each photograph."""
    facts = [
        {
            "id": record["id"],
            **dict(zip(("y_px", "x_px", "value"), record["centre"], strict=True)),
            "lesions": sum(record["kinds"].values()),
            "distance_px": record["distance_px"],
            "on_lesion": bool(record["hit"]),
            "on_lesion_chance": record["hit_chance"],
            "holds_lesion": bool(record["holds"][0]),
            "holds_lesion_chance": record["holds_chance"][0],
            "lesions_held": sum(by_k[0] for by_k in record["covered"].values()),
            "crops": len(record["holds"]),
            "lesions_covered": sum(by_k[-1] for by_k in record["covered"].values()),
            "lesions_covered_chance": sum(by_k[-1] for by_k in record["covered_chance"].values()),
        }
        for record in records
    ]
    table = rows[["id", "label", "split"]].merge(pd.DataFrame(facts), on="id")
    return table.astype({"distance_px": "float64"})


def _line(counts: dict[str, int], found: dict[str, Any]) -> str:
    """What was found, in a line."""
    ill = counts["photographs"] - found["without_lesions"]
    said = [f"{counts['photographs']} photographs, {ill} with lesions"]
    last = found["coverage"][-1]
    for name, rate in (
        ("centre on a lesion", found["pointing_game"]),
        ("crop holds one", found["crop_holds_lesion"]),
        (f"lesions covered by {last['crops']} crops", last),
    ):
        if rate["value"] is not None:
            said.append(f"{name} {rate['value']:.1%} (chance {rate['chance']:.1%})")
    if counts["without_ground_truth"]:
        said.append(f"{counts['without_ground_truth']} without ground truth left out")
    return "; ".join(said)


def result_path(context: Context, name: str, ending: str = ".json") -> Path:
    return context.run / f"{'localisation' if name == 'localise' else name}{ending}"


def reads(config: LocaliseConfig, context: Context) -> Iterable[Path]:
    tables = [centres_path(context, config.centres), candidates_path(context, config.centres), path_of(context)]
    if config.lesions is None:
        store = context.store_path
        return tables if store is None or is_url(store) else [*tables, Path(store) / "commits"]
    folder = located(Path(config.lesions), context)
    return [*tables, *(folder / name for name in ("lesions", "legend.csv", "masks", "labels.csv"))]


def writes(config: LocaliseConfig, context: Context) -> Iterable[Path]:
    return [result_path(context, context.name, ending) for ending in (".json", ".parquet")]


STAGE = Stage("localise", LocaliseConfig, run, reads, writes)
