"""A report's figures: photographs with saliency or a crop's frame as JPEG bytes, charts as PNG bytes.

Pictures are (H, W, 3) uint8, RGB. Boxes are half-open (y0, x0, y1, x1), points (y, x), circles (y, x, radius). Charts
are drawn through matplotlib's object interface on the Agg canvas: no window, no global state, safe in threads.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]
Circle = tuple[float, float, float]
Point = tuple[float, float]

CROP_RGB, BORDER_RGB, CASING_RGB = (64, 224, 255), (255, 255, 255), (0, 0, 0)
FRACTION_BITS = 4  # OpenCV draws at 1/16 px

# Okabe and Ito's colours, told apart by colour-blind readers too, less the yellow that vanishes on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("-", "--", "-.", ":")
INK, RULE = "#3a4348", "#c4c2bc"
DPI = 180  # the page shows charts at half their pixels: sharp on dense screens, 10 pt text at 12.5 px


def photograph(picture: Pixels, quality: int = 88) -> bytes:
    """`picture` as JPEG bytes, colour at full resolution; `quality` in 1..100."""
    _check(picture)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]  # thin coloured lines
    written, data = cv2.imencode(".jpg", picture[..., ::-1], options)
    if not written:
        raise ValueError(f"picture of shape {picture.shape} could not be encoded as JPEG with quality={quality}")
    return bytes(data)


def overlay(
    picture: Pixels,
    saliency: NDArray[np.floating[Any]],
    *,
    percentile: float = 99.5,
    opacity: float = 0.9,
    colormap: str = "viridis",
) -> bytes:
    """JPEG of `picture`, dimmed towards grey, under its saliency map (H, W), both reduced to one size by the caller.

    Only the positive part is shown: from 0, transparent, to the given percentile of the positive values, the
    colormap's far end at `opacity`. A map without a positive value leaves the dimmed picture.

    Raises ValueError where the sizes differ or the map is not finite.
    """
    _check(picture)
    if saliency.shape != picture.shape[:2]:
        raise ValueError(f"saliency has shape {saliency.shape}, the picture {picture.shape[:2]}; reduce both alike")
    if not np.isfinite(saliency).all():
        raise ValueError(f"saliency holds {np.count_nonzero(~np.isfinite(saliency))} values that are not finite")
    strength = np.maximum(saliency, 0).astype(np.float64)
    if (positive := strength[strength > 0]).size:
        strength = np.minimum(strength / np.percentile(positive, percentile), 1)
    colour = matplotlib.colormaps[colormap](strength)[..., :3] * 255
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None]
    ground = 0.65 * (0.35 * picture + 0.65 * grey)
    alpha = opacity * np.sqrt(strength)[..., None]  # the square root keeps weak regions visible
    return photograph(np.rint((1 - alpha) * ground + alpha * colour).astype(np.uint8))


def frame(
    picture: Pixels,
    crop: Box,
    *,
    border: Box | Circle | None = None,
    centre: Point | None = None,
    photograph_px: tuple[int, int] | None = None,
) -> bytes:
    """JPEG of `picture` with the crop's frame, the border rule and the centre; arguments as in `draw_frame`."""
    return photograph(draw_frame(picture, crop, border=border, centre=centre, photograph_px=photograph_px), quality=92)


def draw_frame(
    picture: Pixels,
    crop: Box,
    *,
    border: Box | Circle | None = None,
    centre: Point | None = None,
    photograph_px: tuple[int, int] | None = None,
) -> Pixels:
    """A copy of `picture` (H, W, 3) with the frame of `crop` in cyan and a cross at `centre`.

    What the border rule excludes, outside the box or circle `border`, is dimmed behind a white line. Coordinates are
    pixels of the full photograph, whose (height, width) is `photograph_px` (default: the picture's own).
    """
    _check(picture)
    height, width = picture.shape[:2]
    full_height, full_width = photograph_px or (height, width)
    scale = np.array([height / full_height, width / full_width])
    line_px = max(1, round(max(height, width) / 400))
    drawn = picture.copy()
    if border is not None:
        inside = np.zeros((height, width), np.uint8)
        _draw(inside, border, scale, 255, cv2.FILLED)
        drawn = np.where(inside[..., None] > 0, drawn, drawn // 2)
        _draw(drawn, border, scale, BORDER_RGB, line_px)
    for colour, thickness_px in ((CASING_RGB, 3 * line_px), (CROP_RGB, line_px)):
        _draw(drawn, crop, scale, colour, thickness_px)
        if centre is not None:
            y, x = _fixed_point(np.array(centre) * scale + scale / 2 - 0.5)  # a point is the middle of its pixel
            arm = 6 * line_px << FRACTION_BITS
            for dy, dx in ((arm, 0), (0, arm)):
                cv2.line(drawn, (x - dx, y - dy), (x + dx, y + dy), colour, thickness_px, cv2.LINE_8, FRACTION_BITS)
    return drawn


def roc(curves: Mapping[str, tuple[ArrayLike, ArrayLike, str]]) -> bytes:
    """ROC curves, each under its name as (false positive rates, true positive rates, text of its AUC)."""
    if not curves:
        raise ValueError("curves={} is empty; give at least one curve")
    figure, (axes,) = _canvas(4.7, 4.4)
    axes.plot([0, 1], [0, 1], color=RULE, linewidth=1, zorder=1)
    for index, (name, (false_positive_rate, true_positive_rate, text)) in enumerate(curves.items()):
        axes.plot(false_positive_rate, true_positive_rate, label=f"{name}  {text}", clip_on=False, **_style(index))
    axes.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="lower right", title="AUC (95 % interval)", alignment="left", edgecolor="none")
    return _png(figure)


def training_curves(histories: Mapping[str, Sequence[Mapping[str, float | None]]]) -> bytes:
    """Losses (left) and AUCs (right) of each epoch, from one history a network: a record an epoch, in order.

    Every key that ends in `loss` or `auc` is drawn (`train_loss`, `validation_loss`, `validation_auc` ...), others such
    as a learning rate are not; `epoch` numbers the records, 1, 2 ... where it is missing. None leaves a gap.
    Raises ValueError where nothing is to be drawn.
    """
    figure, panels = _canvas(9.6, 3.6, columns=2)
    for axes, ending, label in zip(panels, ("loss", "auc"), ("loss", "AUC"), strict=True):
        for colour_index, (name, history) in enumerate(histories.items()):
            keys = dict.fromkeys(key for record in history for key in record if key.lower().endswith(ending))
            epochs = np.array([record.get("epoch", number) for number, record in enumerate(history, 1)], float)
            for dash_index, key in enumerate(keys):
                values = np.array([record.get(key) for record in history], float)  # None becomes NaN, a gap
                measure = key[: -len(ending)].strip("_ ") or label
                marker = "o" if len(history) == 1 else ""  # a single epoch makes no line
                style = _style(colour_index, dash_index)
                axes.plot(epochs, values, label=f"{name}, {measure}", marker=marker, **style)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend(frameon=False)
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
    figure, (axes,) = _canvas(1.6 + 0.95 * len(column_names), 1.1 + 0.75 * len(row_names))
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
    figure, (axes,) = _canvas(5.4, 4.4)
    edges = np.linspace(0, 1, bins + 1)
    for label, name in enumerate(names):
        counts = np.histogram(given[truth == label], edges)[0]
        fill: dict[str, Any] = {"facecolor": COLOURS[label] + "40", "edgecolor": COLOURS[label], "linewidth": 1.5}
        axes.stairs(counts / max(1, counts.sum()), edges, fill=True, label=f"{name} ({counts.sum():,})", **fill)
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1, linestyle="--", label=f"threshold {threshold:.3f}")
    axes.set(xlabel=f"probability of “{names[1]}”", ylabel="share of the class", xlim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False)
    return _png(figure)


def _draw(canvas: Pixels, shape: Box | Circle, scale: NDArray[np.float64], colour: Any, thickness_px: int) -> None:
    """Draw `shape`, a box or a circle in the photograph's pixels, its edge on the outermost pixels inside it."""
    if len(shape) == 4:
        y0, x0 = _fixed_point(np.array(shape[:2]) * scale)
        y1, x1 = _fixed_point(np.array(shape[2:]) * scale - 1)
        cv2.rectangle(canvas, (x0, y0), (x1, y1), colour, thickness_px, cv2.LINE_8, FRACTION_BITS)
        return
    y, x = _fixed_point(np.array(shape[:2]) * scale + scale / 2 - 0.5)
    radius_y, radius_x = _fixed_point(shape[2] * scale)
    cv2.ellipse(canvas, (x, y), (radius_x, radius_y), 0, 0, 360, colour, thickness_px, cv2.LINE_AA, FRACTION_BITS)


def _fixed_point(values: NDArray[np.float64]) -> tuple[int, int]:
    """Two coordinates as OpenCV's fixed-point integers."""
    first, second = np.rint(values * (1 << FRACTION_BITS)).astype(int).tolist()
    return first, second


def _check(picture: Pixels) -> None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture is {picture.dtype} of shape {picture.shape}; it must be uint8 (H, W, 3)")


def _canvas(width_in: float, height_in: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure with `columns` panels in the house style: labels and ticks in one ink, no box around."""
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(RULE)
        axes.tick_params(color=RULE, labelcolor=INK, labelsize=9)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
    return figure, panels


def _style(colour_index: int, dash_index: int | None = None) -> dict[str, Any]:
    """Line style of the nth curve: the dash repeats what the colour says, unless it has a meaning of its own."""
    dash = DASHES[(colour_index if dash_index is None else dash_index) % len(DASHES)]
    return {"color": COLOURS[colour_index % len(COLOURS)], "linestyle": dash, "linewidth": 2}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
