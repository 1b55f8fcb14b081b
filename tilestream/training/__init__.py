"""The trainer: split photographs by patient, load and augment them, fit a network, resume, predict.

`split` assigns whole patients to training, validation and test; `fit` trains any `torch.nn.Module` with logits
(N, classes) on `Examples` and keeps its best epoch or its last, alone or as one of a `Group` of processes, on images of
one shape or, streamed, of any; `predict` returns probabilities.
"""

from tilestream.training.augment import Windows, augment, check_flips_only
from tilestream.training.config import TrainingConfig
from tilestream.training.group import ALONE, Group, PeerLost, joined
from tilestream.training.history import EpochRecord, History
from tilestream.training.loader import Cached, Examples, Loader, epoch_order
from tilestream.training.splits import SPLITS, UNLABELLED, groups, split
from tilestream.training.trainer import fit, predict

__all__ = [
    "ALONE",
    "SPLITS",
    "UNLABELLED",
    "Cached",
    "EpochRecord",
    "Examples",
    "Group",
    "History",
    "Loader",
    "PeerLost",
    "TrainingConfig",
    "Windows",
    "augment",
    "check_flips_only",
    "epoch_order",
    "fit",
    "groups",
    "joined",
    "predict",
    "split",
]
