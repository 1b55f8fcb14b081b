"""A report's charts as PNG bytes: curves with their intervals, calibration, confusion, rates beside chance, training.

Drawn through matplotlib's object interface on the Agg canvas: no window, no global state, safe in threads.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import ArrayLike

# Okabe and Ito's colours, told apart by colour-blind readers too, less the yellow that vanishes on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("-", "--", "-.", ":")
INK, RULE = "#3a4348", "#c4c2bc"
DPI = 180  # the page shows charts at half their pixels: sharp on dense screens, 10 pt text at 12.5 px
BAND = 0.16  # opacity
_BELOW: dict[str, Any] = {"loc": "outside lower center", "alignment": "left", "frameon": False, "fontsize": 9}
"""The legend's place, where no curve or interval crosses it."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve's corners, the text of its area, and its interval: grid, lower and upper bounds, (g,) each, or None."""

    x: ArrayLike
    y: ArrayLike
    text: str = ""
    band: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares (n,) in [0, 1] at `levels` (n,), rising and above 0, beside what chance gives.

    `low` and `high`, their interval, may hold None. `curve`: corners x, y of the steps that the shares are read from.
    """

    levels: Sequence[float]
    values: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]
    chance: Sequence[float | None]
    curve: tuple[ArrayLike, ArrayLike] | None = None


def roc(curves: Mapping[str, Curve]) -> bytes:
    """ROC curves by name: x the false positive rates, y the true positive rates."""
    _some(curves)
    figure, (axes,) = _canvas(4.7, 4.5 + 0.22 * len(curves))
    axes.plot([0, 1], [0, 1], color=RULE, linewidth=1, zorder=1)
    for index, (name, curve) in enumerate(curves.items()):
        _band(axes, curve, index)
        axes.plot(curve.x, curve.y, label=f"{name}  {curve.text}", clip_on=False, **_style(index))
    axes.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    figure.legend(title="AUC (95 % interval)", **_BELOW)
    return _png(figure)


def precision_recall(curves: Mapping[str, Curve], share: float) -> bytes:
    """Precision-recall curves by name: x the recalls, rising, y the precisions; chance is `share`, the positives'."""
    _some(curves)
    figure, (axes,) = _canvas(4.7, 4.5 + 0.22 * len(curves))
    axes.axhline(share, color=RULE, linewidth=1, zorder=1)
    for index, (name, curve) in enumerate(curves.items()):
        _band(axes, curve, index, step="pre")
        style = {**_style(index), "drawstyle": "steps-pre"}  # the precision of a recall is that of the next corner
        axes.plot(curve.x, curve.y, label=f"{name}  {curve.text}", clip_on=False, **style)
    axes.set(xlabel="sensitivity (recall)", ylabel="precision (ppv)", xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal")
    figure.legend(title="area (95 % interval)", **_BELOW)
    return _png(figure)


def reliability(bins: Sequence[Mapping[str, float]], name: str = "unhealthy") -> bytes:
    """The reliability diagram of `bins`: start, stop, count, probability (their mean), share, and its low and high.

    Below it how many predictions each bin holds. Raises ValueError without a bin.
    """
    _some(bins)
    figure = _figure(4.7, 4.6)
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _plain(axes, counts)
    axes.plot([0, 1], [0, 1], color=RULE, linewidth=1, zorder=1)
    mean, share, low, high, count = (
        np.array([part[key] for part in bins], float) for key in ("probability", "share", "low", "high", "count")
    )
    axes.errorbar(mean, share, [share - low, high - share], marker="o", clip_on=False, capsize=3, **_style(0))
    axes.set(ylabel=f"share that is {name}", xlim=(0, 1), ylim=(0, 1))
    edges = [part["start"] for part in bins]
    counts.bar(edges, count, [part["stop"] - part["start"] for part in bins], align="edge", **_fill(0))
    counts.set(xlabel=f"probability of “{name}”", ylabel="number")
    counts.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return _png(figure)


def rates(found: Mapping[str, Rates], *, x_label: str, y_label: str) -> bytes:
    """Shares by level, each with its interval, beside what chance gives: dashed, with open marks. Levels by powers."""
    _some(found)
    figure, (axes,) = _canvas(5.4, 4.8)
    for index, (name, each) in enumerate(found.items()):
        style = _style(index, 0)
        levels, values, low, high, chance = (
            np.array(v, float) for v in (each.levels, each.values, each.low, each.high, each.chance)
        )
        axes.vlines(levels, low, high, color=style["color"], linewidth=1.5)
        line = {**style, "linestyle": "none"} if each.curve else style
        if each.curve:
            axes.step(*each.curve, where="post", **style)
        axes.plot(levels, values, marker="o", label=name, **line)
        by_chance = {**_style(index, 1), "linewidth": 1.5, "markerfacecolor": "white"}
        axes.plot(levels, chance, marker="o", label=f"{name}, by chance", **by_chance)
    ticks = sorted({level for each in found.values() for level in each.levels})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda level, _: f"1/{1 / level:g}" if level < 1 else f"{level:g}"))
    shown = (v for each in found.values() for v in (*each.values, *each.high, *each.chance) if v)
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(ticks[0] / 1.25, ticks[-1] * 1.25))
    axes.set_ylim(0, min(1, 1.1 * max(shown, default=1)))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(ncols=2, **_BELOW)
    return _png(figure)


def lines(
    panels: Mapping[str, Mapping[str, Curve]], *, x_label: str, y_label: str, ticks: Sequence[str] | None = None
) -> bytes:
    """Curves by name in panels by title, side by side on one scale; `ticks` name x = 0, 1 ... where x is no number.

    The same name has the same colour in each panel. Raises ValueError where nothing is to be drawn.
    """
    _some(panels)
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    _some(names)
    figure, axes = _canvas(1.2 + 3.8 * len(panels), 3.9, columns=len(panels))
    for each, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, curve in curves.items():
            marker = "o" if ticks else ""
            each.plot(curve.x, curve.y, label=f"{name}  {curve.text}", marker=marker, **_style(names.index(name)))
        each.set(xlabel=x_label, ylabel=y_label)
        each.set_title(title, color=INK, fontsize=10)
        each.legend(frameon=False, fontsize=9)
        each.sharey(axes[0])
        if ticks:
            each.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right")
    return _png(figure)


def training_curves(histories: Mapping[str, Sequence[Mapping[str, float | None]]]) -> bytes:
    """Losses (left) and AUCs (right) of each epoch, from one history a network: a record an epoch, in order.

    Every key that ends in `loss` or `auc` is drawn (`train_loss`, `validation_loss`, `validation_auc` ...), others such
    as a learning rate are not; `epoch` numbers the records, 1, 2 ... where it is missing. None leaves a gap.
    Raises ValueError where nothing is to be drawn.
    """
    figure, panels = _canvas(10.8, 3.6, columns=2)
    dashes: dict[str, int] = {}
    lines: dict[str, Any] = {}
    for axes, ending, label in zip(panels, ("loss", "auc"), ("loss", "AUC"), strict=True):
        for colour_index, (name, history) in enumerate(histories.items()):
            keys = dict.fromkeys(key for record in history for key in record if key.lower().endswith(ending))
            epochs = np.array([record.get("epoch", number) for number, record in enumerate(history, 1)], float)
            for key in keys:
                values = np.array([record.get(key) for record in history], float)  # None becomes NaN, a gap
                measure = key[: -len(ending)].strip("_ ") or label
                style = _style(colour_index, dashes.setdefault(measure, len(dashes)))
                marker = "o" if len(history) == 1 else ""  # a single epoch makes no line
                lines[f"{name}: {measure}"] = axes.plot(epochs, values, marker=marker, **style)[0]
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False)
    if not any(axes.lines for axes in panels):
        raise ValueError("histories hold no key that ends in 'loss' or 'auc'; name the measures so")
    return _png(figure)


def confusion(
    matrix: ArrayLike,
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    row_label: str = "label",
    column_label: str = "decision",
    truth: Literal["rows", "columns"] = "rows",
) -> bytes:
    """Counts (rows, columns) in cells, shaded and annotated by their share of the true class, which `truth` locates.

    For paper A's Table 4, rows decision and columns grade, `truth="columns"`. Raises ValueError where the names do not
    fit the matrix.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(row_names), len(column_names)):
        raise ValueError(f"matrix has shape {counts.shape}, the names ({len(row_names)}, {len(column_names)})")
    totals = counts.sum(axis=1 if truth == "rows" else 0, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    figure, (axes,) = _canvas(1.4 + 0.8 * len(column_names), 1.1 + 0.75 * len(row_names))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        place: dict[str, Any] = {"ha": "center", "color": "white" if share > 0.6 else INK}
        axes.text(column, row, f"{count:,}", va="bottom", fontsize=11, **place)
        axes.text(column, row + 0.06, f"{share:.0%}", va="top", fontsize=8, **place)
    axes.set_xticks(range(len(column_names)), column_names)
    axes.set_yticks(range(len(row_names)), row_names)
    axes.set(xlabel=column_label, ylabel=row_label)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return _png(figure)


def probability_histogram(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    threshold: float | None = None,
    bins: int = 20,
    names: tuple[str, str] = ("healthy", "unhealthy"),
) -> bytes:
    """Probabilities (n,) in [0, 1] of the positive class, as one histogram a label (n,) 0/1, each scaled to its class.

    `threshold` is drawn as a line. Raises ValueError for a probability outside [0, 1].
    """
    given, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if not ((given >= 0) & (given <= 1)).all():
        raise ValueError(f"probabilities span [{given.min()}, {given.max()}]; they must lie in [0, 1]")
    figure, (axes,) = _canvas(5.2, 4.6)
    edges = np.linspace(0, 1, bins + 1)
    for label, name in enumerate(names):
        counts = np.histogram(given[truth == label], edges)[0]
        text = f"{name} ({counts.sum():,})"
        axes.stairs(counts / max(1, counts.sum()), edges, fill=True, label=text, **_fill(label))
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1, linestyle="--", label=f"threshold {threshold:.3f}")
    axes.set(xlabel=f"probability of “{names[1]}”", ylabel="share of the class", xlim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False)
    return _png(figure)


def _band(axes: Axes, curve: Curve, index: int, step: Literal["pre"] | None = None) -> None:
    if curve.band is not None:
        axes.fill_between(*curve.band, color=COLOURS[index % len(COLOURS)], alpha=BAND, linewidth=0, step=step)


def _some(given: Sequence[Any] | Mapping[str, Any]) -> None:
    if not given:
        raise ValueError("there is nothing to draw: no curve, bin or rate was given; leave the chart out")


def _figure(width_in: float, height_in: float) -> Figure:
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _canvas(width_in: float, height_in: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure with `columns` panels in the house style."""
    figure = _figure(width_in, height_in)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    _plain(*panels)
    return figure, panels


def _plain(*panels: Axes) -> None:
    """Labels and ticks in one ink, no box around."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(RULE)
        axes.tick_params(color=RULE, labelcolor=INK, labelsize=9)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)


def _style(colour_index: int, dash_index: int | None = None) -> dict[str, Any]:
    """Line style of the nth curve: the dash repeats what the colour says, unless it has a meaning of its own."""
    dash = DASHES[(colour_index if dash_index is None else dash_index) % len(DASHES)]
    return {"color": COLOURS[colour_index % len(COLOURS)], "linestyle": dash, "linewidth": 2}


def _fill(index: int) -> dict[str, Any]:
    return {"facecolor": COLOURS[index] + "40", "edgecolor": COLOURS[index], "linewidth": 1.5}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
