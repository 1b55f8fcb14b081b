"""Whether maps say what a network does, over a store."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from tilestream.nets import ResidualNet, save_model
from tilestream.stages import Context
from tilestream.stages.faithfulness import STAGE, FaithfulnessConfig, _means
from tilestream.stages.models import locate


@pytest.fixture
def context(made, tmp_path):
    with Context(tmp_path / "run", made.store.path, models=made.models) as context:
        context.name = "faithfulness"
        context.run.mkdir()
        yield context


def test_maps_lose_what_the_network_forgets(context):
    STAGE.run(FaithfulnessConfig(methods=["gradient"], limit=2), context)
    found = json.loads((context.run / "faithfulness.json").read_text())
    assert (found["photographs"], found["unhealthy"]) == (2, 2), "in healthy ones there is nothing to delete"
    for name, which in product(("gradient", "noise"), ("deletion", "insertion")):
        curve = found[name][f"{which}_curve"]
        assert len(curve) == len(found["shares"]) == 33
        assert np.trapezoid(curve, found["shares"]) == pytest.approx(found[name][which], abs=0.02)
    ends = [found[name]["deletion_curve"][i] for name in ("gradient", "noise") for i in (0, -1)]
    assert ends[:2] == ends[2:], "the photograph and the blurred one"
    assert found["noise"]["insertion_curve"][-1] == pytest.approx(ends[0])
    areas = [found[name][which] for name in ("gradient", "noise") for which in ("deletion", "insertion")]
    assert all(0 < area < 1 for area in areas)
    blocks = [each["down_to"] for each in found["gradient"]["correlations"]]
    assert (blocks[0], blocks[-1]) == ("fc", "stem")
    assert found["gradient"]["correlations"][-1]["spearman"] < 0.9


def test_a_network_without_a_square_is_refused(context, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "bare.safetensors"
    save_model(path, ResidualNet(widths=[4, 4]), architecture="ResidualNet", parameters={"widths": [4, 4]})
    with pytest.raises(ValueError, match="carries no square to squash to"):
        STAGE.run(FaithfulnessConfig(model=str(path)), context)
    assert locate(context, str(path)) == path
    assert not (context.run / "faithfulness.json").exists()


def test_means_of_what_is_known():
    assert _means([{"a": 1.0, "b": {"c": None}}, {"a": 2.0, "b": {"c": 3.0}}]) == {"a": 1.5, "b": {"c": 3.0}}
    assert _means([{"a": None}]) == {"a": None}
    assert _means([{"a": [1.0, 2.0]}, {"a": [3.0, 6.0]}]) == {"a": [2.0, 4.0]}
