"""Probabilities of photographs by networks: on squashed squares, and on crops, one a photograph or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from tilestream.methods import Threshold
from tilestream.methods.attention import AttentionPooling, Bags, attend, fit_attention
from tilestream.nets import Model, load_model, save_model
from tilestream.training import Examples, predict

from .base import Context, digest
from .crops import crops_path, read_crops
from .examples import Crops, Squares
from .jobs import steps
from .models import read_model
from .preprocess import average_of, ensure_extremes
from .split import chosen, path_of, write_table

if TYPE_CHECKING:
    from .predict import PredictConfig

Floats = npt.NDArray[np.float64]
FLIPS: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (1, 2))
"""Axes of (c, y, x)."""
_ATTENTION = "tilestream.methods.attention:AttentionPooling"


class _Flipped:
    """Examples, mirrored along axes."""

    def __init__(self, examples: Examples, axes: tuple[int, ...]) -> None:
        self.examples, self.axes, self.labels = examples, axes, examples.labels

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(np.flip(self.examples[index], self.axes))


def graded(context: Context, pathological_from: int, normal: Sequence[str] = ("normal",)) -> pd.DataFrame:
    """id, label, grade, split of all photographs; label (Int64) is 1 from that grade on, 0 below, NA where unknown.

    Where classes have names, those of folders, they are no grades: label, and grade, is 0 for the classes called
    `normal`, in capitals or not, and 1 for others. ValueError where none is.
    """
    table = chosen(context, None).rename(columns={"label": "grade"})
    names = table.get("class", pd.Series(dtype="string")).str.lower()
    if not names.dropna().str.fullmatch(r"\d+").all():
        if not (here := names.isin([name.lower() for name in normal])).any():
            raise ValueError(
                f"classes are {', '.join(sorted(names.dropna().unique()))}: none is called {' or '.join(normal)}; "
                "rename the folder of normal photographs, and ingest anew"
            )
        table["grade"] = (~here).astype("Int64").where(names.notna())
        pathological_from = 1
    table["label"] = (table["grade"] >= pathological_from).astype("Int64")
    return table[["id", "label", "grade", "split"]]


def predictions_of(context: Context, name: str) -> Path:
    """The table of a stage that predicts: predictions.parquet of `predict`, NAME_predictions.parquet of another."""
    return context.run / ("predictions.parquet" if name == "predict" else f"{name}_predictions.parquet")


def write_predictions(context: Context, table: pd.DataFrame, probability: npt.ArrayLike, threshold: Threshold) -> None:
    """Writes this stage's NAME_predictions.parquet: id, label, probability, decision, grade, split.

    `table` is that of `graded`, or some of its rows; probability is (n,), that of label 1.
    """
    scores = np.asarray(probability, np.float64)
    table = table.assign(probability=scores, decision=threshold.decide(scores))
    table = table[["id", "label", "probability", "decision", "grade", "split"]]
    table.attrs["model"] = context.name  # whose columns have no prefix
    write_table(predictions_of(context, context.name), table)


def same_splits(context: Context, name: str, kept: Mapping[str, Any]) -> None:
    """Refuses a model of other splits than this run's: its training photographs may be in this run's test set.

    `kept` is what is kept with the model.
    """
    learnt = kept.get("splits_sha256")
    if path_of(context).exists() and learnt is not None and learnt != digest(path_of(context)):
        raise ValueError(f"model={name!r} was trained on other splits than this run's splits.parquet; train it again")


def square_probabilities(config: PredictConfig, context: Context, name: str, ids: list[str], classes: int) -> Floats:
    """Of the squashed squares, (n, classes); ValueError for a model of another number of classes."""
    model = _read(context, name)
    examples = Squares(context.store, ids, [0] * len(ids), average_of(model.preprocessing, name))
    views = [found for found, _ in _run(config, context, name, model.net, examples, classes)]
    mean: Floats = np.mean(views, axis=0)
    return mean


def crop_probabilities(config: PredictConfig, context: Context, table: pd.DataFrame) -> pd.Series:
    """Of the unhealthy class, by id: that of a photograph's crops together, as `config.aggregate` says.

    `table` has id, label (0, 1 or NA) and split of all photographs, for attention to be trained by.
    """
    assert config.crops is not None
    crops = read_crops(context, config.crops)
    crops = crops.sort_values(["id", "rank"] if "rank" in crops else ["id"], kind="stable", ignore_index=True)
    if config.aggregate == "first":
        crops = crops.groupby("id").head(1)
    model = _read(context, config.model)
    average = average_of(model.preprocessing, config.model)
    known = ensure_extremes(context, average, list(crops["id"].unique()))  # the model's, whatever they were cut by
    crops = crops.assign(low=[known[id].low for id in crops["id"]], high=[known[id].high for id in crops["id"]])
    examples = Crops(crops_path(context, config.crops), crops, [0] * len(crops), average)
    found = _run(config, context, config.model, model.net, examples, 2)
    if config.aggregate != "attention":
        values = np.mean([probabilities[:, 1] for probabilities, _ in found], axis=0)
        return pd.Series(values, index=crops["id"]).groupby(level=0).agg(config.aggregate)
    bag, ids = pd.factorize(crops["id"])
    if len(found[0][1]) != len(bag):
        raise ValueError(f"model={config.model!r} has no linear layer, whose features attention would take")
    views = [Bags(features, bag) for _, features in found]
    net = _attention(config, context, views[0], table.set_index("id").loc[ids])
    return pd.Series(np.mean([attend(net, view)[0] for view in views], axis=0), index=ids)


def attention_path(folder: Path, name: str = "predict") -> Path:
    return folder / ("attention.safetensors" if name == "predict" else f"{name}_attention.safetensors")


def _attention(config: PredictConfig, context: Context, bags: Bags, photographs: pd.DataFrame) -> AttentionPooling:
    """The attention of an old run, or one that is trained on the training photographs' crops and kept."""
    if config.decision == "stored":
        net = load_model(attention_path(context.models_path, context.name)).net
        assert isinstance(net, AttentionPooling)
        return net
    parts = []
    for split in ("train", "validation"):
        chosen = ((photographs["split"] == split) & photographs["label"].notna()).to_numpy()
        if not chosen.any():
            raise ValueError(f"aggregate='attention' needs crops of {split} photographs; {config.crops} has none")
        mine = chosen[bags.bag]
        part = Bags(bags.features[mine], np.unique(bags.bag[mine], return_inverse=True)[1])
        parts += [part, photographs["label"][chosen].to_numpy(np.int64)]
    net = fit_attention(*parts)
    path = attention_path(context.run / "models", context.name)
    path.parent.mkdir(exist_ok=True)
    save_model(path, net, architecture=_ATTENTION, parameters={"features": bags.features.shape[1]})
    return net


def _read(context: Context, name: str) -> Model:
    model = read_model(context, name)
    same_splits(context, name, model.preprocessing)
    return model


def _run(
    config: PredictConfig, context: Context, name: str, net: nn.Module, examples: Examples, classes: int
) -> list[tuple[Floats, npt.NDArray[np.float32]]]:
    """Of each view, flipped or not, probabilities (n, classes) and what the last linear layer takes (n, d)."""
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    features: list[np.ndarray] = []
    for layer in [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]:
        layer.register_forward_pre_hook(lambda _, given: features.append(given[0].float().cpu().numpy()))
    views, found = FLIPS if config.flips else FLIPS[:1], []
    total = len(views) * -(-len(examples) // config.batch_size)
    with steps(context, context.name, total, "batches") as step:
        for axes in views:
            view = _Flipped(examples, axes) if axes else examples
            probabilities = predict(net, view, config.batch_size, on_batch=step)
            if probabilities.shape[1] != classes:
                given = probabilities.shape[1]
                raise ValueError(f"model={name!r} has {given} classes, {classes} are needed here; name another model")
            found.append((probabilities, np.concatenate(features or [np.empty((0, 0), np.float32)])))
            features.clear()
    return found
