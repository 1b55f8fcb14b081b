"""One self-contained HTML page from whatever a run's folder holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
import zarr
from pydantic import Field

from tilestream import report
from tilestream.geometry import interior
from tilestream.methods import crop_region
from tilestream.methods.metrics import AUC, roc_points
from tilestream.report import Card, Code, Gallery, KeyFigures, Picture, Section, Table

from .base import Context, Stage, StageConfig, digest
from .crops import crops_path, table_path
from .evaluate import columns, metrics_path, read_metrics, selected
from .predict import predictions_path
from .saliency import centres_path, overview_path

MEASURES = ("sensitivity", "specificity", "ppv", "npv", "accuracy", "kappa")


class ReportConfig(StageConfig):
    """Writes report.html: tables, curves, and photographs with saliency, crop frame and crop."""

    title: str = Field("tilestream run", description="title of the page")
    gallery: int = Field(24, ge=0, le=100, description="photographs in the gallery, at most")
    width_px: int = Field(640, ge=64, le=2048, description="width of the pictures")
    credit: str = Field("", description="attribution of the photographs, shown on the page")


def run(config: ReportConfig, context: Context) -> None:
    """Writes report.html and says where it is."""
    sections = [*_results(context), *_gallery(config, context), *_training(context), *_run(context)]
    facts: dict[str, Any] = {}
    if context.store_path is not None:
        info = context.store.info()
        facts = {
            "Photographs": info["images"],
            "Megapixels": round(info["megapixels"], 1),
            "Quarantined": info["quarantined"],
        }
    report.write_page(report_path(context), config.title, sections, facts=facts, footer=config.credit)
    context.say(f"report: {report_path(context).resolve()}")


def _results(context: Context) -> Iterator[Section]:
    metrics = read_metrics(context)
    if metrics is None or metrics["predictions_sha256"] != digest(predictions_path(context)):
        return  # none, or of other predictions than those that are there now
    table = selected(metrics["split"], context)
    models = columns(table)
    figures = {f"AUC, {name}": _interval(metrics[name], "auc") for name in models}
    rows = [[m, *(_interval(metrics[name], m) for name in models)] for m in ("auc", *MEASURES)]
    items: list[Any] = [
        KeyFigures(figures),
        Table(
            ["measure", *models], rows, f"On {len(table)} photographs of the {metrics['split']} split, 95 % intervals."
        ),
    ]
    curves = {}
    for name, prefix in models.items():
        if metrics[name]["auc"] is not None:
            fpr, tpr, _ = roc_points(table["label"], table[f"{prefix}probability"])
            curves[name] = (fpr, tpr, _interval(metrics[name], "auc") or "")
    if curves:
        items.append(Picture(report.roc(curves), "Receiver operating characteristic.", "ROC curves", chart=True))
    for name, prefix in models.items():
        matrix = report.confusion(
            np.asarray(metrics[name]["by_grade"]),
            ["healthy", "unhealthy"],
            [str(grade) for grade in range(5)],
            row_label="decision",
            column_label="grade",
            truth="columns",
        )
        items.append(
            Picture(matrix, f"Decisions of the {name} model by grade.", f"confusion matrix, {name}", chart=True)
        )
        histogram = report.probability_histogram(table[f"{prefix}probability"], table["label"])
        items.append(Picture(histogram, f"Probabilities of the {name} model.", f"histogram, {name}", chart=True))
    yield Section(
        "Results", "Healthy is grade 0 or 1, unhealthy 2 to 4. Thresholds were fixed on validation photographs.", items
    )


def _interval(metrics: dict[str, Any], name: str) -> str | None:
    value, low, high = (metrics.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if name == "auc" and value is not None:
        return str(AUC(value, low, high, None))
    if value is None:
        return None
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f}–{high:.3f})"


def _gallery(config: ReportConfig, context: Context) -> Iterator[Section]:
    if not centres_path(context, "saliency").exists() or config.gallery == 0:
        return
    table = pd.read_parquet(centres_path(context, "saliency"))
    if predictions_path(context).exists():
        table = table.drop(columns="probability").merge(pd.read_parquet(predictions_path(context)), on="id")
    else:
        table["label"] = pd.NA
    crops = pd.read_parquet(table_path(context, "crops")) if table_path(context, "crops").exists() else None
    groups = list(_groups(table))
    total = sum(len(part) for _, part in groups)
    for heading, part in groups:
        share = max(1, round(config.gallery * len(part) / total))
        rows = part.iloc[np.unique(np.linspace(0, len(part) - 1, min(share, len(part))).astype(int))]
        cards = [_card(config, context, row, crops) for _, row in rows.iterrows()]
        intro = f"{len(cards)} of {len(part)}: photograph, saliency, border rule with the crop's frame, crop."
        yield Section(heading, intro, [Gallery(cards)])


def _groups(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Wrong and right cases of the test photographs, where labels say which; everything otherwise."""
    if "decision" in table and table["label"].notna().any():
        shown = (
            table[(table["split"] == "test") & table["label"].notna()] if (table["split"] == "test").any() else table
        )
        shown = shown.sort_values(["grade", "id"])
        wrong = shown["label"] != shown["decision"]
        for heading, part in (("Wrong decisions", shown[wrong]), ("Right decisions", shown[~wrong])):
            if len(part):
                yield heading, part
    else:
        yield "Photographs", table.sort_values("id")


def _card(config: ReportConfig, context: Context, row: pd.Series, crops: pd.DataFrame | None) -> Card:
    id, centre = row["id"], (int(row["y_px"]), int(row["x_px"]))
    picture, extent = _small(context, id, config.width_px)
    saliency = _fit(np.load(overview_path(context, "saliency", id)), picture.shape[:2])
    edge = interior(extent, _border(context))
    pictures = [
        Picture(report.photograph(picture), "photograph", f"photograph {id}"),
        Picture(report.overlay(picture, saliency), "saliency", f"saliency of {id}"),
    ]
    if crops is not None and (crops["id"] == id).any():
        position = int(crops.loc[crops["id"] == id, "position"].iloc[0])
        crop = np.asarray(zarr.open_array(crops_path(context, "crops") / "image", mode="r")[position]).transpose(
            1, 2, 0
        )
        region = crop_region(extent, centre, crop.shape[0])
        framed = report.frame(
            picture,
            (region.y0, region.x0, region.y1, region.x1),
            border=(edge.y0, edge.x0, edge.y1, edge.x1),
            centre=centre,
            photograph_px=extent,
        )
        pictures.append(Picture(framed, "border rule and crop", f"crop frame on {id}"))
        pictures.append(Picture(report.photograph(np.ascontiguousarray(crop)), "crop", f"crop of {id}"))
    facts = {"centre": f"y {centre[0]}, x {centre[1]} px", "saliency": f"{row['value']:.3g}"}
    tone = "neutral"
    if "decision" in row:
        facts["probability"] = f"{row['probability']:.3f}"
        facts["decision"] = "unhealthy" if row["decision"] else "healthy"
        if not pd.isna(row["label"]):
            facts["grade"] = str(int(row["grade"]))
            tone = "good" if row["label"] == row["decision"] else "bad"
    return Card(id, pictures, facts, tone)  # type: ignore[arg-type]


def _saliency_record(context: Context) -> Path:
    return context.run / "journal" / "saliency.json"


def _border(context: Context) -> float:
    """The border rule that the saliency stage had."""
    return float(json.loads(_saliency_record(context).read_text())["config"]["border"])


def _small(context: Context, id: str, width_px: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A photograph at most `width_px` wide, (h, w, 3) uint8, from the smallest stored level that is wide enough."""
    levels = context.store.levels(id)
    level = max((i for i, shape in enumerate(levels) if shape[2] >= width_px), default=0)
    image = np.ascontiguousarray(np.asarray(context.store.image(id, level)[:]).transpose(1, 2, 0))
    if image.shape[1] > width_px:
        size = (width_px, max(1, round(image.shape[0] * width_px / image.shape[1])))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return image, (levels[0][1], levels[0][2])


def _fit(overview: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The small picture of a map, brought to a picture's size by maxima, so that single points stay."""
    y = (np.arange(overview.shape[0]) * shape[0]) // overview.shape[0]
    x = (np.arange(overview.shape[1]) * shape[1]) // overview.shape[1]
    if overview.shape[0] < shape[0] or overview.shape[1] < shape[1]:
        return np.asarray(cv2.resize(overview, (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST))
    rows = np.maximum.reduceat(overview, np.searchsorted(y, np.arange(shape[0])), axis=0)
    fitted: np.ndarray = np.maximum.reduceat(rows, np.searchsorted(x, np.arange(shape[1])), axis=1)
    return fitted


def _training(context: Context) -> Iterator[Section]:
    files = sorted((context.run / "training").glob("*.json"))
    histories = {file.stem: json.loads(file.read_text())["records"] for file in files}
    if histories:
        picture = Picture(report.training_curves(histories), "Loss and AUC by epoch.", "training curves", chart=True)
        yield Section("Training", "", [picture])


def _run(context: Context) -> Iterator[Section]:
    items: list[Any] = []
    timings = context.run / "timings.json"
    if timings.exists():
        rows = [
            [name, t["wall_s"], t["peak_driver_bytes"] / 2**20, t["peak_worker_bytes"] / 2**20]
            for name, t in json.loads(timings.read_text()).items()
            if name != context.name
        ]
        items.append(
            Table(["stage", "wall, s", "driver, MiB", "largest worker, MiB"], rows, "Time and peak memory.", digits=1)
        )
    records = sorted((context.run / "journal").glob("*.json"), key=lambda p: p.stat().st_mtime)
    configs = {p.stem: json.loads(p.read_text())["config"] for p in records if p.stem != context.name}
    items.append(Table(["package", "version"], [["torch", torch.__version__], ["numpy", np.__version__]], "Versions."))
    items.append(Code(json.dumps(configs, indent=2)))
    yield Section("This run", "Configuration of each stage.", items)


def report_path(context: Context) -> Path:
    return context.run / "report.html"


def reads(config: ReportConfig, context: Context) -> Iterable[Path]:
    training = sorted((context.run / "training").glob("*.json"))
    tables = [centres_path(context, "saliency"), table_path(context, "crops"), _saliency_record(context)]
    return [*tables, predictions_path(context), metrics_path(context), *training]


def writes(config: ReportConfig, context: Context) -> Iterable[Path]:
    return [report_path(context)]


STAGE = Stage("report", ReportConfig, run, reads, writes)
