"""One self-contained HTML page: value types for what it shows, and `write_page`, which writes it whole or not at all.

Style, script and pictures stand inline and a content security policy forbids every request, so the file can be mailed,
archived or opened on a machine without a network. Every text is escaped.
"""

import base64
import hashlib
import itertools
import math
import numbers
import os
import re
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

Cell = str | int | float | None
PNG_MAGIC, JPEG_MAGIC = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
NUMERIC_TEXT = re.compile(r"(?=\D*\d)(?:[\s\d.,:%()/±×<>=–−+-]|\bto\b)+")  # such as 0.893 (0.816–0.941)


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG or JPEG file's bytes. `alt` says in words what it shows.

    A `chart` has a white ground: the page shows it at half its pixels and inverts it in dark mode.
    Raises ValueError for bytes of another format and for an empty `alt`.
    """

    data: bytes = field(repr=False)
    caption: str = ""
    alt: str = ""
    chart: bool = False

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError(f"alt={self.alt!r} is empty; say what the picture shows, for readers who cannot see it")
        _picture_size(self.data)

    @property
    def uri(self) -> str:
        """The picture as a `data:` URI."""
        kind = "png" if self.data.startswith(PNG_MAGIC) else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode('ascii')}"

    @property
    def height_px(self) -> int:
        """Height in pixels, read from the file's header."""
        return _picture_size(self.data)[0]

    @property
    def width_px(self) -> int:
        """Width in pixels, read from the file's header."""
        return _picture_size(self.data)[1]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns; the first column names the row.

    Floats are shown with `digits` decimals, integers with thousands apart, None as an en dash; a column that holds
    nothing but numbers is right-aligned. `title` stands above, `caption` below. Raises ValueError for a row whose
    length differs from the columns'.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    digits: int = 3
    title: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"rows[{number}] has {len(row)} cells, the table {len(self.columns)} columns")

    @property
    def cells(self) -> list[list[str]]:
        """The rows as the texts that the page shows."""
        return [[as_text(cell, self.digits) for cell in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether all its cells are numbers or missing."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        return [bool(column) and all(map(_is_number, column)) for column in columns]


@dataclass(frozen=True, slots=True)
class KeyFigures:
    """The few numbers that matter, each under its name, shown large."""

    figures: Mapping[str, Cell]
    digits: int = 3

    @property
    def texts(self) -> list[tuple[str, str]]:
        """(name, text) pairs as the page shows them."""
        return [(name, as_text(value, self.digits)) for name, value in self.figures.items()]


@dataclass(frozen=True, slots=True)
class Code:
    """Text to be shown as it is, in a fixed-width font: a configuration, a command; folded under its `summary`."""

    text: str
    summary: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """One photograph's row in a gallery: its pictures side by side under its title and facts.

    `tone` colours the edge: "good" for a right decision, "bad" for a wrong one; the facts must say the same in words.
    """

    title: str
    pictures: Sequence[Picture]
    facts: Mapping[str, str] = field(default_factory=dict)
    tone: Literal["good", "bad", "neutral"] = "neutral"


@dataclass(frozen=True, slots=True)
class Gallery:
    """Cards below one another."""

    cards: Sequence[Card]


Item = Table | Picture | Gallery | KeyFigures | Code


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a paragraph and what follows; neighbouring pictures stand side by side."""

    heading: str
    intro: str = ""
    items: Sequence[Item] = ()

    @property
    def blocks(self) -> Iterator[tuple[str, list[Item]]]:
        """Runs of items of one type, as (type's name, items)."""
        for kind, run in itertools.groupby(self.items, key=lambda item: type(item).__name__):
            yield kind, list(run)


def write_page(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    *,
    summary: str = "",
    facts: Mapping[str, str] | None = None,
    footer: str = "",
) -> None:
    """Write the page to `path`, replacing what was there only once the new page is complete and on disk.

    `summary` and `facts` (run, data set, version, date ...) stand under the title. The same arguments give the same
    bytes. Whatever fails, rendering or the disk, leaves the old file as it was and nothing beside it.
    """
    target = Path(path)
    html = render_page(title, sections, summary=summary, facts=facts, footer=footer)
    content = html.encode("utf-8", "backslashreplace")  # a file name need not be valid Unicode
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def render_page(
    title: str,
    sections: Sequence[Section],
    *,
    summary: str = "",
    facts: Mapping[str, str] | None = None,
    footer: str = "",
) -> str:
    """The page's HTML; arguments as in `write_page`."""
    loader = PackageLoader("tilestream.report", "template")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    parts: dict[str, Markup] = {}
    for name, file in (("style", "page.css"), ("script", "page.js")):
        text = loader.get_source(environment, file)[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
        # Our own files, not anyone's input; the policy lets exactly these two run, by hash.
        parts |= {name: Markup(text), f"{name}_hash": Markup(f"sha256-{digest}")}
    return environment.get_template("page.html").render(
        title=title, sections=list(sections), summary=summary, facts=facts or {}, footer=footer, **parts
    )


def as_text(value: Cell, digits: int = 3) -> str:
    """`value` as the page shows it: 0.7714 -> "0.771", 35126 -> "35,126", None or NaN -> "–", text as it is."""
    if isinstance(value, str | bool):
        return str(value)
    if value is None or math.isnan(value):
        return "–"
    decimals = 0 if isinstance(value, numbers.Integral) else digits  # NumPy's integers are Integral, not int
    return f"{value:,.{decimals}f}".replace("-", "−")


def _is_number(cell: Cell) -> bool:
    if isinstance(cell, str):
        return NUMERIC_TEXT.fullmatch(cell) is not None
    return not isinstance(cell, bool)


def _picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels from a PNG's or JPEG's header; ValueError for anything else."""
    if data.startswith(PNG_MAGIC) and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    position = 2
    while data.startswith(JPEG_MAGIC) and position + 9 <= len(data):
        marker, length = struct.unpack(">HH", data[position : position + 4])
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return height, width
        position += 2 + length
    raise ValueError(f"data={data[:8]!r}... ({len(data)} bytes) is neither PNG nor JPEG; encode the picture first")
