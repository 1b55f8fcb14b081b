"""The trainer: split photographs by patient, load and augment them, fit a network, resume, predict.

`split` assigns whole patients to training, validation and test; `fit` trains any `torch.nn.Module` with logits
(N, classes) on `Examples` and keeps its best epoch; `predict` returns probabilities.
"""

from tilestream.training.augment import augment
from tilestream.training.config import TrainingConfig
from tilestream.training.history import EpochRecord, History
from tilestream.training.loader import Cached, Examples, Loader, epoch_order
from tilestream.training.splits import SPLITS, UNLABELLED, groups, split
from tilestream.training.trainer import fit, predict

__all__ = [
    "SPLITS",
    "UNLABELLED",
    "Cached",
    "EpochRecord",
    "Examples",
    "History",
    "Loader",
    "TrainingConfig",
    "augment",
    "epoch_order",
    "fit",
    "groups",
    "predict",
    "split",
]
