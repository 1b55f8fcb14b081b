"""The sliding window over full-resolution photographs (paper A, Listing 1), one job a photograph.

Which step of Listing 1 is which stage (pipelines/listing1.yaml):

- line 2, the first network on downsampled photographs: `train` with examples=squares;
- lines 3-9, its saliency over the downsampled photographs, border rule, argmax, crops of the full photographs:
  `saliency` with resolution=square, then `crops` with select=training;
- line 10, the first network of crops: `train` with examples=crops;
- lines 11-18, the second round, on full photographs: `saliency` with that network, resolution=full and window_px=512,
  then `crops`. By section 2.2 ("a corresponding network by copying all of the weights ... but replacing the
  fully-connected layer with a 1 x 1 convolution", then "each training image is assessed by the network" and Formula 1)
  it is the network after surgery that is differentiated: its positive logits, summed over all windows. Without
  window_px it is the network with adaptive pooling, whose gradient is the same up to a factor, save that after surgery
  positions within a window of the edges, which fewer windows see, count less;
- line 19, the second network of crops: `train` with examples=crops;
- lines 20-22, its probabilities over full photographs and their histogram: this stage, with the network of line 19
  after surgery. The histogram is of all windows: these lines have no border rule. It is the highest window, which the
  paper does not name, that is looked for on the eye alone, for the highest of all often lies in the black around it;
- line 23, the decision: `predict` with windows, which fits the support vector machine on validation photographs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from tilestream.cluster import Job
from tilestream.engine import stream
from tilestream.methods import Border, Extremes, eye_rules
from tilestream.methods.windows import BINS, Window, highest_window, histogram, probability_map
from tilestream.nets import SlidingWindow, fully_convolutional
from tilestream.store.layout import encode_id

from . import saliency_whole as whole
from .base import Context, Stage, StageConfig, digest, replacing, write_json
from .jobs import Load, run_jobs
from .models import locate, read_model
from .preprocess import ensure_extremes
from .runner import Journal
from .saliency import quarantine_path
from .saliency_config import BORDER_RULE, field_of_view
from .saliency_plans import check_memory
from .saliency_tasks import Task, source
from .scores import same_splits
from .split import chosen, path_of, write_table

COLUMNS = [f"h{bin:02d}" for bin in range(BINS)]
"""The histogram's: shares of windows whose probability is in [bin / 20, (bin + 1) / 20), the last one with 1."""


class WindowsConfig(StageConfig):
    """Classifies every window of the photographs by a network of crops, after surgery, and counts probabilities."""

    model: str = Field("crops", description="model file, or the name of one of this run's models: a network of crops")
    net: str | None = Field(None, description="package.module:factory, for a file that does not name its network")
    window_px: int = Field(512, ge=1, description="side of a window: that of the crops the network was trained on")
    target: int = Field(1, ge=0, description="the class whose probability counts")
    border_rule: Literal["frame", "circle"] = Field(
        "frame", description=f"for the highest window's centre, always in the field of view, {BORDER_RULE}"
    )
    border: float = Field(0.1, ge=0, lt=0.5, description="kappa for it, the share left out at each side")
    splits: list[str] | None = Field(None, description="only photographs of these splits (default: all)")
    limit: int | None = Field(None, ge=1, description="only the first so many photographs")


def run(config: WindowsConfig, context: Context) -> None:
    """Writes windows.parquet and windows_maps/ID.npy, (h, w) float64, a window's probability each.

    The table has id, the histogram h00..h19 (shares of all windows), probability, y_px, x_px (of the highest window
    whose centre the border rule allows, on the eye), windows (how many) and stride_px (from one to the next). Under
    another stage name S the files are S.parquet and S_maps. Finished photographs are in the journal. Photographs at
    which worker processes die are left out, and told in quarantine/S.json: [{id, reason}].
    """
    samples = chosen(context, config.splits, config.limit)
    if not len(samples):
        raise ValueError(f"splits={config.splits}: no photograph is in them")
    model = read_model(context, config.model, config.net)
    same_splits(context, config.model, model.preprocessing)
    extents = {row.id: (int(row.height), int(row.width)) for row in samples.itertuples()}
    device = context.device
    machine = _machine(context, device)
    check_memory(context)
    net = fully_convolutional(model.net, config.window_px)
    streamed = stream(net, memory=machine["memory"])
    for extent in sorted(set(extents.values())):  # a budget that is too small is said before any work
        shape = tuple(max(n, config.window_px) for n in extent)
        context.say(f"{context.name}: {streamed.plan((3, *shape), backward=False)}")
    average = model.preprocessing.get("average")
    known: dict[str, Extremes] = {}
    if average is not None:
        known = ensure_extremes(context, np.asarray(average, np.float32), list(samples["id"]))
    path = locate(context, config.model)
    common: dict[str, Any] = {
        "store": str(context.store_path), "model": str(path), "model_sha256": digest(path), "net": config.net,
        "window_px": config.window_px, "target": config.target, "plan": "", **machine,
    }  # fmt: skip
    journal = Journal(context.partial_path / "windows.jsonl")
    done = {id: record for id, record in journal.read().items() if id in extents}
    if done:
        context.say(f"{context.name}: {len(done)} of {len(samples)} photographs are done already")

    store = context.store

    def make(id: str) -> Job:
        task = Task(id=id, extremes=known.get(id), **common)
        rules = eye_rules(extents[id], config.border, field_of_view(store, id), config.border_rule)
        return Job.call(id, one, task, rules, size=extents[id][0] * extents[id][1] / 1e6)

    def result(id: str, value: tuple[np.ndarray, Window, int]) -> None:
        probabilities, highest, stride_px = value
        with replacing(map_path(context, context.name, id)) as temporary, temporary.open("wb") as file:
            np.save(file, probabilities)
        shares = dict(zip(COLUMNS, histogram(probabilities).tolist(), strict=True))
        place = {"probability": highest.probability, "y_px": highest.y_px, "x_px": highest.x_px}
        done[id] = {"id": id, **shares, **place, "windows": probabilities.size, "stride_px": stride_px}
        journal.append(done[id])

    def poison(id: str, reason: str) -> None:
        done[id] = {"id": id, "quarantined": reason}
        journal.append(done[id])

    missing = [id for id in samples["id"] if id not in done]
    run_jobs(context, context.name, missing, make, result, Load(device=device), poison)
    rows = [done[id] for id in samples["id"] if "quarantined" not in done[id]]
    lost = [{"id": id, "reason": done[id]["quarantined"]} for id in samples["id"] if "quarantined" in done[id]]
    if not rows:
        raise RuntimeError(f"{context.name}: worker processes die at every photograph; the first: {lost[0]['reason']}")
    if lost:
        context.say(f"{context.name}: {len(lost)} photographs are quarantined: {', '.join(r['id'] for r in lost[:5])}")
    write_json(quarantine_path(context, context.name), lost)
    table = pd.DataFrame(rows, columns=["id", *COLUMNS, "probability", "y_px", "x_px", "windows", "stride_px"])
    write_table(windows_path(context, context.name), table)


def _machine(context: Context, device: str) -> dict[str, Any]:
    """What last bits depend on besides the model; unfinished work goes on with the tiles that it was begun with."""
    mine = {"memory": int(context.cluster.memory), "device": device, "threads": context.cluster.threads}
    path = context.partial_path / "machine.json"
    if not path.exists():
        write_json(path, mine)
    was: dict[str, Any] = json.loads(path.read_text())
    for name in ("device", "threads"):
        if was[name] != mine[name]:
            raise ValueError(
                f"{name}={mine[name]}, but the unfinished work was done with {name}={was[name]}, and results would "
                f"mix; give --{name} {was[name]}, or leave out --resume to start afresh"
            )
    return was


def one(task: Task, rules: list[Border]) -> tuple[np.ndarray, Window, int]:
    """One photograph's map of probabilities, its highest window on the eye, and the windows' stride, on a worker."""
    image, streamed = source(task), whole.streamed(task)
    probabilities = probability_map(streamed, image, task.target)
    net = streamed.net
    assert isinstance(net, SlidingWindow)
    return probabilities, highest_window(probabilities, net, rules), net.stride_px


def windows_path(context: Context, name: str) -> Path:
    return context.run / f"{name}.parquet"


def map_path(context: Context, name: str, id: str) -> Path:
    return context.run / f"{name}_maps" / f"{encode_id(id)}.npy"


def reads(config: WindowsConfig, context: Context) -> Iterable[Path]:
    return [locate(context, config.model), *([path_of(context)] if config.splits else [])]


def writes(config: WindowsConfig, context: Context) -> Iterable[Path]:
    maps = map_path(context, context.name, "x").parent
    return [windows_path(context, context.name), maps, quarantine_path(context, context.name)]


STAGE = Stage("windows", WindowsConfig, run, reads, writes)
