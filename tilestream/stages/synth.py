"""Synthetic photographs: JPEG files, labels in EyePACS' form, lesions as label images and a table.

| file | what |
| --- | --- |
| `<n>_<eye>.jpeg` | a photograph, JPEG quality 85-93 |
| `labels.csv` | `image` (name without ending), `level` (grade 0-4), a row a photograph |
| `lesions/<n>_<eye>.png` | (H, W) uint8, each lesion's pixels in its kind's value, 0 elsewhere |
| `legend.csv` | `value`, `kind`: what the values of label images mean |
| `lesions.csv` | a row a lesion: `image`, `kind`, `y_px`, `x_px`, `radius_px`, `size_um`, `um_per_px` |

A lesion's centre and the radius of the circle around it are in px of the photograph, (0, 0) the middle of the first
pixel; `size_um` is the circle's diameter and `um_per_px` the photograph's scale, both on the retina.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd
from pydantic import Field

from tilestream.cluster import Job
from tilestream.synthesis import BALANCED_SHARES, EYEPACS_SHARES, LESION_KINDS, grades, photograph

from .base import Context, Stage, StageConfig, replacing
from .jobs import run_jobs

COLUMNS = ("image", "kind", "y_px", "x_px", "radius_px", "size_um", "um_per_px")


class SynthConfig(StageConfig):
    """Makes synthetic fundus photographs with known lesions."""

    images: int = Field(20, ge=1, description="number of photographs")
    seed: int = Field(0, ge=0, description="seed; the same seed makes the same files")
    tier: Literal["realistic", "stress"] = Field(
        "realistic", description="all lesions, the smallest 20-60 um; or none but of 12-20 um"
    )
    shares: Literal["balanced", "eyepacs"] = Field("balanced", description="shares of the grades")
    height_px: int | None = Field(
        None, ge=256, description="height of every photograph (default: frames of real cameras)"
    )
    width_px: int | None = Field(None, ge=256, description="width of every photograph")
    folder: str = Field("photographs", description="where they go, below the run's folder")


def run(config: SynthConfig, context: Context) -> None:
    """Writes the files above into FOLDER: the same bytes whatever the number of workers; ValueError on half a size."""
    if (config.height_px is None) != (config.width_px is None):
        raise ValueError("height_px and width_px go together; give both or neither")
    folder = folder_of(config, context)
    (folder / "lesions").mkdir(parents=True, exist_ok=True)
    shares = EYEPACS_SHARES if config.shares == "eyepacs" else BALANCED_SHARES
    levels = grades(config.images, config.seed, shares)
    names = [f"{index // 2 + 1}_{'left' if index % 2 == 0 else 'right'}" for index in range(config.images)]
    size = None if config.height_px is None else (config.height_px, config.width_px)
    tables: dict[str, list[dict[str, Any]]] = {}
    jobs = {
        name: (level, size, config.seed * 1_000_003 + index, config.tier, str(folder), name)
        for index, (name, level) in enumerate(zip(names, levels, strict=True))
    }
    run_jobs(context, "synth", names, lambda name: Job.call(name, make, *jobs[name]), tables.__setitem__)
    legend = {"value": range(1 + len(LESION_KINDS)), "kind": ["none", *LESION_KINDS]}
    lesions = [row for name in names for row in tables[name]]
    _table(folder / "legend.csv", pd.DataFrame(legend))
    _table(folder / "lesions.csv", pd.DataFrame(lesions, columns=list(COLUMNS)))
    _table(folder / "labels.csv", pd.DataFrame({"image": names, "level": levels}))


def make(
    level: int, size: tuple[int, int] | None, seed: int, tier: str, folder: str, name: str
) -> list[dict[str, Any]]:
    """Draws one photograph and writes its files; returns its lesions, a row each."""
    cv2.setNumThreads(1)
    made = photograph(level, size=size, seed=seed, tier=tier)
    quality = int(np.random.default_rng([seed, 17]).integers(85, 94))
    _write(Path(folder) / f"{name}.jpeg", made.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    _write(Path(folder) / "lesions" / f"{name}.png", made.lesion_map, [])
    return [
        {
            "image": name,
            "kind": s.kind,
            "y_px": round(s.y_px, 2),
            "x_px": round(s.x_px, 2),
            "radius_px": round(s.radius_px, 2),
            "size_um": round(2 * s.radius_px * made.um_per_px, 1),
            "um_per_px": round(made.um_per_px, 4),
        }
        for s in made.lesions
    ]


def folder_of(config: SynthConfig, context: Context) -> Path:
    return context.run / config.folder


def _table(path: Path, table: pd.DataFrame) -> None:
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def _write(path: Path, image: Any, options: list[int]) -> None:
    done, data = cv2.imencode(path.suffix, image, options)
    if not done:
        raise OSError(f"cannot encode {path.name}")
    with replacing(path) as temporary:
        temporary.write_bytes(data.tobytes())


def writes(config: SynthConfig, context: Context) -> Iterable[Path]:
    return [folder_of(config, context)]


STAGE = Stage("synth", SynthConfig, run, writes=writes, uses_store=False)
