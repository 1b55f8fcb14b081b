"""What a training run measured, epoch by epoch."""

from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import roc_auc_score


class EpochRecord(BaseModel):
    """One epoch, counted from 1. The losses are weighted alike; learning_rate is that of the last step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epoch: int
    train_loss: float
    validation_loss: float
    validation_auc: float | None
    learning_rate: float
    seconds: float


class History(BaseModel):
    """All epochs and the best of them; `model_dump_json` and `model_validate_json` go to JSON and back.

    The best epoch has the highest validation AUC (of more than two classes the mean of one against the rest), among
    equals the lowest validation loss. Where validation holds one class only there is no AUC (None), and `best_by` says
    "validation_loss".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    records: tuple[EpochRecord, ...] = ()
    best_epoch: int = 0
    best_by: Literal["validation_auc", "validation_loss"] = "validation_auc"
    stopped_early: bool = False

    def add(self, record: EpochRecord, patience: int) -> Self:
        """Return the history with one more epoch, stopped early when the best lies `patience` (> 0) epochs back."""
        records = (*self.records, record)
        best = max(records, key=_merit)
        return self.model_copy(
            update={
                "records": records,
                "best_epoch": best.epoch,
                "best_by": "validation_loss" if best.validation_auc is None else "validation_auc",
                "stopped_early": 0 < patience <= record.epoch - best.epoch,
            }
        )


def _merit(record: EpochRecord) -> tuple[float, float]:
    return (-1.0 if record.validation_auc is None else record.validation_auc, -record.validation_loss)


def area_under_curve(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Return the ROC AUC of class 1, or with more than two classes the mean of one class against the rest.

    Args:
        labels: (n,) integers.
        probabilities: (n, classes).

    Returns:
        A value in [0, 1]; classes that `labels` lacks are left out of the mean; None when it holds one class only.
    """
    present = np.unique(labels)
    if len(present) < 2:
        return None
    classes = [1] if probabilities.shape[1] == 2 else present
    return float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in classes]))
