"""The report's photographs, wrong and right cases by grade: lesions, saliency, border rule, crop, sliding window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd
import zarr

from tilestream import report
from tilestream.geometry import Region
from tilestream.methods import Border
from tilestream.report import Card, Gallery, Picture, Section

from .base import Context
from .crops import crops_path, table_path
from .evaluate import columns
from .ingest import located
from .localise import LocaliseConfig, ground_truth, read_masks, result_path
from .predict import predictions_path
from .saliency import candidates_path, centres_path, overview_path
from .saliency_config import field_of_view
from .windows import map_path, windows_path

Records = Mapping[str, dict[str, Any]]
"""What the journal has of each stage by name, in the order in which they were run."""


@dataclass(frozen=True)
class Run:
    """The files of a run from which cards are made: those of the stages that its predictions were made from."""

    context: Context
    records: Records
    width_px: int
    classes: tuple[str, str]

    def _of(self, verb: str) -> list[dict[str, Any]]:
        return [record["config"] for record in self.records.values() if record["stage"] == verb]

    def _named(self, verb: str, key: str, default: str) -> str:
        """The stage that the last one of a verb took from; the default where it took from none or there is none."""
        return str((self._of(verb) or [{}])[-1].get(key) or default)

    @cached_property
    def crops(self) -> str:
        return self._named("predict", "crops", "crops")

    @cached_property
    def saliency(self) -> str:
        record = self.records.get(self.crops)
        return str(record["config"]["centres"]) if record else "saliency"

    @cached_property
    def windows(self) -> str:
        return self._named("predict", "windows", "windows")

    @cached_property
    def rows(self) -> pd.DataFrame:
        """A row a photograph, by id: its predictions and its centre, as far as there are any."""
        predicted, centres = (
            pd.read_parquet(path) if path.exists() else None
            for path in (predictions_path(self.context), centres_path(self.context, self.saliency))
        )
        if centres is not None and predicted is not None:
            centres = centres.drop(columns="probability")
            return predicted.merge(centres, on="id", how="left").sort_values("id", ignore_index=True)
        found = centres if predicted is None else predicted
        return pd.DataFrame({"id": []}) if found is None else found.sort_values("id", ignore_index=True)

    @cached_property
    def models(self) -> dict[str, str]:
        """The models that decided, and the prefix of their columns; the last one's decisions are right or wrong."""
        path = predictions_path(self.context)
        return columns(pd.read_parquet(path)) if path.exists() else {}

    @cached_property
    def cut(self) -> pd.DataFrame:
        """The first crop of each photograph, by id."""
        path = table_path(self.context, self.crops)
        table = pd.read_parquet(path) if path.exists() else pd.DataFrame({"id": [], "position": []})
        return table.sort_values("position").drop_duplicates("id").set_index("id")

    @cached_property
    def candidates(self) -> dict[str, list[tuple[int, int]]]:
        """Of each photograph the centres after the first."""
        path = candidates_path(self.context, self.saliency)
        if not path.exists():
            return {}
        table = pd.read_parquet(path).sort_values(["id", "rank"])
        return {
            str(id): list(zip(part["y_px"], part["x_px"], strict=True))
            for id, part in table[table["rank"] > 0].groupby("id")
        }

    @cached_property
    def found(self) -> pd.DataFrame:
        """What the first localise stage found, by photograph."""
        names = [name for name, record in self.records.items() if record["stage"] == "localise"]
        paths = [path for name in names if (path := result_path(self.context, name, ".parquet")).exists()]
        return pd.concat(map(pd.read_parquet, paths)).drop_duplicates("id").set_index("id") if paths else pd.DataFrame()

    def masks(self, id: str) -> dict[str, np.ndarray] | None:
        """Masks (H, W) of a photograph's lesions by kind; None where they are not known.

        They are where the last localise stage had them, as long as that is there, or were ingested with the photograph.
        """
        told = [LocaliseConfig(**config) for config in reversed(self._of("localise"))]
        there = [c for c in told if c.lesions and located(Path(c.lesions), self.context).is_dir()]
        for config in [*there, LocaliseConfig()]:
            if truth := ground_truth(config, self.context, [id]).get(id):
                return read_masks(truth, self.context.store, id)
        return None

    @cached_property
    def window(self) -> tuple[int, int] | None:
        """Side and stride of the sliding window in px; None where there are no maps."""
        path = windows_path(self.context, self.windows)
        if not path.exists() or self.windows not in self.records:
            return None
        stride_px = int(pd.read_parquet(path)["stride_px"].iloc[0])
        return int(self.records[self.windows]["config"]["window_px"]), stride_px

    def border(self, id: str, shape: tuple[int, int], extent: tuple[int, int]) -> np.ndarray:
        """Where the saliency stage's border rule lets centres be, on a picture (h, w) of a photograph of `extent`."""
        config = self.records[self.saliency]["config"]
        circle = config.get("border_rule", "frame") == "circle"
        field = field_of_view(self.context.store, id) if circle else None
        return Border(shape, float(config["border"]), field, extent).mask(Region.whole(shape))


def gallery(run: Run, count: int) -> Iterator[Section]:
    """At most `count` photographs in one section, or in two, wrong and right decisions, by grade."""
    if count == 0:
        return
    for heading, of, part, share in _groups(run, count):
        rows = spread(part, share)
        intro = f"{len(rows)} of {len(part)}{of}{', by grade' if 'grade' in rows else ''}. "
        intro += "Lesions that are known are outlined in yellow; the crop's frame and centre are cyan, small crosses "
        intro += "the next candidates; what the border rule leaves out is dark."
        intro += " Windows: a probability of 0 is clear, of 1 yellow." if run.window else ""
        yield Section(heading, intro, [Gallery([_card(run, row) for _, row in rows.iterrows()])])


def _groups(run: Run, count: int) -> Iterator[tuple[str, str, pd.DataFrame, int]]:
    """Wrong and right cases of the test photographs, where labels say which; everything otherwise."""
    table = run.rows
    if not len(table):
        return
    if "label" not in table or not table["label"].notna().any():
        yield "Photographs", "", table, count
        return
    name, prefix = list(run.models.items())[-1]
    known = table[table["label"].notna() & table[f"{prefix}decision"].notna()]
    known = known[known["split"] == "test"] if (known["split"] == "test").any() else known
    wrong = known["label"] != known[f"{prefix}decision"]
    half = min(int(wrong.sum()), max(count - count // 2, count - int((~wrong).sum())))
    of = f" by the {name.replace('_', ' ')} model"
    for kind, part, share in (("Wrong", known[wrong], half), ("Right", known[~wrong], count - half)):
        if len(part) and share:
            yield f"{kind} decisions", of, part, share


def spread(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """At most `count` rows, as many of each grade as there are, in order of grade and id."""
    if "grade" not in table:
        return table.head(count)
    turn = table.groupby("grade", dropna=False).cumcount()
    chosen = table.assign(turn=turn).sort_values(["turn", "grade", "id"]).head(count)
    return chosen.drop(columns="turn").sort_values(["grade", "id"])


def _card(run: Run, row: pd.Series) -> Card:
    id = str(row["id"])
    picture, extent = small(run.context, id, run.width_px)
    masks = run.masks(id)
    marked = np.zeros(extent, bool)
    for mask in (masks or {}).values():
        marked |= mask > 0
    pictures = [_photograph(id, picture, None if masks is None else marked)]
    if not pd.isna(row.get("y_px")):
        pictures += _saliency(run, id, picture, extent, (int(row["y_px"]), int(row["x_px"])))
    if id in run.cut.index:
        pictures.append(_crop(run, id, marked))
    if run.window and (path := map_path(run.context, run.windows, id)).exists():
        pictures.append(_window_map(run.window, path, id, picture, extent))
    facts, tone = _facts(run, row, None if masks is None else list(masks))
    return Card(id, pictures, facts, tone)


def _photograph(id: str, picture: np.ndarray, marked: np.ndarray | None) -> Picture:
    if marked is None:
        return Picture(report.photograph(picture), "photograph", f"photograph {id}")
    size = (picture.shape[1], picture.shape[0])
    there = cv2.resize(marked.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
    caption = "photograph, lesions outlined" if there.any() else "photograph, without lesions"
    return Picture(report.photograph(report.outlined(picture, there), fine=True), caption, f"{caption}: {id}")


def _saliency(
    run: Run, id: str, picture: np.ndarray, extent: tuple[int, int], centre: tuple[int, int]
) -> Iterator[Picture]:
    """The overlay, and the border rule with the centres and the crop's frame."""
    shape = (picture.shape[0], picture.shape[1])
    overview = overview_path(run.context, run.saliency, id)
    if overview.exists():
        data = report.overlay(picture, _fit(np.load(overview), shape))
        yield Picture(data, "saliency", f"saliency of {id}")
    crop = None
    if id in run.cut.index:
        side = _crops(run).shape[-1]
        y0, x0 = int(run.cut.at[id, "y0_px"]), int(run.cut.at[id, "x0_px"])
        crop = (y0, x0, y0 + side, x0 + side)
    framed = report.frame(
        picture,
        crop,
        allowed=run.border(id, shape, extent) if run.saliency in run.records else None,
        centre=centre,
        others=run.candidates.get(id, []),
        photograph_px=extent,
    )
    yield Picture(report.photograph(framed, fine=True), "border rule and crop", f"crop frame on {id}")


def _crops(run: Run) -> Any:
    return zarr.open_array(crops_path(run.context, run.crops) / "image", mode="r")


def _crop(run: Run, id: str, marked: np.ndarray) -> Picture:
    row = run.cut.loc[id]
    crop = np.ascontiguousarray(np.asarray(_crops(run)[int(row["position"])]).transpose(1, 2, 0))
    inside = np.zeros(crop.shape[:2], bool)
    y0, x0 = int(row["y0_px"]), int(row["x0_px"])
    there = marked[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]]
    inside[: there.shape[0], : there.shape[1]] = there
    shown = report.outlined(crop, inside)
    return Picture(report.photograph(shown, fine=bool(inside.any())), "crop", f"crop of {id}")


def _window_map(window: tuple[int, int], path: Path, id: str, picture: np.ndarray, extent: tuple[int, int]) -> Picture:
    """Each window's probability over the middle of the window, a stride wide, from 0 (clear) to 1."""
    values, (side_px, stride_px) = np.load(path), window
    cells, inside = [], []
    for shown, whole, count in zip(picture.shape[:2], extent, values.shape, strict=True):
        at = (np.arange(shown) + 0.5) * whole / shown - side_px / 2 + stride_px / 2
        index = np.floor(at / stride_px).astype(int)
        cells.append(np.clip(index, 0, count - 1))
        inside.append((index >= 0) & (index < count))
    shown_map = np.where(inside[0][:, None] & inside[1], values[np.ix_(*cells)], 0)
    words = f"windows, probability {values.min():.2f} to {values.max():.2f}"
    return Picture(report.overlay(picture, shown_map, highest=1.0, colormap="plasma"), words, f"{words}: {id}")


def _facts(
    run: Run, row: pd.Series, kinds: list[str] | None
) -> tuple[dict[str, str], Literal["good", "bad", "neutral"]]:
    facts: dict[str, str] = {}
    tone: Literal["good", "bad", "neutral"] = "neutral"
    if not pd.isna(row.get("grade")):
        facts["grade"] = str(int(row["grade"]))
        if not pd.isna(row.get("five_grade")):
            facts["grade"] += f", by the five-grade model {int(row['five_grade'])}"
    for name, prefix in run.models.items():
        if pd.isna(row[f"{prefix}probability"]):
            continue
        decision = int(row[f"{prefix}decision"])
        said = f"{run.classes[decision]} ({row[f'{prefix}probability']:.3f})"
        if not pd.isna(row["label"]):
            right = int(row["label"]) == decision
            said += ", right" if right else ", wrong"
            tone = "good" if right else "bad"  # the last model's stays
        facts[name.replace("_", " ")] = said
    if not pd.isna(row.get("y_px")):
        facts["centre"] = f"y {int(row['y_px'])}, x {int(row['x_px'])} px, saliency {row['value']:.3g}"
    if row["id"] in run.found.index:
        found = run.found.loc[row["id"]]
        facts["lesions"] = (
            f"{int(found['lesions'])}: {', '.join(kinds or []).replace('_', ' ')}" if found["lesions"] else "none"
        )
        if found["lesions"]:
            place = "on a lesion" if found["on_lesion"] else f"{found['distance_px']:.0f} px from a lesion"
            held = int(found["lesions_held"])
            facts["found"] = f"centre {place}, crop holds {held or 'none'}"
    return facts, tone


def small(context: Context, id: str, width_px: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A photograph at most `width_px` wide, (h, w, 3) uint8, from the smallest stored level that is wide enough."""
    levels = context.store.levels(id)
    level = max((i for i, shape in enumerate(levels) if shape[2] >= width_px), default=0)
    image = np.ascontiguousarray(np.asarray(context.store.image(id, level)[:]).transpose(1, 2, 0))
    if image.shape[1] > width_px:
        size = (width_px, max(1, round(image.shape[0] * width_px / image.shape[1])))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return image, (levels[0][1], levels[0][2])


def _fit(overview: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The small picture of a map, brought to a picture's size by maxima, so that single points stay."""
    y = (np.arange(overview.shape[0]) * shape[0]) // overview.shape[0]
    x = (np.arange(overview.shape[1]) * shape[1]) // overview.shape[1]
    if overview.shape[0] < shape[0] or overview.shape[1] < shape[1]:
        return np.asarray(cv2.resize(overview, (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST))
    rows = np.maximum.reduceat(overview, np.searchsorted(y, np.arange(shape[0])), axis=0)
    fitted: np.ndarray = np.maximum.reduceat(rows, np.searchsorted(x, np.arange(shape[1])), axis=1)
    return fitted
