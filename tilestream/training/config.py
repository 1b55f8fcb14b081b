"""The settings of a training run."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TrainingConfig(BaseModel):
    """How `fit` trains a network; every field's description is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(30, ge=1, description="passes over the training set; may be raised when a run is resumed")
    batch_size: int = Field(16, ge=1, description="examples a step, at most")
    learning_rate: float = Field(1e-3, gt=0, description="highest learning rate, after the warm-up")
    weight_decay: float = Field(1e-4, ge=0, description="decay of weights (not of biases and normalisation layers)")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum 0.9")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate after the warm-up")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs over which the learning rate rises linearly from 0")
    balance: Literal["weights", "sampling", "none"] = Field(
        "weights",
        description="rare classes: weighted in the loss, drawn as often as others (an epoch stays as long), or left",
    )
    flips: bool = Field(True, description="flip at random up-down and left-right")
    rotation_deg: float = Field(0.0, ge=0, le=180, description="rotate by a random angle of at most this, in degrees")
    colour: float = Field(0.0, ge=0, lt=1, description="strength of random brightness, contrast and saturation, 0..1")
    patience: int = Field(0, ge=0, description="stop after so many epochs without a better validation AUC; 0 = never")
    keep: Literal["best", "last"] = Field(
        "best",
        description="the epoch whose weights are kept: that of the best validation AUC; or the last, where labels are "
        "too noisy for the AUC to choose by (crops of which few hold a lesion)",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seeds order, augmentation and dropout (not the initial weights)")
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="bf16 autocasts; auto = bf16 on a GPU that has it, otherwise float32"
    )
    loader_threads: int = Field(2, ge=1, description="threads that read examples; no effect on results")
    cache_bytes: int = Field(0, ge=0, description="memory for decoded examples, in bytes; no effect on results")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.keep == "last" and self.patience:
            raise ValueError(
                f"keep=last and patience={self.patience}, which trusts the AUC, exclude each other; give patience=0"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}")
        return self
