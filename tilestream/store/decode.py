"""A photograph's bytes to pixels: known formats only, decoded completely, with one reason code for each refusal."""

import os
import stat

import numpy as np
import numpy.typing as npt
import pyvips

MAX_PIXELS = 2**29  # a photograph is held whole while it is ingested: 1.6 GB of pixels at most

# By the first bytes and never by the name: libvips would sniff an SVG or a PDF under a .jpg name and render it.
_LOADERS = {
    b"\xff\xd8\xff": "jpegload_buffer",
    b"\x89PNG\r\n\x1a\n": "pngload_buffer",
    b"II*\0": "tiffload_buffer",
    b"MM\0*": "tiffload_buffer",
    b"II+\0": "tiffload_buffer",
    b"MM\0+": "tiffload_buffer",
}
_FORMATS = {"srgb": "uchar", "b-w": "uchar", "rgb16": "ushort", "grey16": "ushort"}


class Unusable(Exception):
    """A photograph that cannot be ingested: `reason` is its code in the quarantine, the message one line."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.reason = reason


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a regular file. Raises Unusable (missing_file, not_a_file, unreadable), never waits on a FIFO."""
    try:
        # not blocking, and asked for its kind once open: a FIFO hangs a plain open, and a path can change after a stat
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Unusable("not_a_file", "not a regular file")
            return file.read()
    except FileNotFoundError:
        raise Unusable("missing_file", "no such file") from None
    except IsADirectoryError:
        raise Unusable("not_a_file", "a folder, not a file") from None
    except (OSError, ValueError) as error:
        raise Unusable("unreadable", getattr(error, "strerror", None) or str(error)) from None


def decode(data: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of a JPEG, PNG, TIFF or WebP file, (height, width, 3) uint8.

    Turned upright by its EXIF orientation, 16 bit reduced to 8 (the high byte), grey repeated over three channels,
    transparency flattened on black. A colour profile is not applied. Raises Unusable: unsupported_format,
    unsupported_colourspace, several_pages, too_large, damaged (every warning of a decoder counts).
    """
    try:
        image = _open(data)
        if image.get_typeof("orientation") and image.get("orientation") > 1:
            image = image.copy_memory().autorot()  # turning reads rows out of order, a stream cannot
        image = image.colourspace("srgb")
        if image.hasalpha():
            image = image.flatten()
        pixels: npt.NDArray[np.uint8] = image.numpy()
    except pyvips.Error as error:
        raise Unusable("damaged", f"cannot be decoded completely: {error.detail.strip() or error.message}") from None
    return pixels


def _open(data: bytes) -> pyvips.Image:
    loader = next((loader for magic, loader in _LOADERS.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        loader = "webpload_buffer"
    if loader is None:
        raise Unusable("unsupported_format", "not a JPEG, PNG, TIFF or WebP file")
    # sequential: decoded as it is read, neither cached by libvips nor through a temporary file
    image = pyvips.Operation.call(loader, data, access="sequential", fail_on="warning")
    if image.width * image.height > MAX_PIXELS:
        raise Unusable("too_large", f"{image.height} x {image.width} pixels, the limit is {MAX_PIXELS} in all")
    if _FORMATS.get(image.interpretation) != image.format or image.bands > 4:
        kind = f"{image.interpretation}, {image.bands} bands of {image.format}"
        raise Unusable("unsupported_colourspace", f"{kind}; grey or RGB of 8 or 16 bits is read")
    if image.get_typeof("n-pages") and image.get("n-pages") > 1:
        raise Unusable("several_pages", f"{image.get('n-pages')} pages or frames in one file")
    return image
