"""Synthetic photographs: JPEG files, labels in EyePACS' form, lesions as label images and a table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd
from pydantic import Field

from tilestream.cluster import Job
from tilestream.synthesis import BALANCED_SHARES, EYEPACS_SHARES, grades, photograph

from .base import Context, Stage, StageConfig, replacing
from .jobs import run_jobs


class SynthConfig(StageConfig):
    """Makes synthetic fundus photographs with known lesions."""

    images: int = Field(20, ge=1, description="number of photographs")
    seed: int = Field(0, ge=0, description="seed; the same seed makes the same files")
    tier: Literal["realistic", "stress"] = Field(
        "realistic", description="size of the smallest lesions: 20-60 um or 12-20 um"
    )
    shares: Literal["balanced", "eyepacs"] = Field("balanced", description="shares of the grades")
    height_px: int | None = Field(
        None, ge=256, description="height of every photograph (default: frames of real cameras)"
    )
    width_px: int | None = Field(None, ge=256, description="width of every photograph")
    folder: str = Field("photographs", description="where they go, below the run's folder")


def run(config: SynthConfig, context: Context) -> None:
    """Writes FOLDER/<n>_<eye>.jpeg, labels.csv (image, level), lesions.csv and lesions/<n>_<eye>.png."""
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
    lesions = pd.DataFrame(
        [row for name in names for row in tables[name]], columns=["image", "kind", "y_px", "x_px", "radius_px"]
    )
    with replacing(folder / "lesions.csv") as temporary:
        lesions.to_csv(temporary, index=False)
    with replacing(folder / "labels.csv") as temporary:
        pd.DataFrame({"image": names, "level": levels}).to_csv(temporary, index=False)


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
        }
        for s in made.lesions
    ]


def folder_of(config: SynthConfig, context: Context) -> Path:
    return context.run / config.folder


def _write(path: Path, image: Any, options: list[int]) -> None:
    done, data = cv2.imencode(path.suffix, image, options)
    if not done:
        raise OSError(f"cannot encode {path.name}")
    with replacing(path) as temporary:
        temporary.write_bytes(data.tobytes())


def writes(config: SynthConfig, context: Context) -> Iterable[Path]:
    return [folder_of(config, context)]


STAGE = Stage("synth", SynthConfig, run, writes=writes, uses_store=False)
