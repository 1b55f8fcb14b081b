import numpy as np
import pytest

from tilestream.store.fieldofview import field_of_view


def picture(y_px: float, x_px: float, radius_px: float, size: tuple[int, int] = (356, 536)) -> np.ndarray:
    """An eye, brighter to the right, in noise as dark as a camera's margin."""
    y, x = np.mgrid[: size[0], : size[1]]
    inside = np.hypot(y - y_px, x - x_px) <= radius_px
    noise = np.random.default_rng(0).integers(0, 9, (*size, 3))
    grey = np.where(inside, 60 + 120 * x / size[1], 0)[..., None] * [1.0, 0.5, 0.3]
    return (grey + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("y", "x", "radius"), [(178, 250, 150), (178, 250, 213), (170.5, 300, 190), (178, 268, 260)])
def test_circles_whole_and_cut(y: float, x: float, radius: float) -> None:
    """A tenth of a percent of the radius off; the frame may cut them on every side."""
    found = field_of_view(picture(y, x, radius), 8)
    assert found
    for name, want in {"y_px": y, "x_px": x, "radius_px": radius}.items():
        shift = 0 if name == "radius_px" else 3.5
        assert found[name] == pytest.approx(want * 8 + shift, abs=8)
    first, last = max(0, int(np.ceil(y - radius))), min(355, int(y + radius))
    assert found["first_row_px"] == pytest.approx(first * 8 + 3.5, abs=16)
    assert found["last_row_px"] == pytest.approx(last * 8 + 3.5, abs=16)


def test_what_has_no_circle() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    black, grey = np.zeros_like(noise), np.full_like(noise, 90)
    square = black.copy()
    square[50:250, 100:300] = 120
    for pixels in (noise, black, grey, square, grey[:3, :4]):
        assert field_of_view(pixels, 1) is None
