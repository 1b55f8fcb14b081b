"""A report's pictures of visual words: patches of one word side by side, maps of words, AUC by their number."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from matplotlib.colors import hsv_to_rgb
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray

from .charts import _BELOW, INK, RULE, Curve, _canvas, _png, _some, _style
from .pictures import Pixels, photograph

CLASS_RGB = ((86, 180, 233), (255, 230, 60))
"""Normal and pathological: Okabe and Ito's sky blue, and the yellow of lesions; vermilion is the eye's own colour."""
_GOLDEN = 0.618034
_FRAME_PX = 3


def patch_strip(patches: Sequence[Pixels], labels: Sequence[int]) -> bytes:
    """JPEG of patches (n, 3, p, p), over four in two rows, in frames of their photographs' classes: 0 blue, 1 yellow.

    Raises ValueError without a patch.
    """
    _some(patches)
    columns = len(patches) if len(patches) <= 4 else -(-len(patches) // 2)
    side = patches[0].shape[-1] + 2 * _FRAME_PX
    sheet = np.full((-(-len(patches) // columns) * side, columns * side, 3), 128, np.uint8)
    for index, (patch, label) in enumerate(zip(patches, labels, strict=True)):
        y, x = (place * side for place in divmod(index, columns))
        sheet[y : y + side, x : x + side] = CLASS_RGB[label]
        inside = slice(y + _FRAME_PX, y + side - _FRAME_PX), slice(x + _FRAME_PX, x + side - _FRAME_PX)
        sheet[inside] = patch.transpose(1, 2, 0)
    return photograph(sheet, quality=92, fine=True)


def word_map(
    picture: Pixels,
    extent: tuple[int, int],
    words: NDArray[np.integer[Any]],
    places: NDArray[np.floating[Any]],
    marks: Mapping[int, Sequence[float]],
    *,
    round_places: bool,
) -> bytes:
    """PNG of two pictures side by side: the photograph with `marks`, and the word of each place, a colour a word.

    `picture` (h, w, 3) shows a photograph of `extent`; places (n, 3) are y_px, x_px, side_px there, drawn as discs, or
    as squares that fill the grid they lie on; a mark is a ring around a word's place, with the numbers of all there.
    """
    scale = picture.shape[1] / extent[1]
    grey = np.repeat(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    painted = grey.copy()
    step = np.diff(np.unique(places[:, 0])).min(initial=extent[0]) if len(places) else 0
    for word, (y, x, side) in sorted(zip(words.tolist(), places.tolist(), strict=True), key=lambda item: -item[1][2]):
        colour = _colour(word)
        at = (round((x + 0.5) * scale - 0.5), round((y + 0.5) * scale - 0.5))
        if round_places:
            cv2.circle(painted, at, max(3, round(side * scale / 12)), colour, -1, cv2.LINE_AA)
        else:
            corners = [tuple(round((v + 0.5 + sign * step / 2) * scale) for v in (x, y)) for sign in (-1, 1)]
            cv2.rectangle(painted, corners[0], (corners[1][0] - 1, corners[1][1] - 1), colour, -1)
    shown = cv2.addWeighted(grey, 0.35, painted, 0.65, 0)
    marked, rings = picture.copy(), dict[tuple[float, ...], list[int]]()
    for word, place in marks.items():
        rings.setdefault(tuple(place), []).append(word)
    for (y, x, side), here in rings.items():
        at = (round((x + 0.5) * scale - 0.5), round((y + 0.5) * scale - 0.5))
        radius, text = max(6, round(side * scale / 2)), " ".join(map(str, here))
        where = (min(at[0] + radius, picture.shape[1] - 10 * len(text)), max(12, at[1] - radius))
        for colour, thickness in (((0, 0, 0), 4), (_colour(here[0]), 2)):
            cv2.circle(marked, at, radius, colour, thickness, cv2.LINE_AA)
            cv2.putText(marked, text, where, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, thickness - 1, cv2.LINE_AA)
    both = np.concatenate([marked, np.full((picture.shape[0], 8, 3), 128, np.uint8), shown], axis=1)
    written, data = cv2.imencode(".png", both[..., ::-1])
    if not written:
        raise ValueError(f"a map of shape {both.shape} could not be encoded as PNG")
    return bytes(data)


def _colour(word: int) -> tuple[int, int, int]:
    red, green, blue = (round(255 * float(part)) for part in hsv_to_rgb((word * _GOLDEN % 1, 0.75, 1.0)))
    return red, green, blue


def auc_by_words(curves: Mapping[str, Curve], others: Mapping[str, tuple[int, float]] = {}) -> bytes:
    """AUCs by number of words: curves by name, with intervals as `band` (grid, low, high); `others` are single points.

    Numbers of words on a logarithmic scale. Raises ValueError where nothing is to be drawn.
    """
    _some(curves)
    figure, (axes,) = _canvas(5.4, 4.2)
    ticks = sorted({float(x) for curve in curves.values() for x in np.atleast_1d(np.asarray(curve.x, float))})
    for index, (name, curve) in enumerate(curves.items()):
        style = _style(index)
        axes.plot(curve.x, curve.y, marker="o", label=name, **style)
        if curve.band is not None:
            axes.vlines(*curve.band, color=style["color"], linewidth=1.5)
    for index, (name, (count, value)) in enumerate(others.items(), len(curves)):
        axes.plot([count], [value], marker="D", label=name, **{**_style(index), "linestyle": "none"})
        ticks.append(float(count))
    axes.axhline(0.5, color=RULE, linewidth=1, zorder=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(ticks))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="visual words, M", ylabel="AUC")
    figure.legend(ncols=2, labelcolor=INK, **_BELOW)
    return _png(figure)
