import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageOps

from tilestream.store import decode
from tilestream.store.pyramid import strips


def decoded(data: bytes, max_megapixels: float = 100) -> np.ndarray:
    """All pixels of a file of these bytes."""
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(data)
        image = decode.photograph(file, max_megapixels)
        with decode.damage():
            return np.concatenate([strip.copy() for strip in strips(image)])


def encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats(noise: Callable[..., np.ndarray], kind: str, options: dict[str, object]) -> None:
    np.testing.assert_array_equal(decoded(encoded(noise(), kind, **options)), noise())


def test_jpeg_is_what_libvips_decodes_without_ado(noise: Callable[..., np.ndarray]) -> None:
    data = encoded(noise(), "JPEG", quality=90)
    np.testing.assert_array_equal(decoded(data), pyvips.Image.new_from_buffer(data, "").numpy())


def test_grey_is_repeated(noise: Callable[..., np.ndarray]) -> None:
    grey = noise(channels=1)
    np.testing.assert_array_equal(decoded(encoded(grey, "PNG")), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize(("bands", "interpretation"), [(1, "grey16"), (3, "rgb16")])
def test_sixteen_bits_keep_the_high_byte(bands: int, interpretation: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 2**16, (30, 40, bands), dtype=np.uint16)
    data = pyvips.Image.new_from_array(pixels).copy(interpretation=interpretation).pngsave_buffer()
    np.testing.assert_array_equal(decoded(data), np.broadcast_to(pixels >> 8, (30, 40, 3)))


def test_alpha_is_flattened_on_black(noise: Callable[..., np.ndarray]) -> None:
    pixels = noise(channels=4)
    pixels[:35, :, 3] = 255
    pixels[35:, :, 3] = 0
    got = decoded(encoded(pixels, "PNG"))
    np.testing.assert_array_equal(got[:35], pixels[:35, :, :3])
    assert (got[35:] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(noise: Callable[..., np.ndarray], orientation: int) -> None:
    pixels = noise(2000, 60)  # tall enough that a stream cannot be turned
    exif = Image.Exif()
    exif[274] = orientation
    for kind in ("TIFF", "PNG"):
        data = encoded(pixels, kind, exif=exif)
        with Image.open(io.BytesIO(data)) as image:
            upright = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(decoded(data), upright)
    jpeg = encoded(pixels, "JPEG", exif=exif)
    assert decoded(jpeg).shape == upright.shape


def photo() -> pyvips.Image:
    """A smooth picture, 300 x 400, as lossy formats like it."""
    y, x = np.mgrid[0:300, 0:400]
    waves = [128 + 100 * np.sin(x / 40 + c) * np.cos(y / 30) for c in range(3)]
    return pyvips.Image.new_from_array(np.stack(waves, axis=-1).astype(np.uint8)).copy(interpretation="srgb")


LOSSY = {
    "baseline": lambda image: image.jpegsave_buffer(Q=95, subsample_mode="off"),
    "4:2:0": lambda image: image.jpegsave_buffer(Q=95, subsample_mode="on"),
    "progressive": lambda image: image.jpegsave_buffer(Q=95, interlace=True),
    "webp": lambda image: image.webpsave_buffer(Q=95),
}
LOSSLESS = {
    "png": lambda image: image.pngsave_buffer(),
    "interlaced png": lambda image: image.pngsave_buffer(interlace=True),
    "strips": lambda image: image.tiffsave_buffer(),
    "tiles": lambda image: image.tiffsave_buffer(tile=True, tile_width=64, tile_height=64),
    "lzw": lambda image: image.tiffsave_buffer(compression="lzw"),
    "big endian deflate": lambda image: image.tiffsave_buffer(compression="deflate", predictor="horizontal"),
    "bigtiff": lambda image: image.tiffsave_buffer(bigtiff=True),
    "webp": lambda image: image.webpsave_buffer(lossless=True),
}


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_formats(name: str) -> None:
    got = decoded(LOSSY[name](photo()))
    assert np.abs(got.astype(int) - photo().numpy()).mean() < 3
    if name != "webp":
        grey = decoded(LOSSY[name](photo()[1]))
        assert np.abs(grey[..., 0].astype(int) - photo().numpy()[..., 1]).mean() < 3


@pytest.mark.parametrize("name", LOSSLESS)
def test_all_kinds_of_lossless_files(name: str) -> None:
    np.testing.assert_array_equal(decoded(LOSSLESS[name](photo())), photo().numpy())


@pytest.mark.parametrize("save", ["pngsave_buffer", "tiffsave_buffer", "jpegsave_buffer"])
def test_a_colour_profile_is_applied(save: str) -> None:
    wide = photo().icc_transform("p3", input_profile="srgb")
    assert np.abs(wide.numpy().astype(int) - photo().numpy()).max() > 8
    got = decoded(getattr(wide, save)())
    assert np.abs(got.astype(int) - photo().numpy()).mean() < 2
    np.testing.assert_array_equal(  # sRGB itself changes nothing
        decoded(photo().icc_transform("srgb", input_profile="srgb").pngsave_buffer()),
        photo().icc_transform("srgb", input_profile="srgb").numpy(),
    )


def test_cmyk_with_a_profile() -> None:
    inks = photo().icc_transform("cmyk", input_profile="srgb")
    got = decoded(inks.jpegsave_buffer(Q=98))
    want = inks.icc_transform("srgb", embedded=True).numpy()
    assert np.abs(got.astype(int) - want).mean() < 2


def test_a_profile_that_is_none() -> None:
    data = photo().icc_transform("p3", input_profile="srgb").tiffsave_buffer().replace(b"acsp", b"acs?")
    with pytest.raises(decode.Unusable) as caught:
        decoded(data)
    assert caught.value.reason == "bad_profile"


def test_a_profile_that_only_names_srgb_is_applied() -> None:
    wide = photo().icc_transform("p3", input_profile="srgb")
    assert not decode._is_srgb(bytes(wide.get("icc-profile-data")) + b"sRGB")


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_ycbcr_in_tiff_is_refused_rather_than_taken_for_rgb(noise: Callable[..., np.ndarray], compression: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise()).convert("YCbCr").save(buffer, "TIFF", compression=compression)
    with pytest.raises(decode.Unusable, match="YCbCr") as caught:
        decoded(buffer.getvalue())
    assert caught.value.reason == "unsupported_colourspace"
    image = pyvips.Image.new_from_array(noise()).tiffsave_buffer(compression="jpeg")
    assert decoded(image).shape == (70, 90, 3)


def mask(pixels: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(encoded(pixels, "PNG"))
        return decode.mask(file, *pixels.shape[:2]).numpy().reshape(pixels.shape[:2])


def test_masks_lose_no_lesion() -> None:
    """Not 0 is a lesion, however dark, in grey of 8 and 16 bits and in any colour; transparency is none."""
    for kind in (np.uint8, np.uint16):
        grey = np.zeros((20, 30), kind)
        grey[3, 4] = 1
        np.testing.assert_array_equal(mask(grey) > 0, grey > 0)
    blue = np.zeros((20, 30, 4), np.uint8)
    blue[..., 3] = 255
    blue[5, 6, 2] = 1
    np.testing.assert_array_equal(mask(blue) > 0, blue[..., 2] > 0)


def cmyk_jpeg() -> bytes:
    pixels = np.zeros((20, 20, 4), dtype=np.uint8)
    return pyvips.Image.new_from_array(pixels).copy(interpretation="cmyk").jpegsave_buffer()


def two_pages() -> bytes:
    page = Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    page.save(buffer, "TIFF", save_all=True, append_images=[page])
    return buffer.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><rect width="5" height="5"/></svg>'


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unsupported_format"),
        (b"just text\n", "unsupported_format"),
        (SVG, "unsupported_format"),
        (encoded(np.zeros((9, 9, 3), np.uint8), "GIF"), "unsupported_format"),
        (b"\xff\xd8\xffnot really", "damaged"),
        (cmyk_jpeg(), "unsupported_colourspace"),
        (encoded(np.zeros((9, 9), np.float32), "TIFF"), "unsupported_colourspace"),
        (two_pages(), "several_pages"),
    ],
    ids=["empty", "text", "svg", "gif", "magic only", "cmyk", "float", "pages"],
)
def test_refusals(data: bytes, reason: str) -> None:
    with pytest.raises(decode.Unusable) as caught:
        decoded(data)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("part", [0.3, 0.99])
def test_truncated_files_are_damaged(noise: Callable[..., np.ndarray], kind: str, part: float) -> None:
    data = encoded(noise(300, 200), kind)
    decoded(data)
    with pytest.raises(decode.Unusable) as caught:
        decoded(data[: int(len(data) * part)])
    assert caught.value.reason == "damaged"


def test_too_large_is_told_from_the_header(noise: Callable[..., np.ndarray]) -> None:
    data = encoded(noise(), "PNG")
    decoded(data, max_megapixels=70 * 90 / 1e6)
    with pytest.raises(decode.Unusable, match="70 x 90 pixels; the limit is") as caught:
        decoded(data, max_megapixels=(70 * 90 - 1) / 1e6)
    assert caught.value.reason == "too_large"


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")  # a plain open would wait for ever
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "file.jpg").write_bytes(b"bytes")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with decode.opened(tmp_path / "file.jpg") as file:
        assert decode.digest(file) == hashlib.sha256(b"bytes").hexdigest()
    reasons = {"fifo.jpg": "not_a_file", "folder.jpg": "not_a_file", "none.jpg": "missing_file"}
    for name, reason in {**reasons, "loop.jpg": "unreadable", "a\0b": "unreadable", "n" * 300: "unreadable"}.items():
        with pytest.raises(decode.Unusable) as caught, decode.opened(tmp_path / name):
            pass
        assert caught.value.reason == reason, name
        assert str(tmp_path) not in str(caught.value)
