"""Charts: decoded again, they have the size, the colours and the places that were asked for."""

import threading

import cv2
import matplotlib
import numpy as np
import pytest

from tilestream import report
from tilestream.report import Curve, Rates

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)
A, B = Curve([0, 0.2, 1], [0, 0.9, 1], "0.850"), Curve([0, 0.5, 1], [0, 0.6, 1], "0.550 (0.400–0.700)")


def decode(data: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB).astype(int)


def found(chart: bytes, colour: tuple[int, int, int], tolerance: int = 0) -> np.ndarray:
    """(H, W): pixels of a chart in this colour."""
    return (abs(decode(chart) - colour) <= tolerance).all(axis=2)


def count(chart: bytes, colour: tuple[int, int, int]) -> int:
    return int(found(chart, colour).sum())


def shaded(chart: bytes) -> int:
    """Pixels of a blue band on white."""
    return int(found(chart, tuple(round(255 - 0.16 * (255 - c)) for c in BLUE), 2).sum())


def test_roc_draws_every_curve():
    chart = report.roc({"A": A, "B": B})
    assert chart.startswith(b"\x89PNG")
    assert decode(chart).shape == (889, 846, 3)
    assert min(count(chart, BLUE), count(chart, ORANGE)) > 500
    assert count(report.roc({"A": A}), ORANGE) == 0
    with pytest.raises(ValueError, match="nothing to draw"):
        report.roc({})


def test_lines_share_colours_and_scale_over_panels():
    low, high = Curve([0, 1], [0.1, 0.2]), Curve([0, 1], [0.8, 0.9])
    chart = report.lines({"one": {"A": low, "B": high}, "two": {"B": low}}, x_label="x", y_label="y")
    left, right = (half for half in np.split(found(chart, BLUE), 2, axis=1))
    assert left.sum() > 300
    assert right.sum() == 0
    left, right = (np.nonzero(half)[0] for half in np.split(found(chart, ORANGE), 2, axis=1))
    assert np.median(right) - np.median(left) > 200, "0.15 lies far below 0.85 in the other panel"
    named = report.lines({"": {"A": low}}, x_label="", y_label="", ticks=["fc", "stem"])
    assert count(named, BLUE) > 300
    for empty in ({}, {"one": {}}):
        with pytest.raises(ValueError, match="nothing to draw"):
            report.lines(empty, x_label="x", y_label="y")


@pytest.mark.parametrize("draw", [report.roc, lambda curves: report.precision_recall(curves, 0.4)])
def test_a_band_is_shaded(draw):
    def area(low, high):
        return shaded(draw({"A": Curve([0, 1], [0.5, 0.5], "", ([0, 0.5, 1], [low] * 3, [high] * 3))}))

    assert area(0.6, 0.9) == pytest.approx(3 * area(0.6, 0.7), rel=0.15)
    assert shaded(draw({"A": Curve([0, 1], [0.5, 0.5])})) == 0


def test_precision_recall_steps_to_the_next_corner():
    chart = found(report.precision_recall({"A": Curve([0, 0.5, 1], [1, 1, 0.6])}, 0.3), BLUE)
    high, low = (np.flatnonzero(chart[rows].sum(axis=0)) for rows in (np.s_[:40], np.s_[250:400]))
    width = decode(report.roc({"A": A})).shape[1]
    assert high.max() < 0.62 * width  # precision 1 up to recall 0.5, then 0.6
    assert low.max() > 0.9 * width


def test_reliability_shows_bins_with_their_intervals():
    bins = [
        {"start": 0.1, "stop": 0.2, "count": 5, "probability": 0.15, "share": 0.2, "low": 0.1, "high": 0.5},
        {"start": 0.8, "stop": 0.9, "count": 20, "probability": 0.85, "share": 0.9, "low": 0.7, "high": 0.95},
    ]
    chart = report.reliability(bins)
    narrow = report.reliability([{**part, "low": part["share"], "high": part["share"]} for part in bins])
    assert count(chart, BLUE) > count(narrow, BLUE) + 300
    with pytest.raises(ValueError, match="nothing to draw"):
        report.reliability([])


def test_rates_stand_beside_chance():
    def top(chance, **kwargs):
        each = Rates([1 / 8, 1, 8], [0.1, 0.2, 0.4], [0.0, None, 0.3], [0.2, None, 0.5], [chance] * 3, **kwargs)
        return report.rates({"centres": each}, x_label="false positives", y_label="lesions found")

    chart = top(0.05)
    assert count(chart, BLUE) > 500
    assert top(0.05) != top(0.1)
    assert count(top(0.05, curve=([0, 1, 8], [0, 0.2, 0.4])), BLUE) > 500
    assert top(0.05, curve=([0, 1, 8], [0, 0.2, 0.4])) != chart
    nothing = Rates([1], [None], [None], [None], [None])
    assert count(report.rates({"a": nothing}, x_label="x", y_label="y"), BLUE) < 1000 < count(chart, BLUE)
    with pytest.raises(ValueError, match="nothing to draw"):
        report.rates({}, x_label="x", y_label="y")


def test_training_curves_follow_the_records():
    history = [
        {"epoch": e, "train_loss": 1 / e, "validation_auc": None if e == 2 else 0.5, "rate": 9e9} for e in (1, 2, 3, 4)
    ]
    chart = report.training_curves({"first network": history, "crop network": [{"train_loss": 0.5}]})
    half = decode(chart).shape[1] * 2 // 5
    left, right = ((decode(chart)[:, part] == BLUE).all(axis=2).sum() for part in (np.s_[:half], np.s_[half:]))
    assert left > 500
    assert right > 200
    unbroken = report.training_curves({"first network": [record | {"validation_auc": 0.5} for record in history]})
    assert count(unbroken, BLUE) > count(report.training_curves({"first network": history}), BLUE)
    assert count(chart, ORANGE) > 100  # a single epoch still shows
    with pytest.raises(ValueError, match="hold no key that ends in 'loss' or 'auc'"):
        report.training_curves({"first network": [{"epoch": 1}]})


def test_confusion_shades_by_the_true_class():
    rows, columns = ["healthy", "unhealthy"], [f"grade {grade}" for grade in range(5)]
    table_4 = [[542, 201, 319, 7, 0], [17, 31, 64, 91, 77]]
    by_column = decode(report.confusion(table_4, rows, columns, truth="columns"))
    by_row = decode(report.confusion(table_4, rows, columns, truth="rows"))
    full = np.array(matplotlib.colormaps["Blues"](1 / 1.15)[:3]) * 255
    assert (abs(by_column - full) < 2).all(axis=2).sum() > 1000  # grade 4: 77 of 77
    assert (abs(by_row - full) < 2).all(axis=2).sum() == 0
    report.confusion([[0, 0], [1, 2]], rows, rows)  # a class without a sample divides by nothing
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 5\), the names \(2, 2\)"):
        report.confusion(table_4, rows, rows)


def test_probability_histogram_separates_the_labels():
    chart = report.probability_histogram([0.0, 0.1, 0.9, 1.0], [0, 0, 1, 1], threshold=0.5)
    image = decode(chart)
    (_, blue), (_, orange) = (np.nonzero((image == colour).all(axis=2)) for colour in (BLUE, ORANGE))
    assert blue.size
    assert orange.max() > image.shape[1] * 0.9
    assert count(report.probability_histogram([0.2], [0]), BLUE) > 100
    with pytest.raises(ValueError, match=r"probabilities span \[0.2, 1.2\]"):
        report.probability_histogram([0.2, 1.2], [0, 1])


def test_charts_are_equal_from_threads_and_leave_no_state():
    curves = {"A": A}
    expected, results = report.roc(curves), []
    threads = [threading.Thread(target=lambda: results.append(report.roc(curves))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 3
