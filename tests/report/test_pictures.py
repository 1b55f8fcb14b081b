"""Pictures: decoded again, they have the size, the colours and the places that were asked for."""

import cv2
import matplotlib
import numpy as np
import pytest

from tilestream import report
from tilestream.report.pictures import BORDER_RGB, CASING_RGB, CROP_RGB, LESION_RGB

GREY = np.full((200, 300, 3), 120, np.uint8)


def decode(data: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB).astype(int)


def marked(y: slice, x: slice) -> np.ndarray:
    mask = np.zeros((200, 300), bool)
    mask[y, x] = True
    return mask


def test_photograph_keeps_size_and_channel_order():
    picture = np.zeros((40, 64, 3), np.uint8)
    picture[:, :32, 0] = 250
    decoded = decode(report.photograph(picture, fine=True))
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
    with pytest.raises(ValueError, match=r"map has shape \(300, 200\), the picture \(200, 300\)"):
        report.overlay(GREY, np.zeros((300, 200)))
    with pytest.raises(ValueError, match="the map holds 1 values that are not finite"):
        report.overlay(GREY, np.where(np.indices((200, 300)).sum(axis=0) == 0, np.nan, 1.0))


def test_frame_is_drawn_where_asked():
    drawn = report.frame(GREY, (40, 60, 100, 160), centre=(70, 110))
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
    crop, small_others, large_others = (40, 60, 100, 160), [(150, 200)], [(1504.5, 2004.5)]
    small = report.frame(GREY, crop, centre=(70, 110), others=small_others)
    large = report.frame(
        GREY, [10 * n for n in crop], centre=(704.5, 1104.5), others=large_others, photograph_px=(2000, 3000)
    )
    np.testing.assert_array_equal(large, small)


def test_centre_is_the_middle_of_its_pixel():
    drawn = report.frame(GREY, (0, 0, 20, 30), centre=(7, 11), photograph_px=(20, 30))  # a pixel shows as 10 x 10
    ys, xs = np.nonzero((drawn[10:190, 10:290] == CROP_RGB).all(axis=2))
    np.testing.assert_allclose((ys.mean() + 10, xs.mean() + 10), (74.5, 114.5), atol=0.6)


def test_border_rule_dims_what_it_excludes():
    allowed = marked(slice(20, 180), slice(30, 270))
    drawn = report.frame(GREY, (90, 140, 110, 160), allowed=allowed)
    assert (drawn[20, 30:270] == BORDER_RGB).all()
    assert (drawn[179, 30:270] == BORDER_RGB).all()
    assert (drawn[~allowed] == 60).all()
    assert (drawn[30:80, 40:260] == 120).all()
    everything = report.frame(GREY, (90, 140, 110, 160), allowed=np.ones((200, 300), bool))
    assert (everything[0] == BORDER_RGB).all()  # a rule that leaves nothing out is drawn along the edge
    with pytest.raises(ValueError, match=r"allowed has shape \(300, 200\), the picture \(200, 300\)"):
        report.frame(GREY, allowed=allowed.reshape(300, 200))


def test_candidates_are_smaller_than_the_centre():
    def arms(**kwargs):
        return int((report.frame(GREY, **kwargs) == CROP_RGB).all(axis=2).sum())

    assert arms() == 0
    assert 0 < arms(others=[(70, 110)]) < arms(centre=(70, 110))
    assert arms(others=[(70, 110), (150, 200)]) == 2 * arms(others=[(70, 110)])


def test_a_lesion_of_one_pixel_is_seen_in_its_outline():
    drawn = report.outlined(GREY, marked(slice(100, 101), slice(150, 151)))
    line = (drawn == LESION_RGB).all(axis=2)
    assert (drawn[100, 150] == 120).all()  # the line stands around it, not on it
    assert not line[99:102, 149:152].any()
    ys, xs = np.nonzero(line)
    assert ys.max() - ys.min() == xs.max() - xs.min() <= 8
    assert line[100, :150].any()
    assert line[100, 151:].any()
    np.testing.assert_array_equal(report.outlined(GREY, np.zeros((200, 300), bool)), GREY)
    with pytest.raises(ValueError, match=r"lesions has shape \(20, 30\)"):
        report.outlined(GREY, np.zeros((20, 30), bool))


def test_fine_jpegs_keep_thin_coloured_lines():
    drawn = report.frame(GREY, (40, 60, 100, 160))
    fine, coarse = (decode(report.photograph(drawn, 92, fine=fine)) for fine in (True, False))
    line = np.s_[40, 80:140]
    np.testing.assert_allclose(fine[line], np.broadcast_to(CROP_RGB, (60, 3)), atol=40)
    assert abs(fine[line] - CROP_RGB).max() < abs(coarse[line] - CROP_RGB).max()


def test_overlay_on_a_fixed_scale():
    values = np.full((200, 300), 0.25)
    (own, fixed, half) = (
        decode(report.overlay(GREY, values, **kwargs)) for kwargs in ({}, {"highest": 1.0}, {"highest": 0.5})
    )
    top = np.array(matplotlib.colormaps["viridis"](1.0)[:3]) * 255
    assert abs(own - top).mean() < abs(half - top).mean() < abs(fixed - top).mean()
