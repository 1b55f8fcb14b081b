"""The settings of a saliency stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tilestream.methods import FieldOfView, Noise, Search
from tilestream.store import Store

from .base import StageConfig

BORDER_RULE = (
    "what `border` is a share of: frame, the photograph's height and width (Formula 1); circle, the diameter of its "
    "field of view and the height that cuts leave of it"
)


class SaliencyConfig(StageConfig):
    """Computes the input gradient of a network over photographs and finds the centres of crops inside the border."""

    model: str = Field(
        "first",
        description="model file, or the name of one of this run's models: first (trained on squares; paper A, section "
        "2) or crops (trained on crops; its Listing 2)",
    )
    net: str | None = Field(None, description="package.module:factory, for a file that does not name its network")
    window_px: int | None = Field(
        None,
        ge=1,
        description="differentiate the network after surgery, the sum of its logits over all windows of this side "
        "(Listing 1, lines 11-13); null: the network with adaptive pooling over the whole (Listing 2, step 2)",
    )
    resolution: Literal["full", "square"] = Field(
        "full", description="the photograph as it is, or squashed to the training square"
    )
    method: Literal["gradient", "guided", "deconv", "smoothgrad"] = Field(
        "gradient",
        description="what is propagated back: the gradient; guided back-propagation or deconvolution, which let "
        "positive gradients alone through each ReLU and take a whole photograph a task; smoothgrad, the mean gradient "
        "over noisy copies",
    )
    reduce: Literal["mean", "absmean", "absmax"] = Field("mean", description="how the three channels become one")
    target: int = Field(1, ge=0, description="the logit that is differentiated")
    samples: int = Field(25, ge=1, description="noisy copies of each photograph, for method=smoothgrad")
    noise: float = Field(
        0.15, ge=0, le=10, description="standard deviation of smoothgrad's noise, as a share of the input's range"
    )
    seed: int = Field(0, ge=0, lt=2**64, description="seed of smoothgrad's noise")
    border_rule: Literal["frame", "circle"] = Field("frame", description=BORDER_RULE)
    border: float = Field(0.1, ge=0, lt=0.5, description="kappa, the share left out at each side")
    centre: Literal["argmax", "density"] = Field(
        "argmax", description="a crop's centre: the highest point, or where the strongest points lie densest"
    )
    density_algorithm: Literal["mean_shift", "dbscan"] = Field(
        "mean_shift", description="how centre=density clusters the strongest points; dbscan weighs them by saliency"
    )
    bandwidth_px: float = Field(
        128, gt=0, description="radius around a point that counts as near it, for centre=density; px of the photograph"
    )
    strongest: int = Field(1000, ge=1, le=4000, description="how many of a map's points centre=density clusters")
    candidates: int = Field(
        1, ge=1, le=1000, description="centres a photograph: the first, and the highest local maxima away from it"
    )
    candidate_distance_px: int = Field(
        256, ge=1, description="least distance between a photograph's candidates: half a crop; px of the photograph"
    )
    splits: list[str] | None = Field(None, description="only photographs of these splits (default: all)")
    limit: int | None = Field(None, ge=1, description="only the first so many photographs")
    tile_px: int | None = Field(None, description="side of the tiles in px instead of the budget's choice")
    granularity: Literal["auto", "image", "band", "tile"] = Field(
        "auto",
        description="what one task computes: a whole image, a row of tiles, a tile, or what should be fastest",
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="bf16 is faster where workers have it; its error is measured and said"
    )
    write: bool = Field(False, description="keep the maps at full resolution, as saliency.zarr/ID, a chunk a tile")

    @property
    def search(self) -> Search:
        return Search(
            self.centre, self.candidates, self.candidate_distance_px, self.density_algorithm, self.bandwidth_px,
            self.strongest,
        )  # fmt: skip

    def noise_of(self, input_range: float) -> Noise | None:
        """SmoothGrad's noise for inputs of this range; None for another method."""
        return Noise(self.samples, self.noise * input_range, self.seed) if self.method == "smoothgrad" else None


def field_of_view(store: Store, id: str) -> FieldOfView | None:
    """Where a photograph shows the eye, from its commit; None where ingest found no circle."""
    facts = store.commit(id).get("field_of_view")
    return None if facts is None else FieldOfView(**facts)
