"""The paper's tables beside this run's, and what the run would cost on a data set of EyePACS' size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from .base import Context, Stage, StageConfig, write_json
from .evaluate import metrics_path, read_metrics
from .words import LEARNERS, count_of

MODELS = ("naive", "sliding_window", "saliency")
PRINTED = {"healthy": (0.911, 0.585, 0.695), "unhealthy": (0.412, 0.566, 0.828)}
"""Grzeszczuk (2019), Table 2, in the order of `MODELS`."""
AUC = (0.71, 0.56, 0.77)
"""Table 3."""
COUNTS = ((542, 201, 319, 7, 0), (17, 31, 64, 91, 77))
"""Table 4, the saliency model's: rows decision (healthy, unhealthy), columns grade 0 to 4."""
HOURS = 70
"""What the paper's whole pipeline took on one K40."""
BAGS = (
    ("standard BoVW (Pires et al. 2014)", 1000, None, 0.94, None),
    ("BoVW of another coding (Quellec et al. 2016)", None, None, None, 0.89),
    ("ConvBoVW, sparse SURF", None, 0.93, None, 0.90),
    ("ConvBoVW, sparse SURF", 100, None, 0.97, None),
    ("ConvBoVW, sparse SURF", 55, None, 0.96, None),
    ("ConvBoVW, dense, CNN", None, 0.91, None, None),
)
"""Costa and Campilho (2017), section 4.2: method, words, AUC on DR1, DR2 and Messidor."""
MISLABELLED = (
    "Table 2 prints 69.5 and 82.8 % for the saliency model. By Table 4 these are predictive values: 743 of 1069 "
    "decisions 'healthy' and 232 of 280 decisions 'unhealthy' are right. The shares of photographs that are found, as "
    "the other two columns have it, are 743 of 791 (93.9 %, specificity) and 232 of 558 (41.6 %, sensitivity), hardly "
    "above the plain network's 91.1 and 41.2 %. All four are given here, by name."
)


class TablesConfig(StageConfig):
    """Prints the paper's Tables 2, 3 and 4 beside this run's, and the time that a larger data set would take."""

    photographs: int = Field(35_126, ge=1, description="size of the data set that costs are extrapolated to (EyePACS)")


def run(config: TablesConfig, context: Context) -> None:
    """Writes tables.json, {tables: [{title, columns, rows, note}]}, and prints the tables."""
    metrics = read_metrics(context)
    if metrics is None:
        raise ValueError(f"{context.run.name} has no metrics.json; run 'tilestream evaluate' first")
    first = comparison(metrics) if any(metrics.get(model) for model in MODELS) else []
    tables = [*first, *bags(metrics, context), *costs(context, config.photographs, bool(first))]
    write_json(tables_path(context), {"tables": tables})
    for each in tables:
        show(each, context)


def comparison(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Tables 2 to 4 from the objects of metrics.json; None where a model was not run."""
    columns = ["", "model", "paper", "here"]

    def rows(label: str, paper: Sequence[float | None], name: str) -> list[list[Any]]:
        return [
            [label, model.replace("_", " "), printed, interval(metrics.get(model) or {}, name)]
            for model, printed in zip(MODELS, paper, strict=True)
        ]

    (healthy, unhealthy), grades = COUNTS, range(2, 5)
    found = sum(unhealthy[g] for g in grades) / sum(healthy[g] + unhealthy[g] for g in grades)
    left = sum(healthy[:2]) / sum(healthy[:2] + unhealthy[:2])
    second = [
        *rows("healthy found (specificity)", (*PRINTED["healthy"][:2], round(left, 3)), "specificity"),
        *rows("unhealthy found (sensitivity)", (*PRINTED["unhealthy"][:2], round(found, 3)), "sensitivity"),
        *rows("'healthy' right (npv)", (None, None, PRINTED["healthy"][2]), "npv"),
        *rows("'unhealthy' right (ppv)", (None, None, PRINTED["unhealthy"][2]), "ppv"),
    ]
    third = rows("area under the ROC curve", AUC, "auc")
    tables = [
        {"title": "Table 2: per-class accuracy", "columns": columns, "rows": second, "note": MISLABELLED},
        {"title": "Table 3: area under the ROC curve", "columns": columns, "rows": third, "note": ""},
    ]
    here = (metrics.get("saliency") or {}).get("by_grade")
    if here:
        counts = [
            [f"{word}, {whose}", *row]
            for whose, both in (("paper", COUNTS), ("here", here))
            for word, row in zip(("'healthy'", "'unhealthy'"), both, strict=True)
        ]
        title = "Table 4: decisions of the saliency model by grade"
        tables.append({"title": title, "columns": ["", *(f"grade {g}" for g in range(5))], "rows": counts, "note": ""})
    return tables


def bags(metrics: dict[str, Any], context: Context) -> list[dict[str, Any]]:
    """Paper B's AUCs beside those of the stages here that decide by visual words; nothing where there are none."""
    stages = {path.stem: json.loads(path.read_text())["stage"] for path in (context.run / "journal").glob("*.json")}
    names = [name for name in metrics.get("predictions", ()) if stages.get(name) in LEARNERS]
    if not names:
        return []
    reference = metrics["reference"]
    less, none = f"auc_minus_{reference}", [None, None, None]
    rows: list[list[Any]] = [[f"paper: {method}", *found, None, None, None] for method, *found in BAGS]
    for name in names:
        measures = metrics.get(name) or {}
        label = name if name == stages[name] else f"{name} ({stages[name]})"
        p = measures.get(f"{less}_p")
        said = None if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"
        found = [interval(measures, "auc"), interval(measures, less), said]
        rows.append([f"here: {label}", count_of(context, name), *none, *found])
    note = (
        "Paper: section 4.2 with Tables 5 to 7, and Fig. 3 for 55 words; SURF there is RootSIFT here. These are other "
        "photographs: the order of methods can be compared, values only on the same data set. In brackets 95 % "
        "intervals, DeLong's, as is the test of the difference."
    )
    title = "Costa and Campilho (2017), Tables 5 to 7: area under the ROC curve, normal against pathological"
    columns = ["", "words", "DR1", "DR2", "Messidor", "here", f"here, less {reference}", "p"]
    return [{"title": title, "columns": columns, "rows": rows, "note": note}]


def costs(context: Context, photographs: int, paper_a: bool = True) -> list[dict[str, Any]]:
    """Hours a stage of this run would take on so many photographs, from its own seconds a photograph."""
    path = context.run / "timings.json"
    if not path.exists():
        return []
    info, journal = context.store.info(), context.run / "journal"
    count = int(info["images"])
    times = {name: t for name, t in json.loads(path.read_text()).items() if name not in (context.name, "report")}
    files = {name: journal / f"{name}.json" for name in times if (journal / f"{name}.json").exists()}
    times = dict(sorted(times.items(), key=lambda item: files[item[0]].stat().st_mtime if item[0] in files else 0.0))
    fixed = {name for name, file in files.items() if json.loads(file.read_text())["stage"] == "faithfulness"}
    rows: list[list[Any]] = [
        [name, t["wall_s"], t["peak_bytes"] / 2**20, t["wall_s"] * (1 if name in fixed else photographs / count) / 3600]
        for name, t in times.items()
    ]
    rows.append(["all", sum(row[1] for row in rows), max(row[2] for row in rows), sum(row[3] for row in rows)])
    note = (
        f"Seconds of this run ({count} photographs of {info['megapixels'] / count:.1f} megapixels) times "
        f"{photographs:,} / {count}: of photographs of that size, on the same machine, by the same settings "
        f"(faithfulness looks at a fixed number)."
    )
    note += f" The paper's whole pipeline took about {HOURS} hours on one K40." if paper_a else ""
    columns = ["stage", "here, s", "largest process, MiB", f"{photographs:,} photographs, h"]
    return [{"title": "Time and memory", "columns": columns, "rows": rows, "note": note}]


def interval(measures: dict[str, Any], name: str) -> str | None:
    """A measure of metrics.json with its 95 % interval, as text."""
    value, low, high = (measures.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return None
    if low is None or high is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({low:.3f}{' to ' if low < 0 else '–'}{high:.3f})"


def show(table: dict[str, Any], context: Context) -> None:
    """Prints a table, or says its rows where machines listen."""
    if context.cluster.as_json:
        context.say(f"{table['title']}: {json.dumps(table['rows'])}")
        return
    drawn = Table(title=table["title"], caption=table["note"] or None, caption_justify="left", title_justify="left")
    for number, name in enumerate(table["columns"]):
        drawn.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in table["rows"]:
        drawn.add_row(
            *("–" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row)
        )
    console = context.console if context.console.is_terminal else Console(file=context.console.file, width=120)
    console.print(drawn, markup=False)


def tables_path(context: Context) -> Path:
    return context.run / "tables.json"


def read_tables(context: Context) -> list[dict[str, Any]]:
    path = tables_path(context)
    return list(json.loads(path.read_text())["tables"]) if path.exists() else []


def reads(config: TablesConfig, context: Context) -> Iterable[Path]:
    return [metrics_path(context)]


def writes(config: TablesConfig, context: Context) -> Iterable[Path]:
    return [tables_path(context)]


STAGE = Stage("tables", TablesConfig, run, reads, writes)
