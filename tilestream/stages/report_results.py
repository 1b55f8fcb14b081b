"""The report's sections on how well the models decide and find lesions: tables and charts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from tilestream import report
from tilestream.methods import bootstrap
from tilestream.methods.metrics import pr_points, roc_points
from tilestream.report import Curve, KeyFigures, Picture, Rates, Section, Table

from .base import Context
from .evaluate import columns, fingerprint, patient_groups, read_metrics, selected
from .faithfulness import result_path as faithfulness_path
from .localise import result_path
from .predict import decision_path
from .tables import interval as plain_interval
from .tables import read_tables

MEASURES = {
    "auc": "AUC, interval by DeLong", "auc_bootstrap": "AUC, interval by draws", "auprc": "AUPRC",
    "sensitivity": "sensitivity", "specificity": "specificity", "ppv": "ppv", "npv": "npv", "accuracy": "accuracy",
    "kappa": "Cohen's kappa", "brier": "Brier score", "ece": "calibration error",
}  # fmt: skip
PAPERS = {
    "Table": "Grzeszczuk (2019), doi 10.7494/csci.2019.20.3.3343.",
    "Costa": "Costa and Campilho (2017), doi 10.1186/s41074-017-0023-6.",
}
"""By how the titles of their tables begin."""
MOST_BANDS = 3
"""Of more curves the bands would hide one another."""
FIVE = {"accuracy": "accuracy", "within_one_grade": "within one grade", "kappa": "quadratic weighted kappa"}
RATES = {"pointing_game": "centre on a lesion (pointing game)", "crop_holds_lesion": "crop holds a lesion"}
GRADES = [str(grade) for grade in range(5)]
GRID = np.linspace(0, 1, 201)
Floats = bootstrap.Floats
Band = tuple[Floats, Floats, Floats]


def results(context: Context, classes: tuple[str, str]) -> Iterator[Section]:
    """Measures, curves, calibration and confusion of the models; nothing where they are of other predictions."""
    metrics = read_metrics(context)
    names = (metrics or {}).get("predictions", ["predict"])
    if metrics is None or metrics["predictions_sha256"] != fingerprint(context, names):
        return
    table = selected(metrics["split"], context, names)
    table["patient_group"], of = patient_groups(table, context)
    models = {name: prefix for name, prefix in columns(table).items() if metrics.get(name, {}).get("photographs")}
    if models:
        intro = f"{_graded(table, classes)} Thresholds were fixed on validation photographs."
        items = [*_measures(metrics, models, of, classes[1]), *_curves(metrics, models, table, of)]
        yield Section("Results", intro, items)
        intro = f"What a probability means: of the photographs given it, that share should be {classes[1]}."
        yield Section("Calibration", intro, list(_calibration(context, metrics, models, table, classes)))
    matrices = list(_matrices(metrics, models, classes))
    if matrices:
        yield Section("Decisions by grade", "Counts, and shares of each grade's photographs.", matrices)


def _graded(table: pd.DataFrame, classes: tuple[str, str]) -> str:
    """Which grades make which class."""
    grades = table[table["grade"].notna()].groupby("label")["grade"].unique()
    said = (f"{classes[label]}: {', '.join(str(int(g)) for g in sorted(found))}" for label, found in grades.items())
    return f"Grades, {'; '.join(said)}."


def _measures(metrics: dict[str, Any], models: dict[str, str], of: str, positive: str) -> Iterator[KeyFigures | Table]:
    yield KeyFigures({f"AUC, {_words(name)}": interval(metrics[name], "auc") for name in models})
    rows: list[list[Any]] = [
        [label, *(metrics[name].get(key) for name in models)]
        for key, label in (("photographs", "photographs"), ("unhealthy", f"{positive} ones"))
    ]
    reference = metrics.get("reference", "naive")
    first = {key: MEASURES[key] for key in ("auc", "auc_bootstrap")}
    for key, label in {**first, f"auc_minus_{reference}": f"AUC minus {_words(reference)}", **MEASURES}.items():
        values = [interval(_as_auc(metrics[name]) if key == "auc_bootstrap" else metrics[name], key) for name in models]
        if any(value is not None for value in values):
            rows.append([label, *values])
    split = "" if metrics["split"] == "all" else f"{metrics['split']} "
    note = f"On the {split}photographs, with 95 % intervals: Wilson's of shares, DeLong's of the AUC, others by "
    yield Table(["measure", *map(_words, models)], rows, f"{note}{bootstrap.DRAWS:,} draws of whole {of}.")


def _as_auc(measures: dict[str, Any]) -> dict[str, Any]:
    """The AUC under the name of its other interval, which needs no value of its own."""
    known = measures.get("auc_bootstrap_low") is not None
    return {**measures, "auc_bootstrap": measures["auc"] if known else None}


def _curves(metrics: dict[str, Any], models: dict[str, str], table: pd.DataFrame, of: str) -> Iterator[Picture]:
    roc, precision = {}, {}
    for name, prefix in models.items():
        if metrics[name]["auc"] is None:
            continue
        known = table[table[f"{prefix}probability"].notna()]
        labels, scores = known["label"].to_numpy(), known[f"{prefix}probability"].to_numpy(float)
        rates, hits, _ = roc_points(labels, scores)
        right, found, _ = pr_points(labels, scores)
        groups = known["patient_group"].to_numpy()
        both = (sensitivity_at, precision_at)
        bands = [band(labels, scores, groups, read) if len(models) <= MOST_BANDS else None for read in both]
        roc[_words(name)] = Curve(rates, hits, interval(metrics[name], "auc") or "", bands[0])
        right[-1] = right[-2]  # up to the first corner precision is that corner's
        precision[_words(name)] = Curve(found[::-1], right[::-1], interval(metrics[name], "auprc") or "", bands[1])
    if not roc:
        return
    shaded = f"; shaded: 95 % of {bootstrap.DRAWS:,} draws of whole {of}, at each place by itself"
    shaded = shaded if len(models) <= MOST_BANDS else ""
    yield Picture(report.roc(roc), f"Receiver operating characteristic{shaded}.", _alt("ROC curves", roc), chart=True)
    share = float(table["label"].mean())
    drawn, caption = report.precision_recall(precision, share), f"Precision and recall{shaded}; grey: chance."
    yield Picture(drawn, caption, _alt("Precision-recall curves", precision), chart=True)


def _alt(what: str, curves: dict[str, Curve]) -> str:
    return f"{what}; areas: {', '.join(f'{name} {curve.text}' for name, curve in curves.items())}"


def band(
    labels: np.ndarray, scores: Floats, groups: np.ndarray, read: Callable[[Floats, Floats], Floats], seed: int = 0
) -> Band | None:
    """Where 95 % of a curve lie, place by place, when whole groups are drawn: grid, lower and upper bounds, (201,).

    `read` takes the positives and the negatives (k,) of a draw at each distinct score, the highest first. None where
    the draws say nothing about the spread: a single group, or a class missing in more than half of them.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, positive = scores[order], labels[order] == 1
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    drawn = []
    for weights in bootstrap.resampled(groups, seed):
        positives, negatives = (
            np.add.reduceat(weights[:, order] * which, starts, axis=1) for which in (positive, ~positive)
        )
        both = (positives.sum(axis=1) > 0) & (negatives.sum(axis=1) > 0)
        drawn += [read(p, n) for p, n in zip(positives[both], negatives[both], strict=True)]
    if len(drawn) < bootstrap.DRAWS / 2 or len(np.unique(groups)) < 2:
        return None
    low, high = np.quantile(np.stack(drawn), [0.025, 0.975], axis=0)
    return GRID, low, high


def sensitivity_at(positives: Floats, negatives: Floats) -> Floats:
    """The ROC curve's highest sensitivity at each false positive rate of the grid, straight between corners."""
    found, false = (np.r_[0, each.cumsum()] / each.sum() for each in (positives, negatives))
    sensitivity: Floats = np.interp(GRID, false, found)
    return sensitivity


def precision_at(positives: Floats, negatives: Floats) -> Floats:
    """The precision at each sensitivity of the grid: that of the highest score that reaches it."""
    found = positives.cumsum()
    called = found + negatives.cumsum()
    first = np.searchsorted(found, GRID * found[-1] - 1e-9)
    first = np.maximum(first, np.flatnonzero(called)[0])  # at recall 0, and scores that were not drawn
    precision: Floats = found[first] / called[first]
    return precision


def _calibration(
    context: Context, metrics: dict[str, Any], models: dict[str, str], table: pd.DataFrame, classes: tuple[str, str]
) -> Iterator[Picture]:
    path = decision_path(context)
    thresholds = json.loads(path.read_text()) if path.exists() else {}
    for name, prefix in models.items():
        measures, words = metrics[name], _words(name)
        if bins := measures.get("calibration"):
            caption = (
                f"Reliability of the {words} model, bars: Wilson's 95 % intervals. Brier score "
                f"{measures['brier']:.3f}, calibration error {measures['ece']:.3f}."
            )
            yield Picture(report.reliability(bins, classes[1]), caption, f"reliability diagram, {words}", chart=True)
        known = table[table[f"{prefix}probability"].notna()]
        threshold = thresholds.get(name, {}).get("value")
        given = (known[f"{prefix}probability"], known["label"])
        drawn = report.probability_histogram(*given, threshold=threshold, names=classes)
        yield Picture(drawn, f"Probabilities of the {words} model.", f"histogram of probabilities, {words}", chart=True)


def _matrices(metrics: dict[str, Any], models: dict[str, str], classes: tuple[str, str]) -> Iterator[Picture | Table]:
    for name in models:
        kinds: dict[str, Any] = {"row_label": "decision", "column_label": "grade", "truth": "columns"}
        matrix = report.confusion(np.asarray(metrics[name]["by_grade"]), classes, GRADES, **kinds)
        yield Picture(matrix, f"The {_words(name)} model.", f"decisions by grade, {_words(name)}", chart=True)
    if five := metrics.get("naive", {}).get("five_grade"):
        matrix = report.confusion(np.asarray(five["confusion"]), GRADES, GRADES, row_label="grade")
        yield Picture(matrix, "The five-grade head of the naive model.", "five-grade confusion matrix", chart=True)
        found = [f"{right:.3f}" if right is not None else "–" for right in five["class_accuracies"]]
        rows: list[list[Any]] = [[label, interval(five, key)] for key, label in FIVE.items()]
        rows += [[f"right in grade {grade}", share] for grade, share in zip(GRADES, found, strict=True)]
        yield Table(["five grades", "value"], rows, f"On {five['photographs']} photographs, with 95 % intervals.")


def comparison(context: Context) -> Iterator[Section]:
    """The paper's tables beside this run's."""
    tables = [
        Table(t["columns"], [[_figure(cell) for cell in row] for row in t["rows"]], t["note"], title=t["title"])
        for t in read_tables(context)
    ]
    if tables:
        sources = [source for begin, source in PAPERS.items() if any(t.title.startswith(begin) for t in tables)]
        yield Section("Beside the paper" if sources else "Time", " ".join(sources), tables)


def localisation(context: Context, stages: list[str]) -> Iterator[Section]:
    """Where centres and crops lie against known lesions, a section a localise stage."""
    for name in stages:
        path = result_path(context, name)
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        heading = "Localisation" if len(stages) == 1 else f"Localisation: {name}"
        ill = found["photographs"] - found["without_lesions"]
        tolerance = f", a point within {found['tolerance_px']:g} px being on it" if found["tolerance_px"] else ""
        intro = (
            f"Centres of {found['centres']} and crops of {found['crops_px']} px against known lesions{tolerance}: "
            f"{found['photographs']} photographs, {ill} of them with lesions. Chance is a centre drawn evenly inside "
            f"the same border rule ({found['border_rule']}, {found['border']:g}) and the field of view."
        )
        yield Section(heading, intro, list(_found(found)))


def faithfulness(context: Context, stages: list[str], positive: str) -> Iterator[Section]:
    """Whether maps say what the network does, a section a faithfulness stage."""
    for name in stages:
        path = faithfulness_path(context, name)
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        if "shares" not in found:
            context.say(f"report: {path.name} is of an older version and has no curves; delete it and run {name} again")
            continue
        heading = "Faithfulness of the maps" if len(stages) == 1 else f"Faithfulness of the maps: {name}"
        intro = (
            f"Means over {found['photographs']} squashed photographs, {found['unhealthy']} of them {positive}. "
            "Deletion blurs a map's highest places first, insertion brings them into the blurred photograph first. "
            "Where a map says what the network looks at, the probability falls earlier, or rises earlier, than by a "
            "map of noise."
        )
        yield Section(heading, intro, list(_faithful(found, positive)))


def _faithful(found: dict[str, Any], positive: str) -> Iterator[Table | Picture]:
    likeness = {method: [each["spearman"] for each in found[method]["correlations"]] for method in found["methods"]}
    rows: list[list[Any]] = [
        [name, found[name]["deletion"], found[name]["insertion"], *(values[i] for i in (0, -1))]
        for name, values in {**likeness, "noise": [None]}.items()
    ]
    columns = ["map", "deletion", "insertion", "likeness without the last layer", "without any weights"]
    note = (
        "Deletion and insertion: areas under the curves; a good map has a low and a high one. Likeness: Spearman's "
        "correlation with absolute maps of the network after its weights were drawn anew; it should fall to 0."
    )
    yield Table(columns, rows, note)
    panels = {
        which: {
            name: Curve(found["shares"], found[name][f"{which}_curve"], f"{found[name][which]:.3f}")
            for name in (*likeness, "noise")
        }
        for which in ("deletion", "insertion")
    }
    drawn = report.lines(panels, x_label="share exchanged", y_label=f"probability of “{positive}”")
    yield Picture(drawn, "Deletion and insertion, with their areas.", "deletion and insertion curves", chart=True)
    blocks = [each["down_to"] for each in found[found["methods"][0]]["correlations"]]
    curves = {name: Curve(range(len(blocks)), np.array(values, float)) for name, values in likeness.items()}
    labels = {"x_label": "weights drawn anew, down to", "y_label": "Spearman's correlation"}
    drawn = report.lines({"likeness": curves}, **labels, ticks=blocks)
    caption = "Likeness of the maps when the network forgets, from the logits down."
    yield Picture(drawn, caption, "correlation with maps of fresh weights, by layer", chart=True)


def _found(found: dict[str, Any]) -> Iterator[Table | Picture]:
    last = found["coverage"][-1]
    named = [(label, found[key]) for key, label in RATES.items()]
    named.append((f"lesions covered by {last['crops']} crops", last))
    named += [(f"… of them {_words(kind)}", rate) for kind, rate in last["kinds"].items()]
    rows = [[label, *_beside(rate), interval(rate, "ratio")] for label, rate in named]
    if froc := found["froc"]:
        mean = {
            "value": froc["mean"],
            "low": froc["mean_low"],
            "high": froc["mean_high"],
            "chance": froc["mean_chance"],
        }
        rows.append(["lesions found by centres (mean of FROC)", *_beside(mean), interval(froc, "ratio")])
    yield Table(["", "share", "by chance", "times chance"], rows, "With 95 % intervals.")
    crops = {"crops that hold a lesion": found["crops_hold_lesion"], "lesions covered": found["coverage"]}
    curves = {name: _rates(rates, "crops") for name, rates in crops.items()}
    if ill := [name for name, rates in curves.items() if any(v is not None for v in rates.values)]:
        drawn = report.rates({name: curves[name] for name in ill}, x_label="crops a photograph", y_label="share")
        yield Picture(drawn, "By the number of crops.", "shares by the number of crops, beside chance", chart=True)
    if froc:
        curve = np.asarray(froc["curve"], float).reshape(-1, 2).T
        bounds = (froc["levels"], froc["sensitivity"], froc["low"], froc["high"], froc["chance"])
        rates = Rates(*bounds, curve=(curve[0], curve[1]))
        drawn = report.rates({"centres": rates}, x_label="false positives a photograph", y_label="lesions found")
        caption = f"Free-response ROC; there are {froc['most']:.2g} false positives a photograph in all."
        yield Picture(drawn, caption, "FROC curve, beside chance", chart=True)


def _beside(rate: dict[str, Any]) -> tuple[str | None, str | None]:
    """A share with its interval, and what chance gives."""
    value, low, high, chance = (rate[key] for key in ("value", "low", "high", "chance"))
    if value is None:
        return None, None
    digits = 2 if any(0 < share < 0.01 for share in (value, chance)) else 1
    bounds = "" if low is None else f" ({100 * low:.{digits}f}–{100 * high:.{digits}f})"
    return f"{100 * value:.{digits}f} %{bounds}", f"{100 * chance:.{digits}f} %"


def _rates(rates: list[dict[str, Any]], level: str) -> Rates:
    values, low, high, chance = ([rate[key] for rate in rates] for key in ("value", "low", "high", "chance"))
    return Rates([rate[level] for rate in rates], values, low, high, chance)


def interval(measures: dict[str, Any], name: str) -> str | None:
    """A measure with its 95 % interval, as text with the minus sign of numbers."""
    text = plain_interval(measures, name)
    return None if text is None else text.replace("-", "−")


def _figure(cell: Any) -> Any:
    """A number of a table with three figures, or as many as it has before the point."""
    if not isinstance(cell, float):
        return cell
    decimals = next((n for n, least in ((0, 100), (1, 10), (2, 1)) if abs(cell) >= least), 3)
    return report.as_text(cell, decimals)


def _words(name: str) -> str:
    return name.replace("_", " ")
