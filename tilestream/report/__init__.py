"""What a run leaves for people to look at: figures as bytes, and one self-contained HTML page.

Values in, bytes or one file out: arrays reduced to display size by the caller, no store, no network, no clock. It
imports nothing else of ours.
"""

from tilestream.report.figures import (
    confusion,
    draw_frame,
    frame,
    overlay,
    photograph,
    probability_histogram,
    roc,
    training_curves,
)
from tilestream.report.page import (
    Card,
    Code,
    Gallery,
    KeyFigures,
    Picture,
    Section,
    Table,
    as_text,
    render_page,
    write_page,
)

__all__ = [
    "Card",
    "Code",
    "Gallery",
    "KeyFigures",
    "Picture",
    "Section",
    "Table",
    "as_text",
    "confusion",
    "draw_frame",
    "frame",
    "overlay",
    "photograph",
    "probability_histogram",
    "render_page",
    "roc",
    "training_curves",
    "write_page",
]
