"""A photograph's bytes to pixels: known formats only, decoded completely, with one reason code for each refusal."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pyvips

MAX_MEGAPIXELS, MAX_SIDE_PX = 4096, 100_000
TURNED_IN_MEMORY = 2**26
"""Pixels up to which a photograph is turned upright in memory; larger ones in a temporary file."""

# By the first bytes and never by the name: libvips would sniff an SVG or a PDF under a .jpg name and render it.
_LOADERS = {
    b"\xff\xd8\xff": "jpegload_source",
    b"\x89PNG\r\n\x1a\n": "pngload_source",
    b"II*\0": "tiffload_source",
    b"MM\0*": "tiffload_source",
    b"II+\0": "tiffload_source",
    b"MM\0+": "tiffload_source",
}
_FORMATS = {"srgb": "uchar", "b-w": "uchar", "rgb16": "ushort", "grey16": "ushort", "cmyk": "uchar"}


class Unusable(Exception):
    """A photograph that cannot be ingested: `reason` is its code in the quarantine, the message one line."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.reason = reason


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A regular file, open for reading, never a FIFO. Raises Unusable: missing_file, not_a_file, unreadable."""
    try:
        # not blocking, and asked for its kind once open: a FIFO hangs a plain open, and a path can change after a stat
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(descriptor, "rb", buffering=0)  # libvips moves the same offset
    except FileNotFoundError:
        raise Unusable("missing_file", "no such file") from None
    except IsADirectoryError:
        raise Unusable("not_a_file", "a folder, not a file") from None
    except (OSError, ValueError) as error:
        raise Unusable("unreadable", getattr(error, "strerror", None) or str(error)) from None
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Unusable("not_a_file", "not a regular file")
        yield file


def digest(file: Any) -> str:
    """SHA-256 of an open file's bytes. Raises Unusable (unreadable)."""
    try:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Unusable("unreadable", error.strerror or str(error)) from None


@contextlib.contextmanager
def damage() -> Iterator[None]:
    """Errors of libvips, while pixels are read, are the photograph's: Unusable (damaged)."""
    try:
        yield
    except pyvips.Error as error:
        why = error.detail.strip() or error.message
        raise Unusable("damaged", f"cannot be decoded completely: {why}") from None


def photograph(
    file: Any, max_megapixels: float = MAX_MEGAPIXELS, max_side_px: int = MAX_SIDE_PX, masked: bool = False
) -> pyvips.Image:
    """The JPEG, PNG, TIFF or WebP photograph in an open file: 8-bit sRGB, three bands, to be read once from the top.

    Turned upright by its EXIF orientation, brought to sRGB by its colour profile, 16 bit reduced to 8 (the high byte,
    where no profile says otherwise), grey repeated over three channels, transparency flattened on black. Pixels are
    decoded as they are read, under `damage()`. Raises Unusable: unsupported_format, unsupported_colourspace,
    bad_profile, several_pages, too_large, damaged (every warning of a decoder counts).
    """
    with damage():
        image = _open(file, max_megapixels, max_side_px)
        if image.get_typeof("orientation") and image.get("orientation") > 1:
            if masked:
                raise Unusable("bad_mask", "the photograph is turned by EXIF, its masks may not be; turn both upright")
            image = _random_access(image).autorot()  # turning reads rows out of order, a stream cannot
        profile = _profile(image)
        if profile is not None:
            image = _to_srgb(image)
        elif image.interpretation == "cmyk":
            raise Unusable("unsupported_colourspace", "CMYK without a colour profile; convert it to RGB")
        image = image.colourspace("srgb")
        if image.hasalpha():
            image = image.flatten()
        return image.cast("uchar")


def mask(file: Any, height: int, width: int) -> pyvips.Image:
    """A mask of a photograph of this size: one band, 8 bit, not 0 where the lesion is. Raises Unusable (bad_mask)."""
    with damage():
        image = _open(file, MAX_MEGAPIXELS, MAX_SIDE_PX)
        if (image.height, image.width) != (height, width):
            size = f"{image.height} x {image.width}"
            raise Unusable("bad_mask", f"a mask of {size} px for a photograph of {height} x {width} px")
        colours = image[: image.bands - 1] if image.hasalpha() else image
        return (colours != 0).bandor()


def _open(file: Any, max_megapixels: float, max_side_px: int) -> pyvips.Image:
    file.seek(0)
    data = file.read(12)
    loader = next((loader for magic, loader in _LOADERS.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        loader = "webpload_source"
    if loader is None:
        raise Unusable("unsupported_format", "not a JPEG, PNG, TIFF or WebP file")
    file.seek(0)
    source = pyvips.Source.new_from_descriptor(file.fileno())
    # sequential: decoded as it is read, neither cached by libvips nor through a temporary file
    image = pyvips.Operation.call(loader, source, access="sequential", fail_on="warning")
    if image.width * image.height > max_megapixels * 1e6:
        size = f"{image.height} x {image.width} pixels"
        raise Unusable("too_large", f"{size}; the limit is {max_megapixels:g} megapixels, --max-megapixels raises it")
    if max(image.width, image.height) > max_side_px:
        size = f"{image.height} x {image.width} pixels"
        raise Unusable("too_large", f"{size}; the limit is {max_side_px} px a side, --max-side raises it")
    if loader == "tiffload_source" and _is_raw_ycbcr(file):  # libvips would take the samples for RGB
        raise Unusable("unsupported_colourspace", "a TIFF file of uncompressed YCbCr; convert it to RGB")
    if _FORMATS.get(image.interpretation) != image.format or image.bands > 4 + (image.interpretation == "cmyk"):
        kind = f"{image.interpretation}, {image.bands} bands of {image.format}"
        raise Unusable("unsupported_colourspace", f"{kind}; grey or RGB of 8 or 16 bits is read")
    if image.get_typeof("n-pages") and image.get("n-pages") > 1:
        raise Unusable("several_pages", f"{image.get('n-pages')} pages or frames in one file")
    return image


def _is_raw_ycbcr(file: Any) -> bool:
    """Whether a TIFF file's first page is YCbCr (photometric 6) and not compressed as JPEG (6, 7)."""
    data = os.pread(file.fileno(), 16, 0)
    order, big = "<" if data[:2] == b"II" else ">", data[2:4] in (b"+\0", b"\0+")
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    size, head, tags = (20, 8, dict[int, int]()) if big else (12, 2, dict[int, int]())
    count = os.pread(file.fileno(), head, start)
    if len(count) < head:
        return False
    entries = os.pread(
        file.fileno(), size * min(4096, struct.unpack(order + ("Q" if big else "H"), count)[0]), start + head
    )
    for place in range(0, len(entries) - size + 1, size):
        tag, _ = struct.unpack_from(order + "HH", entries, place)
        tags[tag] = struct.unpack_from(order + "H", entries, place + size - (8 if big else 4))[0]
    return tags.get(262) == 6 and tags.get(259) not in (6, 7)


def _random_access(image: pyvips.Image) -> pyvips.Image:
    if image.width * image.height <= TURNED_IN_MEMORY:
        return image.copy_memory()
    with tempfile.NamedTemporaryFile(suffix=".v") as file:  # libvips holds it open; nothing is left of it
        image.write_to_file(file.name)
        return pyvips.Image.new_from_file(file.name)


def _profile(image: pyvips.Image) -> bytes | None:
    """The embedded colour profile, unless it is sRGB itself."""
    if not image.get_typeof("icc-profile-data"):
        return None
    data = bytes(image.get("icc-profile-data"))
    if data[36:40] != b"acsp":  # libvips would take it for sRGB
        raise Unusable("bad_profile", "its colour profile is damaged")
    return None if image.interpretation == "srgb" and _is_srgb(data) else data


@cache
def _is_srgb(profile: bytes) -> bool:
    """Whether a profile changes no colour of a lattice by more than one level: transforming is slow, and blurs."""
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(18, -1, 3)
    image = pyvips.Image.new_from_array(lattice).copy(interpretation="srgb")
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    found = _to_srgb(image).numpy().astype(int)
    return bool(np.abs(found - lattice).max() <= 1)


def _to_srgb(image: pyvips.Image) -> pyvips.Image:
    alpha = image[image.bands - 1] if image.hasalpha() else None
    colours = image[: image.bands - 1] if alpha is not None else image
    depth = 16 if image.format == "ushort" else 8
    try:
        result = colours.icc_transform("srgb", embedded=True, intent="relative", depth=depth)
    except pyvips.Error as error:
        why = error.detail.strip() or error.message
        raise Unusable("bad_profile", f"its colour profile cannot be used: {why}") from None
    return result if alpha is None else result.bandjoin(alpha)
