"""A toy problem: a bright or a dark blob on noise."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn


@dataclass
class Arrays:
    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index]


def make_blobs(count, seed, classes=2, size_px=32):
    """Noise with a blob: dark red (0), bright red (1), bright green (2)."""
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 0.3, (count, 3, size_px, size_px)).astype(np.float32)
    labels = np.arange(count) % classes
    rows, columns = np.mgrid[:size_px, :size_px]
    for image, label in zip(images, labels, strict=True):
        y, x = rng.uniform(6, size_px - 6, 2)
        blob = 0.8 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 18)
        image[max(label - 1, 0)] += blob if label else -blob
    return Arrays(images, labels.astype(np.int64))


def make_net(classes=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16, classes),
        )


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny nets on a busy machine: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def blobs():
    return make_blobs


@pytest.fixture
def small_net():
    return make_net
