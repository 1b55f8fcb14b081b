"""One self-contained HTML page from whatever a run's folder holds."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from tilestream import report
from tilestream.report import Code, Picture, Section, Table

from .base import Context, Stage, StageConfig
from .crops import table_path
from .evaluate import metrics_path
from .faithfulness import result_path as faithfulness_path
from .localise import result_path
from .predict import decision_path, predictions_path
from .report_gallery import Run, gallery
from .report_results import comparison, faithfulness, localisation, results
from .report_words import reads as read_of_words
from .report_words import visual_words
from .saliency import candidates_path, centres_path
from .tables import tables_path
from .windows import windows_path

PACKAGES = ("tilestream", "torch", "numpy", "dask", "zarr", "pyvips", "scikit-learn", "opencv-python-headless")


class ReportConfig(StageConfig):
    """Writes report.html: tables, curves, localisation, and photographs with lesions, saliency, crop and windows."""

    title: str = Field("tilestream run", description="title of the page")
    gallery: int = Field(24, ge=0, le=100, description="photographs in the gallery, at most; half of them wrong cases")
    width_px: int = Field(640, ge=64, le=2048, description="width of the pictures")
    classes: tuple[str, str] = Field(("healthy", "unhealthy"), description="what labels 0 and 1 are called")
    credit: str = Field("", description="attribution of the photographs, shown on the page")


def run(config: ReportConfig, context: Context) -> None:
    """Writes report.html and says where it is. The same files of a run give the same page."""
    records = journal(context)
    sections = [
        *results(context, config.classes),
        *comparison(context),
        *visual_words(context, records),
        *localisation(context, _stages(records, "localise")),
        *faithfulness(context, _stages(records, "faithfulness"), config.classes[1]),
        *gallery(Run(context, records, config.width_px, config.classes), config.gallery),
        *_training(context),
        *_run(context, records),
    ]
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


def journal(context: Context) -> dict[str, dict[str, Any]]:
    """The records of this run's stages by name, in the order in which they were run."""
    paths = sorted((context.run / "journal").glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.stem))
    return {path.stem: json.loads(path.read_text()) for path in paths if path.stem != context.name}


def _stages(records: dict[str, dict[str, Any]], verb: str) -> list[str]:
    return [name for name, record in records.items() if record["stage"] == verb]


def _training(context: Context) -> Iterator[Section]:
    files = sorted((context.run / "training").glob("*.json"))
    histories = {file.stem: json.loads(file.read_text())["records"] for file in files}
    if histories:
        picture = Picture(report.training_curves(histories), "Loss and AUC by epoch.", "training curves", chart=True)
        yield Section("Training", "", [picture])


def _run(context: Context, records: dict[str, dict[str, Any]]) -> Iterator[Section]:
    items: list[Any] = []
    path = context.run / "timings.json"
    timings = json.loads(path.read_text()) if path.exists() else {}
    order = [*(name for name in records if name in timings), *sorted(timings.keys() - records.keys() - {context.name})]
    if order:
        rows = [
            [name, t["wall_s"], t["peak_driver_bytes"] / 2**20, t["peak_worker_bytes"] / 2**20]
            for name, t in ((name, timings[name]) for name in order)
        ]
        rows.append(["all", sum(row[1] for row in rows), *(max(row[i] for row in rows) for i in (2, 3))])
        note = "Time and peak memory of each stage."
        items.append(Table(["stage", "wall, s", "driver, MiB", "largest worker, MiB"], rows, note, digits=1))
    made = [f"{name} {record['versions']['torch']}" for name, record in records.items() if "versions" in record]
    older = [text for text in made if text.rpartition(" ")[2] != version("torch")]
    rows = [["Python", platform.python_version()], *([name, version(name)] for name in PACKAGES)]
    note = f"Versions. Stages that ran with another torch: {', '.join(older)}." if older else "Versions."
    items.append(Table(["package", "version"], rows, note))
    for name, record in records.items():
        verb = "" if record["stage"] == name else f" ({record['stage']})"
        items.append(Code(json.dumps(record["config"], indent=2), f"{name}{verb}"))
    yield Section("This run", "Time, memory, versions, and the configuration of each stage.", items)


def report_path(context: Context) -> Path:
    return context.run / "report.html"


def reads(config: ReportConfig, context: Context) -> Iterable[Path]:
    records = journal(context)
    shown = Run(context, records, config.width_px, config.classes)
    tables = [centres_path(context, shown.saliency), candidates_path(context, shown.saliency)]
    tables += [table_path(context, shown.crops), windows_path(context, shown.windows), tables_path(context)]
    tables += [
        result_path(context, name, end) for name in _stages(records, "localise") for end in (".json", ".parquet")
    ]
    tables += [faithfulness_path(context, name) for name in _stages(records, "faithfulness")]
    tables += read_of_words(context, records)
    record = context.run / "journal" / f"{shown.saliency}.json"
    training = sorted((context.run / "training").glob("*.json"))
    return [*tables, record, predictions_path(context), decision_path(context), metrics_path(context), *training]


def writes(config: ReportConfig, context: Context) -> Iterable[Path]:
    return [report_path(context)]


STAGE = Stage("report", ReportConfig, run, reads, writes)
