"""Photographs: the same bytes for the same seed, lesions by grade, the map, and what must not depend on the grade."""

import cv2
import numpy as np
import pytest
from scipy import ndimage

from tilestream.synthesis import LESION_KINDS, Photograph, photograph
from tilestream.synthesis.anatomy import draw_eye
from tilestream.synthesis.camera import draw_camera
from tilestream.synthesis.lesions import COUNTS, SMALL

SIZE = (420, 560)


def near_lesions(photo: Photograph) -> np.ndarray:
    """(H, W) bool: every pixel that a lesion may have touched (its circle, half as much again, and the blur)."""
    touched = np.zeros(photo.lesion_map.shape, np.uint8)
    for lesion in photo.lesions:
        centre = (round(lesion.x_px), round(lesion.y_px))
        cv2.circle(touched, centre, int(1.5 * lesion.radius_px + 7), 1, -1)
    return touched.astype(bool)


@pytest.mark.parametrize("tier", ["realistic", "stress"])
def test_same_arguments_same_bytes(tier: str) -> None:
    first, second = (photograph(4, size=SIZE, seed=3, tier=tier) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.lesion_map, second.lesion_map)
    assert first.lesions == second.lesions
    assert not np.array_equal(first.image, photograph(4, size=SIZE, seed=4, tier=tier).image)


@pytest.mark.parametrize("grade", range(5))
def test_counts_follow_the_grade(grade: int) -> None:
    for seed in range(4):
        photo = photograph(grade, size=SIZE, seed=seed)
        counts = {kind: sum(lesion.kind == kind for lesion in photo.lesions) for kind in LESION_KINDS}
        for kind, count in counts.items():
            low, high = COUNTS[grade].get(kind, (0, 6 if grade == 3 and kind in ("irma", "venous_beading") else 0))
            assert low <= count <= high, (kind, seed)


def quadrants(photo: Photograph, kind: str) -> np.ndarray:
    """(4,) lesions of a kind in each quadrant about the middle."""
    middle = (np.array(photo.lesion_map.shape) - 1) / 2
    places = np.array([(s.y_px, s.x_px) for s in photo.lesions if s.kind == kind]).reshape(-1, 2)
    return np.bincount((places > middle) @ [1, 2], minlength=4)


@pytest.mark.parametrize("tier", ["realistic", "stress"])
def test_grade_three_has_one_of_its_three_signs(tier: str) -> None:
    signs = []
    for seed in range(16):
        photo = photograph(3, size=SIZE, seed=seed, tier=tier)
        many = quadrants(photo, "haemorrhage")
        assert many.max() <= 40
        beaded, irma = quadrants(photo, "venous_beading"), quadrants(photo, "irma")
        signs.append((many.min() > 20, (beaded > 0).sum() >= 2, irma.sum() > 0))
        assert sum(signs[-1]) == 1, seed
    seen = np.array(signs).any(axis=0).tolist()
    assert seen == ([True, True, True] if tier == "realistic" else [True, False, False])


@pytest.mark.parametrize("grade", range(5))
def test_stress_has_small_lesions_alone_in_the_numbers_of_the_table(grade: int) -> None:
    for seed in range(3):
        photo = photograph(grade, size=(960, 1440), seed=seed, tier="stress")
        um = [2 * s.radius_px * photo.um_per_px for s in photo.lesions]
        assert all(12 - 1e-6 <= size <= 20 + 1e-6 for size in um)
        for kind in LESION_KINDS:
            low, high = COUNTS[grade].get(kind, (0, 0)) if kind in SMALL else (0, 0)
            assert low <= sum(s.kind == kind for s in photo.lesions) <= high
        change = photo.image.astype(int) - photograph(0, size=(960, 1440), seed=seed).image
        assert (change != 0).any(axis=2).mean() < 0.01


def d_prime(clean: np.ndarray, healthy: np.ndarray, spots: list[tuple[int, int]]) -> float:
    """Median d' of known spots to the matched filter that knows each one's form, over the background's own spread."""
    places = np.argwhere(healthy > 50)[::997]
    inside = places[((places > 8) & (places < np.array(healthy.shape) - 9)).all(axis=1)]
    windows = np.stack([healthy[y - 8 : y + 9, x - 8 : x + 9] for y, x in inside])
    values = []
    for y, x in spots:
        form = clean[y - 8 : y + 9, x - 8 : x + 9]
        form = form - form.mean()
        heard = (windows * form).sum((1, 2))
        values.append((form * form).sum() / (1.4826 * np.median(np.abs(heard - np.median(heard)))))
    return float(np.median(values))


def test_stress_lesions_show_at_full_resolution_and_fade_at_1024() -> None:
    size, ratio = (3168, 4752), np.array([1024 / 3168, 1024 / 4752])
    ill, healthy = (photograph(g, size=size, seed=1, tier="stress") for g in (2, 0))
    planes = [photo.image[..., 1].astype(np.float32) for photo in (ill, healthy)]
    squares = [cv2.resize(plane, (1024, 1024), interpolation=cv2.INTER_AREA) for plane in planes]
    places = np.array([(s.y_px, s.x_px) for s in ill.lesions if s.kind != "exudate"])
    full = d_prime(planes[0] - planes[1], planes[1], np.round(places).astype(int).tolist())
    small = np.round((places + 0.5) * ratio - 0.5).astype(int).tolist()
    assert 7 < full < 14
    assert d_prime(squares[0] - squares[1], squares[1], small) < 0.6 * full


def test_only_grade_four_grows_new_vessels() -> None:
    kinds = [{lesion.kind for lesion in photograph(g, size=SIZE, seed=2).lesions} for g in range(5)]
    assert ["neovessels" in k for k in kinds] == [False, False, False, False, True]
    assert not kinds[0]
    assert kinds[1] == {"microaneurysm"}


@pytest.mark.parametrize("size", [(420, 560), (560, 420), (300, 900)])
def test_lesions_lie_in_the_field_and_off_the_disc(size: tuple[int, int]) -> None:
    photo = photograph(4, size=size, seed=5)
    camera, eye = draw_camera(np.random.default_rng([5, 0]), size), draw_eye(np.random.default_rng([5, 1]))
    disc_y, disc_x = camera.to_px(eye.disc.imag, eye.disc.real)
    disc_px = eye.disc_radius * 1000 / photo.um_per_px
    for lesion in photo.lesions:
        from_centre = np.hypot(lesion.y_px - (size[0] - 1) / 2, lesion.x_px - (size[1] - 1) / 2)
        assert from_centre + lesion.radius_px < 13_100 / photo.um_per_px / 2
        assert lesion.radius_px <= min(lesion.y_px, lesion.x_px, size[0] - 1 - lesion.y_px, size[1] - 1 - lesion.x_px)
        assert np.hypot(lesion.y_px - disc_y, lesion.x_px - disc_x) > disc_px + lesion.radius_px


@pytest.mark.parametrize("size", [(256, 256), SIZE, (700, 900)])
@pytest.mark.parametrize(("grade", "seed"), [(1, 0), (2, 1), (3, 2), (4, 3)])
def test_map_agrees_with_the_list(grade: int, seed: int, size: tuple[int, int]) -> None:
    photo = photograph(grade, size=size, seed=seed)
    for lesion in photo.lesions:
        y, x = round(lesion.y_px), round(lesion.x_px)
        assert photo.lesion_map[y, x] == 1 + LESION_KINDS.index(lesion.kind)
    assert {LESION_KINDS[v - 1] for v in np.unique(photo.lesion_map) if v} == {lesion.kind for lesion in photo.lesions}
    assert not photo.lesion_map[~near_lesions(photo)].any()
    regions = ndimage.label(photo.lesion_map, np.ones((3, 3)))[0]
    marked = {int(regions[round(s.y_px), round(s.x_px)]) for s in photo.lesions}
    size_px = np.bincount(regions.ravel())
    assert sum(size_px[sorted(marked)]) > 0.9 * size_px[1:].sum()  # crumbs of a lesion may lie apart from its centre


@pytest.mark.parametrize("seed", [0, 7])
def test_nothing_but_lesions_depends_on_the_grade(seed: int) -> None:
    healthy = photograph(0, size=SIZE, seed=seed)
    for grade in (1, 2, 3, 4):
        ill = photograph(grade, size=SIZE, seed=seed)
        away = ~near_lesions(ill)
        assert away.mean() > 0.25
        np.testing.assert_array_equal(ill.image[away], healthy.image[away])
        assert (ill.image != healthy.image).any()


def test_frames_are_drawn_in_their_shares_without_the_grade() -> None:
    cameras = [draw_camera(np.random.default_rng([seed, 0]), None) for seed in range(400)]
    widths = [camera.width for camera in cameras]
    assert 0.14 < widths.count(4752) / 400 < 0.26
    assert 0.24 < widths.count(3888) / 400 < 0.36
    by_width = {camera.width: camera.um_per_px for camera in cameras}
    assert [round(by_width[w], 1) for w in (4752, 3888, 2592)] == [3.9, 4.8, 6.4]
    small = next(seed for seed, width in enumerate(widths) if width == 1440)
    shapes = {photograph(grade, seed=small).image.shape for grade in (0, 1, 3)}
    assert shapes == {(960, 1440, 3)}


def test_contrast_has_the_sign_of_the_table() -> None:
    signs = {"exudate": 1, "cotton_wool": 1}
    seen = set()
    for grade, seed in ((2, 1), (3, 2), (3, 5), (4, 6), (4, 8)):
        ill, healthy = (photograph(g, size=(1000, 1300), seed=seed) for g in (grade, 0))
        change = ill.image[..., 1].astype(float) - healthy.image[..., 1]
        for kind in {lesion.kind for lesion in ill.lesions}:
            inside = change[ill.lesion_map == 1 + LESION_KINDS.index(kind)]
            seen.add(kind)
            if kind == "venous_beading":  # wider and narrower by turns
                assert inside.min() < -5
                assert inside.max() > 5
                continue
            assert signs.get(kind, -1) * inside.mean() > 1.5, (kind, inside.mean())
    assert seen == set(LESION_KINDS)


@pytest.mark.parametrize(("tier", "low", "high"), [("stress", 12, 20), ("realistic", 20, 60)])
def test_tier_sets_the_size_of_microaneurysms(tier: str, low: float, high: float) -> None:
    um = []
    for seed in range(3):
        photo = photograph(3, size=SIZE, seed=seed, tier=tier)
        um += [2 * s.radius_px * photo.um_per_px for s in photo.lesions if s.kind == "microaneurysm"]
    assert min(um) >= low - 1e-6
    assert max(um) <= high + 1e-6
    assert np.ptp(um) > 0.3 * (high - low)


def test_lesions_are_as_large_as_the_list_says() -> None:
    photo = photograph(3, size=(2592, 3888), seed=4)
    regions = ndimage.label(photo.lesion_map, np.ones((3, 3)))[0]
    area_px = np.bincount(regions.ravel())
    for kind, low, high in (("microaneurysm", 0.8, 1.5), ("haemorrhage", 0.35, 1.0), ("exudate", 0.4, 1.1)):
        lesions = [s for s in photo.lesions if s.kind == kind]
        across = [2 * np.sqrt(area_px[regions[round(s.y_px), round(s.x_px)]] / np.pi) for s in lesions]
        ratio = np.median(np.array(across) / [2 * s.radius_px for s in lesions])
        assert low < ratio < high, (kind, ratio)


@pytest.mark.parametrize("size", [(256, 256), (257, 301), (512, 384), (256, 1024), (1024, 256)])
def test_any_size(size: tuple[int, int]) -> None:
    photo = photograph(3, size=size, seed=11)
    assert photo.image.shape == (*size, 3)
    assert photo.image.dtype == photo.lesion_map.dtype == np.uint8
    assert photo.lesion_map.shape == size
    middle = photo.image[size[0] // 2 - 20 : size[0] // 2 + 20, size[1] // 2 - 20 : size[1] // 2 + 20]
    red, green, blue = middle.reshape(-1, 3).mean(0)
    assert red > 1.4 * green > 1.4 * blue
    assert photo.image[0, 0].max() < 12  # a corner lies outside the field of view


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grade": 7}, "grade=7 is not one of 0, 1, 2, 3, 4"),
        ({"grade": 1, "size": (100, 400)}, r"size=\(100, 400\) is under 256 px"),
        ({"grade": 1, "tier": "easy"}, "tier='easy' is not one of realistic, stress"),
        ({"grade": 1, "seed": -1}, "seed=-1 is negative"),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        photograph(**({"size": SIZE, "seed": 0} | arguments))
