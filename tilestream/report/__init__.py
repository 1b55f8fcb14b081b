"""What a run leaves for people to look at: pictures and charts as bytes, and one self-contained HTML page.

Values in, bytes or one file out: arrays reduced to display size by the caller, no store, no network, no clock. It
imports nothing else of ours.
"""

from tilestream.report.charts import (
    Curve,
    Rates,
    confusion,
    lines,
    precision_recall,
    probability_histogram,
    rates,
    reliability,
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
from tilestream.report.pictures import frame, outlined, overlay, photograph

__all__ = [
    "Card",
    "Code",
    "Curve",
    "Gallery",
    "KeyFigures",
    "Picture",
    "Rates",
    "Section",
    "Table",
    "as_text",
    "confusion",
    "frame",
    "lines",
    "outlined",
    "overlay",
    "photograph",
    "precision_recall",
    "probability_histogram",
    "rates",
    "reliability",
    "render_page",
    "roc",
    "training_curves",
    "write_page",
]
