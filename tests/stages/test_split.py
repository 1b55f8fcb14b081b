"""From published names to splits: a patient's two eyes and byte-identical photographs stay on one side."""

import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from tilestream.stages import ClusterConfig, Context, execute
from tilestream.stages.pipeline import STAGES
from tilestream.stages.split import eyes_apart
from tilestream.store import Store
from tilestream.training import splits

PATIENTS = 16


@pytest.fixture(scope="module")
def eyepacs(tmp_path_factory, address):
    """A store by `--adapter eyepacs`: 16 patients' two eyes, 1-2 tied by one file, and 2-3; what ingest said."""
    folder = tmp_path_factory.mktemp("eyepacs")
    rows = ["image,level"]
    for patient in range(1, PATIENTS + 1):
        for side, eye in enumerate(("left", "right")):
            pixels = np.random.default_rng(2 * patient + side).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{patient}_{eye}.jpeg")
            rows.append(f"{patient}_{eye},{(patient + side) % 3}")
    for copy, original in (("2_left", "1_right"), ("3_left", "2_right")):
        shutil.copy(folder / f"{original}.jpeg", folder / f"{copy}.jpeg")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    place = tmp_path_factory.mktemp("stores") / "eyepacs.zarr"
    with Context(folder, place, ClusterConfig(scheduler=address), console=Console(file=io.StringIO())) as context:
        STAGES["ingest"].run(STAGES["ingest"].config(folder=folder, adapter="eyepacs"), context)
    return Store(place)


def sides(store: Store, run: Path, seed: int) -> pd.DataFrame:
    """The samples with the side that the stage puts each on."""
    with Context(run, store.path, console=Console(file=io.StringIO())) as context:
        execute("split", STAGES["split"], STAGES["split"].config(seed=seed), context)
    return store.samples().merge(pd.read_parquet(run / "splits.parquet"), on="id")


def torn(table: pd.DataFrame) -> bool:
    """Whether a patient or a file is on two sides."""
    return any((table.groupby(column)["split"].nunique() > 1).any() for column in ("patient", "source_sha256"))


def test_patients_and_labels_come_from_the_adapter(eyepacs):
    samples = eyepacs.samples()
    assert samples["patient"].tolist() == [id.split("_")[0] for id in samples["id"]]
    assert set(samples["label"]) == {0, 1, 2}
    stored = eyepacs.labels()
    assert (stored["eye"] == stored["id"].str.split("_").str[1]).all()


def test_eyes_and_copies_stay_on_one_side(eyepacs, tmp_path, monkeypatch):
    for seed in range(5):
        table = sides(eyepacs, tmp_path / str(seed), seed)
        assert not torn(table)
        assert set(table["split"]) == {"train", "validation", "test"}
        assert table.set_index("id").loc[["1_left", "2_left", "2_right", "3_right"], "split"].nunique() == 1
    # the negative control: without groups some are torn apart
    monkeypatch.setattr(splits, "groups", lambda samples: np.arange(len(samples)))
    assert torn(sides(eyepacs, tmp_path / "control", 0))


def test_pairs_of_eyes_that_are_two_patients_are_told(eyepacs, tmp_path):
    """EyePACS' own names, ingested as any CSV: the split would put a patient's eyes on two sides, in silence."""
    samples = eyepacs.samples()
    assert eyes_apart(samples) == []
    alone = samples.assign(patient=samples["id"])
    assert eyes_apart(alone) == sorted(map(str, range(1, PATIENTS + 1)))
    assert eyes_apart(alone.assign(id=alone["id"].str.replace("_", "-"))) == []
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "samples", lambda self: alone)
        with Context(tmp_path, eyepacs.path, console=Console(file=said, soft_wrap=True)) as context:
            STAGES["split"].run(STAGES["split"].config(), context)
    assert "warning: photographs named 1_left and 1_right, and 15 more pairs" in said.getvalue()
