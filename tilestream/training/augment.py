"""Random flips, rotation and colour, batch by batch, on the device that trains."""

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tilestream.training.config import TrainingConfig


def augment(images: Tensor, config: TrainingConfig, epoch: int, positions: np.ndarray) -> Tensor:
    """Return images changed at random, each by numbers that depend on its place in the epoch alone.

    Flips are exact. Rotation about the centre is bilinear; what it uncovers takes the mean of the image's four
    corners, the background of a fundus photograph. Colour is relative to each image, so any normalisation will do:
    brightness adds up to `colour` standard deviations, contrast scales about the image's mean and saturation about
    each pixel's channel mean by a factor in 1 -+ `colour`; nothing is clipped.

    Args:
        images: (N, C, H, W) float32.
        config: its fields flips, rotation_deg, colour and seed.
        epoch: the epoch's number.
        positions: (N,) places of the images in the epoch's order.

    Returns:
        (N, C, H, W) float32 on the same device.
    """
    drawn = np.stack([_draws(config, epoch, int(position)) for position in positions])
    draws = torch.tensor(drawn, dtype=torch.float32)
    flip_y, flip_x, *others = draws.to(images.device)[:, :, None, None, None].unbind(1)
    angle, brightness, contrast, saturation = (2 * other - 1 for other in others)
    if config.flips:
        images = torch.where(flip_y < 0.5, images.flip(2), images)
        images = torch.where(flip_x < 0.5, images.flip(3), images)
    if config.rotation_deg:
        images = _rotate(images, angle.flatten() * math.radians(config.rotation_deg))
    if config.colour:
        mean, spread = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True)
        images = mean + (images - mean) * (1 + config.colour * contrast) + config.colour * brightness * spread
        grey = images.mean(1, keepdim=True)
        images = grey + (images - grey) * (1 + config.colour * saturation)
    return images


def _draws(config: TrainingConfig, epoch: int, position: int) -> np.ndarray:
    return np.random.default_rng((config.seed, epoch, 1, position)).random(6)


class Windows(Protocol):
    """An image that is read in windows, (C, H, W)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Flipped:
    """An image that is read in windows, (C, H, W), flipped as `augment` would flip it."""

    def __init__(self, image: Windows, config: TrainingConfig, epoch: int, position: int) -> None:
        self.image, self.shape = image, tuple(image.shape)
        draws = torch.tensor(_draws(config, epoch, position)[:2], dtype=torch.float32)  # compared as `augment` does
        self.flips = (draws < 0.5).tolist() if config.flips else [False, False]

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        """The window [:, y0:y1, x0:x1]."""
        spans = [axis.indices(length)[:2] for axis, length in zip(index[1:], self.shape[1:], strict=True)]
        places = [
            slice(length - stop, length - start) if flip else slice(start, stop)
            for flip, (start, stop), length in zip(self.flips, spans, self.shape[1:], strict=True)
        ]
        step_y, step_x = (-1 if flip else 1 for flip in self.flips)
        block = np.asarray(self.image[(index[0], *places)])[:, ::step_y, ::step_x]
        return np.ascontiguousarray(block)


def check_flips_only(config: TrainingConfig) -> None:
    """ValueError for augmentation that needs an image as a whole."""
    for name in ("rotation_deg", "colour"):
        if value := getattr(config, name):
            raise ValueError(f"{name}={value} cannot be applied to photographs that are read in windows; use 0")


def check_none(config: TrainingConfig) -> None:
    """ValueError for augmentation, which is for images alone."""
    for name in ("flips", "rotation_deg", "colour"):
        if value := getattr(config, name):
            raise ValueError(f"{name}={value} cannot be applied to bags of descriptors; use {type(value)()}")


def _rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Rotate (N, C, H, W) by angles (N,) in radians, in pixels, whatever the aspect ratio."""
    height, width = images.shape[2:]
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], 1).view(-1, 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    fill = images[:, :, :: height - 1 or 1, :: width - 1 or 1].mean((2, 3), keepdim=True)
    return functional.grid_sample(images - fill, grid, align_corners=False) + fill
