"""The eye without disease: landmarks in range, vessels that cover what they should, disc bright, fovea dark."""

from itertools import pairwise

import numpy as np

from tilestream.synthesis import photograph
from tilestream.synthesis.anatomy import draw_eye
from tilestream.synthesis.camera import Camera, draw_camera, field_mask
from tilestream.synthesis.vessels import absorbance, grow


def test_landmarks_keep_to_anatomy() -> None:
    for seed in range(200):
        eye = draw_eye(np.random.default_rng([seed, 1]))
        assert 3.5 <= abs(eye.disc - eye.fovea) <= 5.5
        assert 0.75 <= eye.disc_radius <= 0.95
        assert abs(eye.disc) < 6.55  # in the field of view


def test_vessels_cover_about_36_thousandths_of_the_frame_and_taper() -> None:
    covers = []
    for seed in range(4):
        camera = draw_camera(np.random.default_rng([seed, 0]), (2112, 3168))
        vessels = grow(rng := np.random.default_rng([seed, 1]), draw_eye(rng))
        blood = absorbance(vessels, camera)
        covers.append(((blood > 40) & (field_mask(camera) > 0)).mean())
        widest = [max(v.calibre_um.max() for v in vessels if v.artery is kind) for kind in (True, False)]
        assert 100 < widest[0] < 170
        assert 118 < widest[1] < 185
        assert min(v.calibre_um.min() for v in vessels) < 30
    assert 0.032 < np.mean(covers) < 0.040


def test_vessels_branch_every_20_to_30_diameters_with_exponent_21() -> None:
    lengths, powers = [], []
    for seed in range(6):
        vessels = grow(rng := np.random.default_rng([seed, 1]), draw_eye(rng))
        starts = {v.points[0]: v for v in vessels}
        for parent in vessels:
            at = [i for i in range(9, len(parent.points) - 21) if parent.points[i] in starts]
            um = parent.calibre_um
            lengths += [abs(np.diff(parent.points[a : b + 1])).sum() * 1000 / um[a + 7] for a, b in pairwise(at)]
            for i in at:
                child = starts[parent.points[i]].calibre_um
                if len(child) > 30:  # its start and its end are drawn thinner
                    powers.append((um[i + 7] ** 2.1 + child[7] ** 2.1) / um[i - 7] ** 2.1)
    assert len(lengths) > 50
    assert (np.quantile(lengths, [0.1, 0.9]) > [19, 25]).all()
    assert (np.quantile(lengths, [0.1, 0.9]) < [25, 33]).all()
    assert 0.85 < np.median(powers) < 1.05  # a vessel also tapers on its way


def ring(image: np.ndarray, camera: Camera, place: complex, low_mm: float, high_mm: float) -> float:
    """Median grey level between two distances from a place on the retina."""
    y, x = np.ogrid[: camera.height, : camera.width]
    centre_y, centre_x = camera.to_px(place.imag, place.real)
    mm = np.hypot(y - centre_y, x - centre_x) * camera.um_per_px / 1000
    return float(np.median(image[(mm >= low_mm) & (mm < high_mm) & (image > 12)]))


def test_disc_is_bright_and_fovea_dark() -> None:
    for seed in range(6):
        image = photograph(0, size=(700, 900), seed=seed).image[..., 1].astype(float)
        camera = draw_camera(np.random.default_rng([seed, 0]), (700, 900))
        eye = draw_eye(np.random.default_rng([seed, 1]))
        assert ring(image, camera, eye.disc, 0, 0.6) > 1.2 * ring(image, camera, eye.disc, 1.3, 2.0)
        assert ring(image, camera, eye.fovea, 0, 0.3) < 0.95 * ring(image, camera, eye.fovea, 1.6, 2.2)


def test_same_eye_at_any_size() -> None:
    small, large = (photograph(0, size=size, seed=9).image for size in ((480, 720), (960, 1440)))
    halved = large.reshape(480, 2, 720, 2, 3).mean((1, 3))
    inside = halved.max(-1) > 40
    assert np.corrcoef(halved[inside][:, 1], small[inside][:, 1].astype(float))[0, 1] > 0.95
