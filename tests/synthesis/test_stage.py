"""The stage `synth`: its files, what they say, and the same bytes however many workers make them."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from tilestream.stages import ClusterConfig, Context, synth
from tilestream.synthesis import LESION_KINDS

SETTINGS = {"images": 10, "seed": 4, "height_px": 320, "width_px": 448, "folder": "."}


def make(folder: Path, address: str, **settings: object) -> Path:
    """Run the stage on the tests' cluster of two workers."""
    cluster = ClusterConfig(scheduler=address, workers=2)
    with Context(folder, cluster=cluster, console=Console(file=io.StringIO())) as context:
        synth.run(synth.SynthConfig(**(SETTINGS | settings)), context)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, address: str) -> Path:
    return make(tmp_path_factory.mktemp("synth"), address)


def test_files(made: Path) -> None:
    names = pd.read_csv(made / "labels.csv")["image"].tolist()
    assert names == [f"{n}_{eye}" for n in range(1, 6) for eye in ("left", "right")]
    expected = {f"{n}.jpeg" for n in names} | {f"lesions/{n}.png" for n in names}
    tables = {"labels.csv", "lesions.csv", "legend.csv"}
    assert {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()} == expected | tables
    assert sorted(pd.read_csv(made / "labels.csv")["level"]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_label_images_and_table_agree_by_the_legend(made: Path) -> None:
    legend = pd.read_csv(made / "legend.csv").set_index("kind")["value"]
    assert legend.to_dict() == {"none": 0} | {kind: 1 + index for index, kind in enumerate(LESION_KINDS)}
    lesions = pd.read_csv(made / "lesions.csv")
    assert list(lesions.columns) == ["image", "kind", "y_px", "x_px", "radius_px", "size_um", "um_per_px"]
    for row in pd.read_csv(made / "labels.csv").itertuples():
        with Image.open(made / "lesions" / f"{row.image}.png") as file:
            values = np.asarray(file)
        with Image.open(made / f"{row.image}.jpeg") as file:
            assert (values.dtype, values.shape) == (np.uint8, file.size[::-1])
        here = lesions[lesions["image"] == row.image]
        assert (row.level == 0) == here.empty
        assert set(np.unique(values)) == {0} | set(legend[here["kind"]])
        at = values[here["y_px"].round().astype(int), here["x_px"].round().astype(int)]
        np.testing.assert_array_equal(at, legend[here["kind"]])
    np.testing.assert_allclose(
        lesions["size_um"],
        2 * lesions["radius_px"] * lesions["um_per_px"],
        atol=0.01 * lesions["um_per_px"].max() + 0.1,
    )


def test_same_bytes_from_one_process_as_from_two_workers(made: Path, tmp_path: Path) -> None:
    labels = pd.read_csv(made / "labels.csv")
    (tmp_path / "lesions").mkdir()
    for index in reversed(range(len(labels))):
        name, level = labels["image"][index], int(labels["level"][index])
        synth.make(level, (320, 448), 4 * 1_000_003 + index, "realistic", str(tmp_path), name)
        for file in (f"{name}.jpeg", f"lesions/{name}.png"):
            assert (tmp_path / file).read_bytes() == (made / file).read_bytes()


def test_same_bytes_again_and_others_for_other_seeds_and_tiers(made: Path, tmp_path: Path, address: str) -> None:
    again, seed, tier = (
        make(tmp_path / str(n), address, **settings) for n, settings in enumerate([{}, {"seed": 5}, {"tier": "stress"}])
    )
    for path in (p for p in made.rglob("*") if p.is_file()):
        assert (again / path.relative_to(made)).read_bytes() == path.read_bytes()
    tables = [pd.read_csv(folder / "lesions.csv") for folder in (made, seed, tier)]
    assert not tables[0].equals(tables[1])
    assert set(tables[2]["kind"]) == {"microaneurysm", "haemorrhage", "exudate"}
    assert tables[2]["size_um"].between(11.9, 20.1).all()


def test_jpeg_quality_is_drawn_without_the_grade(tmp_path: Path) -> None:
    (tmp_path / "lesions").mkdir()
    seen = set()
    for seed in range(6):
        for level in (0, 2):
            synth.make(level, (256, 256), seed, "realistic", str(tmp_path), str(level))
        tables = []
        for level in (0, 2):
            with Image.open(tmp_path / f"{level}.jpeg") as file:
                tables.append(file.quantization)
        assert tables[0] == tables[1]
        seen.add(tuple(tables[0][0]))
    assert len(seen) > 2


def test_shares_of_eyepacs_and_half_a_size(tmp_path: Path, address: str) -> None:
    table = pd.read_csv(make(tmp_path, address, shares="eyepacs", images=12) / "labels.csv")
    assert table["level"].value_counts().to_dict() == {0: 9, 1: 1, 2: 2}
    with pytest.raises(ValueError, match="height_px and width_px go together"):
        make(tmp_path, address, width_px=None)
