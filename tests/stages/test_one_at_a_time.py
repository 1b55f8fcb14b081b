"""One process a run's folder, models bound to their splits, epochs that grow: what a second command must not spoil."""

import os

import numpy as np
import pytest

from tilestream.stages import Context
from tilestream.stages.base import Stage, StageConfig
from tilestream.stages.runner import execute, locked
from tilestream.stages.scores import same_splits


def test_a_second_run_of_one_folder_is_refused_by_name(tmp_path):
    first, second = Context(tmp_path), Context(tmp_path)
    busy = rf"in use by process {os.getpid()} on .*, since \d{{4}}-"
    with locked(first), locked(first), pytest.raises(ValueError, match=busy), locked(second):
        pass
    with locked(second):  # the first has let go
        pass


def test_a_model_of_other_splits_is_refused(tmp_path):
    context = Context(tmp_path)
    kept = {"splits_sha256": "of another split"}
    same_splits(context, "first", kept)  # no splits here: new photographs
    (tmp_path / "splits.parquet").write_bytes(b"mine")
    with pytest.raises(ValueError, match="model='first' was trained on other splits"):
        same_splits(context, "first", kept)
    same_splits(context, "own", {"average": np.zeros(3)})


class Counting(StageConfig):
    """A stage that counts up to `epochs`, one a call of the loop."""

    epochs: int = 2
    other: int = 0


def test_only_fields_that_may_grow_keep_unfinished_work(tmp_path):
    found = []

    def run(config, context):
        file = context.partial_path / "count"
        found.append(file.exists())
        file.write_text("half")
        raise KeyboardInterrupt

    stage = Stage("count", Counting, run, uses_store=False, may_grow=frozenset({"epochs"}))
    for config in (Counting(), Counting(epochs=5), Counting(epochs=5, other=1)):
        with pytest.raises(KeyboardInterrupt), Context(tmp_path, resume=True) as context:
            execute("count", stage, config, context)
    assert found == [False, True, False]
