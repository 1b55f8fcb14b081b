"""What must not tell the grade: frame, camera, JPEG quality, and colours of the whole photograph."""

import cv2
import numpy as np
import pytest
from scipy.stats import chi2_contingency
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tilestream.synthesis import BALANCED_SHARES, grades, photograph
from tilestream.synthesis.camera import draw_camera

CLASSIFIERS = {
    "linear": make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000)),
    "boosted": HistGradientBoostingClassifier(max_iter=40, max_leaf_nodes=6, min_samples_leaf=8),
}


def statistics(seed: int, grade: int, tier: str) -> list[float]:
    """Frame, bytes as a JPEG, mean, standard deviation and percentiles of each channel inside the field of view."""
    camera = draw_camera(np.random.default_rng([seed, 0]), None)
    scale = 256 / min(camera.height, camera.width)
    image = photograph(grade, size=(256, round(camera.width * scale)), seed=seed, tier=tier).image
    inside = image[image[..., 0] > 20].astype(np.float32)
    percentiles = np.percentile(inside, [1, 5, 25, 50, 75, 95, 99], axis=0).ravel()
    size = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 89])[1].size
    return [camera.height, camera.width, size, *inside.mean(0), *inside.std(0), *percentiles]


@pytest.fixture(scope="module", params=["realistic", "stress"])
def table(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Statistics (n, 30), unhealthy (n,) bool, group (n,): two photographs an eye, grade 0 or 1 and 2, 3 or 4."""
    drawn = [(seed, grade) for seed in range(52) for grade in (seed % 2, 2 + seed % 3)]
    values = np.array([statistics(seed, grade, request.param) for seed, grade in drawn])
    return values, np.array([grade > 1 for _, grade in drawn]), np.array([seed for seed, _ in drawn])


def auc(values: np.ndarray, ill: np.ndarray, groups: np.ndarray, classifier: str) -> tuple[float, float]:
    """Cross-validated AUC, no eye on both sides, and half the width of chance's 95 % interval (Mann-Whitney)."""
    chances = cross_val_predict(
        CLASSIFIERS[classifier], values, ill, groups=groups, cv=GroupKFold(5), method="predict_proba"
    )[:, 1]
    positive, negative = int(ill.sum()), int((~ill).sum())
    return roc_auc_score(ill, chances), 1.96 * np.sqrt((len(ill) + 1) / (12 * positive * negative))


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_statistics_of_colour_and_size_do_not_tell_the_grade(table, classifier: str) -> None:
    value, half = auc(*table, classifier)
    assert value < 0.5 + half


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_a_leak_would_be_found(table, classifier: str) -> None:
    values, ill, groups = table
    leaking = values + np.outer(ill, np.where(np.arange(values.shape[1]) == 1, 1500, 0))  # wider frames
    value, half = auc(leaking, ill, groups, classifier)
    assert value > 0.5 + 2 * half


def test_frame_and_quality_are_independent_of_the_grade() -> None:
    levels = grades(1000, 7, BALANCED_SHARES)
    seeds = [7 * 1_000_003 + index for index in range(1000)]
    widths = [draw_camera(np.random.default_rng([seed, 0]), None).width for seed in seeds]
    table = np.zeros((5, 7))
    np.add.at(table, (levels, np.unique(widths, return_inverse=True)[1]), 1)
    assert chi2_contingency(table).pvalue > 0.01


@pytest.mark.parametrize("grade", range(1, 5))
def test_same_camera_for_every_grade(grade: int) -> None:
    small = next(s for s in range(200) if draw_camera(np.random.default_rng([s, 0]), None).width == 1440)
    ill, healthy = (photograph(g, seed=small) for g in (grade, 0))
    assert ill.image.shape == healthy.image.shape == (960, 1440, 3)
    assert ill.um_per_px == healthy.um_per_px
