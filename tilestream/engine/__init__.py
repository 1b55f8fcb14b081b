"""The exact engine: a traced network, run tile by tile, with the results of the un-tiled pass.

It knows neither Zarr nor Dask: images are anything with a shape and windows to read, and each step of a pass is a
function that a caller may run anywhere.
"""

from .planner import parse_bytes, plan
from .reductions import Partial
from .saliency import METHODS, REDUCES, Peak, Reduce, Saliency, SaliencyPass, highest, highest_of
from .stream import Streamed, stream
from .tile import Source
from .trace import Network, trace

__all__ = [
    "METHODS", "REDUCES", "Network", "Partial", "Peak", "Reduce", "Saliency", "SaliencyPass", "Source", "Streamed",
    "highest", "highest_of", "parse_bytes", "plan", "stream", "trace",
]  # fmt: skip
