"""Figures: decoded again, they have the size, the colours and the places that were asked for."""

import threading

import cv2
import matplotlib
import numpy as np
import pytest

from tilestream import report
from tilestream.report.figures import BORDER_RGB, CASING_RGB, CROP_RGB

GREY = np.full((200, 300, 3), 120, np.uint8)
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def decode(data: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB).astype(int)


def count(chart: bytes, colour: tuple[int, int, int]) -> int:
    """Pixels of a chart in exactly this colour."""
    return int((decode(chart) == colour).all(axis=2).sum())


def test_photograph_keeps_size_and_channel_order():
    picture = np.zeros((40, 64, 3), np.uint8)
    picture[:, :32, 0] = 250
    decoded = decode(report.photograph(picture))
    assert decoded.shape == (40, 64, 3)
    np.testing.assert_allclose(decoded, picture, atol=12)
    with pytest.raises(ValueError, match=r"picture is float64 of shape \(40, 64, 3\); it must be uint8"):
        report.photograph(picture / 255)
    with pytest.raises(ValueError, match=r"picture is uint8 of shape \(40, 64\)"):
        report.photograph(picture[..., 0])


def test_overlay_shows_the_positive_part_only():
    saliency = np.zeros((200, 300))
    saliency[50:80, 60:90] = 3.0
    saliency[120:150, 200:230] = -1000.0
    decoded = decode(report.overlay(GREY, saliency))
    plain = decode(report.overlay(GREY, np.zeros((200, 300))))
    assert decoded.shape == (200, 300, 3)
    top = np.array(matplotlib.colormaps["viridis"](1.0)[:3]) * 255
    np.testing.assert_allclose(decoded[65, 75], 0.9 * top + 0.1 * 0.65 * 120, atol=6)
    np.testing.assert_allclose(decoded[135, 215], plain[135, 215], atol=3)
    np.testing.assert_allclose(plain, 0.65 * 120, atol=3)


def test_overlay_is_robust_to_one_hot_pixel():
    saliency = np.full((200, 300), -1.0)
    saliency[50:80] = 1.0
    hot = saliency.copy()
    hot[60, 60] = 1e9
    far = np.s_[65:80, 100:300]
    np.testing.assert_allclose(
        decode(report.overlay(GREY, hot))[far], decode(report.overlay(GREY, saliency))[far], atol=3
    )


def test_overlay_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"saliency has shape \(300, 200\), the picture \(200, 300\)"):
        report.overlay(GREY, np.zeros((300, 200)))
    with pytest.raises(ValueError, match="saliency holds 1 values that are not finite"):
        report.overlay(GREY, np.where(np.indices((200, 300)).sum(axis=0) == 0, np.nan, 1.0))


def test_frame_is_drawn_where_asked():
    drawn = report.draw_frame(GREY, (40, 60, 100, 160), centre=(70, 110))
    on_frame = (drawn == CROP_RGB).all(axis=2)
    for y, x in ((40, 60), (40, 159), (99, 60), (99, 159), (40, 110), (70, 60), (70, 110)):
        assert on_frame[y, x]
    ys, xs = np.nonzero(on_frame)
    assert (ys.min(), xs.min(), ys.max() + 1, xs.max() + 1) == (40, 60, 100, 160)  # half-open
    changed = (drawn != GREY).any(axis=2)
    assert (drawn[changed & ~on_frame] == CASING_RGB).all()
    assert not changed[:37].any()
    assert not changed[44:62, 64:156].any()  # inside, away from the cross, the photograph is untouched
    assert (GREY == 120).all()


def test_frame_scales_from_the_photograph():
    small = report.draw_frame(GREY, (40, 60, 100, 160), border=(20, 30, 180, 270), centre=(70, 110))
    large = report.draw_frame(
        GREY, (400, 600, 1000, 1600), border=(200, 300, 1800, 2700), centre=(704.5, 1104.5), photograph_px=(2000, 3000)
    )
    np.testing.assert_array_equal(large, small)


def test_centre_is_the_middle_of_its_pixel():
    drawn = report.draw_frame(GREY, (0, 0, 20, 30), centre=(7, 11), photograph_px=(20, 30))  # a pixel shows as 10 x 10
    ys, xs = np.nonzero((drawn[10:190, 10:290] == CROP_RGB).all(axis=2))
    np.testing.assert_allclose((ys.mean() + 10, xs.mean() + 10), (74.5, 114.5), atol=0.6)


def test_border_rule_dims_what_it_excludes():
    drawn = report.draw_frame(GREY, (90, 140, 110, 160), border=(20, 30, 180, 270))
    assert (drawn[20, 40:260] == BORDER_RGB).all()
    assert (drawn[179, 40:260] == BORDER_RGB).all()
    assert (drawn[:20] == 60).all()
    assert (drawn[180:] == 60).all()
    assert (drawn[30:80, 40:260] == 120).all()
    circle = report.draw_frame(GREY, (90, 140, 110, 160), border=(100, 150, 60))
    assert (circle[:38] == 60).all()
    assert (circle[100, 90] > 200).all()
    assert (circle[50, 150] == 120).all()


def test_frame_as_jpeg_keeps_the_thin_line():
    decoded = decode(report.frame(GREY, (40, 60, 100, 160)))
    np.testing.assert_allclose(decoded[40, 80:140], np.broadcast_to(CROP_RGB, (60, 3)), atol=40)


def test_roc_draws_every_curve():
    curves = {"A": ([0, 0.2, 1], [0, 0.9, 1], "0.850"), "B": ([0, 0.5, 1], [0, 0.6, 1], "0.550 (0.400–0.700)")}
    chart = report.roc(curves)
    assert chart.startswith(b"\x89PNG")
    assert decode(chart).shape == (792, 846, 3)
    assert min(count(chart, BLUE), count(chart, ORANGE)) > 500
    assert count(report.roc({"A": curves["A"]}), ORANGE) == 0
    with pytest.raises(ValueError, match="is empty"):
        report.roc({})


def test_training_curves_follow_the_records():
    history = [
        {"epoch": e, "train_loss": 1 / e, "validation_auc": None if e == 2 else 0.5, "rate": 9e9} for e in (1, 2, 3, 4)
    ]
    chart = report.training_curves({"first network": history, "crop network": [{"train_loss": 0.5}]})
    half = decode(chart).shape[1] // 2
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
    curves = {"A": ([0, 0.2, 1], [0, 0.9, 1], "0.850")}
    expected, results = report.roc(curves), []
    threads = [threading.Thread(target=lambda: results.append(report.roc(curves))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 3
