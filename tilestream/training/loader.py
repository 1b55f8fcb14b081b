"""Batches of examples, read ahead by threads, in an order that depends on the seed and the epoch alone."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tilestream.training.augment import Flipped, augment
from tilestream.training.config import TrainingConfig
from tilestream.training.group import ALONE, Group


class Examples(Protocol):
    """Normalised images, or bags of descriptors, with labels; reading one may be slow, and several threads do."""

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64 class numbers from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """(C, H, W) float32, the same shape for every index; for streaming, any shape, read in windows; or a bag,
        (n, D) float32, n descriptors from 0 up."""


class Cached:
    """Examples that keep what was read, as long as it fits into `limit_bytes`."""

    def __init__(self, examples: Examples, limit_bytes: int) -> None:
        self.labels = examples.labels
        self._examples, self._free_bytes = examples, limit_bytes
        self._kept: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int, /) -> np.ndarray:
        image = self._kept.get(index)
        if image is None:
            image = self._examples[index]
            with self._lock:
                if index not in self._kept and image.nbytes <= self._free_bytes:
                    self._kept[index] = image
                    self._free_bytes -= image.nbytes
        return image


class Loader:
    """One epoch of augmented training batches: yields images (N, C, H, W) float32 and labels (N,) int64 on `device`.

    Batches are of equal size up to one, at most `config.batch_size`: batch normalisation needs more than one value a
    channel, so no batch of 1 is left over (with a batch size of 2 and an odd number, one batch holds 3). Neither
    order nor augmentation depends on the number of threads or on their timing. Two batches are read ahead.

    Of a group's batches each process gets its part: the order and the augmentation are those of one process.
    """

    def __init__(
        self, examples: Examples, config: TrainingConfig, epoch: int, device: torch.device, group: Group = ALONE
    ) -> None:
        self._examples, self._config, self._epoch, self._device = examples, config, epoch, device
        self._group = group
        self.order = epoch_order(examples.labels, config, epoch)
        self._batches = np.array_split(np.arange(len(self.order)), batch_count(len(self.order), config.batch_size))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mine = [self._group.part(places) for places in self._batches]
        batches = [self.order[places] for places in mine]
        read = read_batches(self._examples, batches, self._config.loader_threads, self._device)
        for places, (images, labels) in zip(mine, read, strict=True):
            yield (augment(images, self._config, self._epoch, places) if images.ndim == 4 else images), labels

    def whole(self) -> Iterator[tuple[list[Flipped], Tensor]]:
        """The same with images that are read in windows, flipped at most."""
        for places in map(self._group.part, self._batches):
            order = self.order[places]
            pairs = zip(order.tolist(), places.tolist(), strict=True)
            images = [Flipped(self._examples[i], self._config, self._epoch, place) for i, place in pairs]
            yield images, self._labels(order)

    def labels(self) -> Iterator[Tensor]:
        """The labels of whole batches, those of all processes."""
        return (self._labels(self.order[places]) for places in self._batches)

    def _labels(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self._examples.labels, dtype=np.int64)[indices]).to(self._device)


def batch_count(examples: int, batch_size: int) -> int:
    """Return the number of batches that leaves none with a single example, unless `batch_size` is 1."""
    count = -(-examples // batch_size)
    return count if batch_size == 1 else max(1, min(count, examples // 2))


def epoch_order(labels: np.ndarray, config: TrainingConfig, epoch: int) -> np.ndarray:
    """Return the indices (n,) of one epoch: a permutation, or equally many a class for `balance="sampling"`.

    Sampling repeats a rare class whole before it repeats any example once more, and takes a different part of a
    frequent class each epoch.
    """
    rng = np.random.default_rng((config.seed, epoch, 0))
    if config.balance != "sampling":
        return rng.permutation(len(labels))
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    shares = [len(part) for part in np.array_split(labels, len(classes))]
    drawn = [
        np.concatenate([rng.permutation(members) for _ in range(-(-share // len(members)))])[:share]
        for members, share in zip(classes, shares, strict=True)
    ]
    return rng.permutation(np.concatenate(drawn))


def read_batches(
    examples: Examples, batches: Sequence[np.ndarray], threads: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (N, C, H, W) float32, channels last in memory, and labels (N,) for each batch of indices.

    Bags come as (N, n, D), n that of the largest (1 at least); rows of NaN fill up the others.

    Raises:
        ValueError: an example is not float32 (C, H, W) or (n, D), or not of its batch's shape.
    """
    labels = torch.from_numpy(np.asarray(examples.labels, dtype=np.int64))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    try:
        reading = deque([pool.submit(examples.__getitem__, int(i)) for i in batch] for batch in batches[:2])
        for number, batch in enumerate(batches):
            images = [future.result() for future in reading.popleft()]
            if number + 2 < len(batches):
                reading.append([pool.submit(examples.__getitem__, int(i)) for i in batches[number + 2]])
            bags = images[0].ndim == 2
            for index, image in zip(batch, images, strict=True):
                same = image.shape[bags:] == images[0].shape[bags:]
                if image.dtype != np.float32 or image.ndim not in (2, 3) or not same:
                    raise ValueError(
                        f"example {index} is {image.dtype} {image.shape}, must be float32 (C, H, W), or a bag (n, D), "
                        f"here {images[0].shape}; bring all examples to one shape"
                    )
            stacked = _padded(images) if bags else torch.from_numpy(np.stack(images))
            if device.type == "cuda":
                stacked = stacked.pin_memory()
            layout = torch.preserve_format if bags else torch.channels_last
            stacked = stacked.to(device, non_blocking=True, memory_format=layout)
            yield stacked, labels[torch.from_numpy(batch)].to(device)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _padded(bags: Sequence[np.ndarray]) -> Tensor:
    stacked = torch.full((len(bags), max(1, *map(len, bags)), bags[0].shape[1]), torch.nan)
    for rows, bag in zip(stacked, bags, strict=True):
        rows[: len(bag)] = torch.from_numpy(bag)
    return stacked
