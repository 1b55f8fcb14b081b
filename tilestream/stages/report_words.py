"""The report's sections on visual words: AUC by their number, the patches of each word, maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import zarr

from tilestream.report import Curve, KeyFigures, Picture, Section, photograph
from tilestream.report.page import Item
from tilestream.report.words import auc_by_words, patch_strip

from .base import Context
from .evaluate import read_metrics
from .words import count_of, maps_path, patches_path, striking, words_path, zarr_of

Records = Mapping[str, dict[str, Any]]
"""What the journal has of each stage by name, in the order in which they were run."""
SHOWN = 24
"""Words whose patches are shown, at most."""
PRINTED = Curve([55, 100], [0.96, 0.97])
"""Costa and Campilho (2017), section 4.2 and Fig. 3: DR2, sparse SURF."""


def visual_words(context: Context, records: Records) -> Iterator[Section]:
    """A section a search stage, and one a words stage."""
    for name in _stages(records, "search"):
        if trials_path(context, name).exists():
            yield _by_number(context, records, name)
    stages = _stages(records, "words")
    for name in stages:
        if words_path(context, name).exists():
            yield Section(*_learnt(context, records[name]["config"], name, len(stages) == 1))


def _by_number(context: Context, records: Records, name: str) -> Section:
    """AUC against M: validation and test AUCs of the search's last rows, and the standard bags of visual words."""
    table = pd.read_parquet(trials_path(context, name))
    counts = table[table["test_auc"].notna()].sort_values("words")
    trials = table[table["test_auc"].isna()]
    best = trials.loc[trials["validation_auc"].idxmax()]
    intro = (
        f"{len(trials)} settings were tried at random; {best['id']} had the highest validation AUC: {best['words']} "
        f"words, learning rate {best['learning_rate']:.2g}, dropout {best['dropout']:.2f}, {best['hidden']} hidden "
        "units. The number of words was then varied, the rest as it was; nothing was chosen by test photographs."
    )
    if counts.empty:
        return Section(f"AUC by number of words: {name}", intro)
    words = counts["words"].to_numpy()
    bounds = (words, counts["test_auc_low"].to_numpy(), counts["test_auc_high"].to_numpy())
    curves = {
        "ConvBoVW, test": Curve(words, counts["test_auc"].to_numpy(), band=bounds),
        "ConvBoVW, validation": Curve(words, counts["validation_auc"].to_numpy()),
        "paper, on DR2 (Fig. 3)": PRINTED,
    }
    metrics = read_metrics(context) or {}
    points = {
        f"{other}, test": (count, metrics[other]["auc"])
        for other in _stages(records, "bovw")
        if (metrics.get(other) or {}).get("auc") is not None and (count := count_of(context, other)) is not None
    }
    caption = "AUC against the number of visual words; bars: DeLong's 95 % intervals; grey: chance."
    alt = f"AUC by number of words: {', '.join(f'{r.words}: {r.test_auc:.3f}' for r in counts.itertuples())}"
    return Section(
        f"AUC by number of words: {name}", intro, [Picture(auc_by_words(curves, points), caption, alt, chart=True)]
    )


def _learnt(context: Context, config: dict[str, Any], name: str, only: bool) -> tuple[str, str, list[Item]]:
    """What a words stage found, the best signs of pathological photographs first."""
    words, patches = pd.read_parquet(words_path(context, name)), pd.read_parquet(patches_path(context, name))
    order, pixels = striking(words), zarr.open_array(zarr_of(context, name), mode="r")
    counts = f"{order['normal'].iloc[0]} normal and {order['pathological'].iloc[0]} pathological"
    most = "all" if not config["tolerated"] else f"{1 - config['tolerated']:.0%} of the"
    intro = (
        f"The words of {config['model']}. A word is active on a photograph where it is there more than on {most} "
        f"normal training photographs; counted on {counts} {config['split']} photographs, with Wilson's 95 % "
        f"intervals; p by Fisher's exact test, adjusted for {len(words)} words. Each word is shown by the patches "
        "where it is there most, one a photograph; frames: blue for normal, yellow for pathological photographs."
    )
    alone = int(words["pathological_only"].sum())
    items: list[Item] = [KeyFigures({"words": len(words), "on pathological photographs only": alone})]
    for row in order.head(SHOWN).itertuples():
        shown = patches[patches["word"] == row.word]
        if len(shown):
            labels = shown["label"].tolist()
            strip = patch_strip([np.asarray(pixels[row.word, rank]) for rank in shown["rank"]], labels)
            items.append(
                Picture(strip, _told(row), f"word {row.word}: {sum(labels)} pathological of {len(labels)} patches")
            )
    for path in sorted(maps_path(context, name).glob("*.png")):
        alt = f"map of words: {path.stem}"
        caption = f"{path.stem}: places of active words; the word that is there most at each place, a colour a word."
        read: np.ndarray | None = cv2.imread(str(path))
        if read is None:
            raise ValueError(f"{path} is no image that can be read; run the stage {name} again")
        drawn = np.ascontiguousarray(read[..., ::-1])
        items.append(Picture(photograph(drawn, fine=True), caption, alt))
    return "Visual words" if only else f"Visual words: {config['model']}", intro, items


def _told(row: Any) -> str:
    def share(which: str) -> str:
        count, total, low, high = (getattr(row, n) for n in (f"active_{which}", which, f"{which}_low", f"{which}_high"))
        return f"{count} of {total} {which}" + (f" ({low:.0%}–{high:.0%})" if total else "")

    weight = "" if np.isnan(row.weight) else f", weight {row.weight:+.2f}".replace("-", "−")
    alone = ", on pathological only" if row.pathological_only else ""
    p = "p < 0.001" if row.p_adjusted < 0.001 else f"p = {row.p_adjusted:.3f}"
    return f"Word {row.word}{weight}: active on {share('pathological')}, {share('normal')}; {p}{alone}."


def _stages(records: Records, verb: str) -> list[str]:
    return [name for name, record in records.items() if record["stage"] == verb]


def trials_path(context: Context, name: str) -> Path:
    """What a search stage NAME has tried: the file that `search.trials_path` names."""
    return context.run / f"{name}.parquet"


def reads(context: Context, records: Records) -> Iterable[Path]:
    """The files that these sections are made from."""
    found = [trials_path(context, name) for name in _stages(records, "search")]
    for name in _stages(records, "words"):
        found += [part(context, name) for part in (words_path, patches_path, zarr_of, maps_path)]
    return found
