"""Order, batches, cache and augmentation."""

import threading
import time

import numpy as np
import pytest
import torch

from tilestream.training import Cached, Loader, TrainingConfig, augment, epoch_order
from tilestream.training.loader import batch_count

CPU = torch.device("cpu")


def settings(**changes):
    return TrainingConfig(**{"batch_size": 4, "rotation_deg": 30, "colour": 0.2, **changes})


class Slow:
    """Examples whose reading takes a different time on every call."""

    def __init__(self, examples):
        self.examples, self.labels = examples, examples.labels
        self.reads, self.threads = 0, set()
        self._rng, self._lock = np.random.default_rng(), threading.Lock()

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        with self._lock:
            self.reads += 1
            self.threads.add(threading.get_ident())
            pause_s = self._rng.uniform(0, 0.004)
        time.sleep(pause_s)
        return self.examples[index]


def test_batches_do_not_depend_on_threads_or_timing(blobs):
    examples = blobs(22, seed=1)
    few, many = Slow(examples), Slow(examples)
    one = list(Loader(few, settings(loader_threads=1), 3, CPU))
    four = list(Loader(many, settings(loader_threads=4), 3, CPU))
    assert len(few.threads) == 1
    assert len(many.threads) == 4
    for (images, labels), (other_images, other_labels) in zip(one, four, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_images_keep_their_labels(blobs):
    examples = blobs(22, seed=1)
    loader = Loader(examples, settings(flips=False, rotation_deg=0, colour=0), 1, CPU)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert sorted(loader.order) == list(range(22))
    assert np.array_equal(images.numpy(), examples.images[loader.order])
    assert np.array_equal(labels.numpy(), examples.labels[loader.order])


def test_order_changes_with_epoch_and_seed_only():
    labels = np.zeros(100, np.int64)
    first = epoch_order(labels, settings(), 1)
    assert np.array_equal(first, epoch_order(labels, settings(loader_threads=7, batch_size=9), 1))
    assert not np.array_equal(first, epoch_order(labels, settings(), 2))
    assert not np.array_equal(first, epoch_order(labels, settings(seed=1), 1))


def test_sampling_draws_classes_equally_often():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    order = epoch_order(labels, settings(balance="sampling"), 1)
    assert np.bincount(labels[order]).tolist() == [34, 33, 33]
    times = np.bincount(order, minlength=100)
    assert times[:90].max() == 1, "a frequent class is not repeated"
    assert set(times[90:99]) == {3, 4}, "a rare class is repeated evenly"
    later = epoch_order(labels, settings(balance="sampling"), 2)
    assert set(order[order < 90]) != set(later[later < 90])


@pytest.mark.parametrize("batch_size", [2, 3, 4, 32])
def test_no_batch_holds_a_single_example(batch_size):
    for count in range(2, 80):
        sizes = [len(part) for part in np.array_split(np.arange(count), batch_count(count, batch_size))]
        assert min(sizes) >= 2
        assert max(sizes) <= max(batch_size, 3)
        assert max(sizes) - min(sizes) <= 1


def test_batch_size_one_is_kept():
    assert batch_count(7, 1) == 7


def test_cache_reads_once_and_keeps_its_limit(blobs):
    slow = Slow(blobs(10, seed=1))
    image_bytes = slow.examples[0].nbytes
    cached = Cached(slow, limit_bytes=6 * image_bytes + 1)
    for _ in range(3):
        for index in range(10):
            assert np.array_equal(cached[index], slow.examples[index])
    assert slow.reads == 6 + 3 * 4


def test_wrong_examples_are_refused_by_index(blobs):
    examples = blobs(6, seed=1)
    examples.images = examples.images.astype(np.float64)
    with pytest.raises(ValueError, match=r"example \d is float64 \(3, 32, 32\), must be float32"):
        next(iter(Loader(examples, settings(), 1, CPU)))


def test_an_error_while_reading_comes_through(blobs):
    class Broken(Slow):
        def __getitem__(self, index):
            raise OSError("chunk is damaged")

    with pytest.raises(OSError, match="chunk is damaged"):
        list(Loader(Broken(blobs(6, seed=1)), settings(), 1, CPU))


def test_augmentation_depends_on_seed_epoch_and_position_only():
    images = torch.rand(5, 3, 20, 30)
    places = np.array([7, 3, 9, 0, 4])
    result = augment(images, settings(), 2, places)
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    alone = torch.cat([augment(images[i : i + 1], settings(), 2, places[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, result, rtol=1e-5, atol=1e-6)
    assert torch.equal(result, augment(images, settings(), 2, places))
    for other in (settings(seed=1), settings(rotation_deg=0), settings(colour=0), settings(flips=False)):
        assert not torch.allclose(result, augment(images, other, 2, places), atol=1e-3)
    assert not torch.allclose(result, augment(images, settings(), 3, places), atol=1e-3)


def test_no_augmentation_changes_nothing():
    images = torch.rand(3, 3, 8, 8)
    off = settings(flips=False, rotation_deg=0, colour=0)
    assert torch.equal(augment(images, off, 1, np.arange(3)), images)


def test_flips_are_exact_and_all_four_occur():
    image = torch.rand(1, 3, 6, 7)
    result = augment(image.expand(64, -1, -1, -1), settings(rotation_deg=0, colour=0), 1, np.arange(64))
    wanted = [image[0], image[0].flip(1), image[0].flip(2), image[0].flip(1, 2)]
    counts = [sum(torch.equal(got, flipped) for got in result) for flipped in wanted]
    assert sum(counts) == 64
    assert min(counts) > 6


def test_rotation_keeps_distances_in_pixels_and_fills_with_the_corners():
    image = torch.full((1, 3, 40, 80), 0.25)
    image[:, :, 20, 50] = 1.25  # 10 px right of the centre
    many = image.expand(32, -1, -1, -1)
    result = augment(many, settings(rotation_deg=180, flips=False, colour=0), 1, np.arange(32))
    light = (result[:, 0] - 0.25).clamp(min=0)
    total = light.sum((1, 2))
    y = (light.sum(2) * (torch.arange(40) + 0.5)).sum(1) / total - 20
    x = (light.sum(1) * (torch.arange(80) + 0.5)).sum(1) / total - 40
    assert ((y**2 + x**2).sqrt() - (10.5**2 + 0.5**2) ** 0.5).abs().max() < 0.3
    assert y.max() > 5
    assert x.min() < -5
    assert result.min() > 0.25 - 1e-5, "uncovered corners take the background"


def test_colour_keeps_the_picture():
    images = torch.rand(16, 3, 12, 12)
    result = augment(images, settings(flips=False, rotation_deg=0, colour=0.1), 1, np.arange(16))
    assert (result - images).abs().max() > 0.01
    for before, after in zip(images, result, strict=True):
        assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.98
