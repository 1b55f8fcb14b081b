"""Dask and nothing else: start or join a cluster, run reductions in a bounded window, show progress.

The package knows neither images nor torch: it is handed callables. A `Reduction` says how the parts of one image become
one result, a `Job` names it, and `run` keeps a window of jobs in flight on a client or on a local scheduler.
"""

from .connect import connect, dashboard_link
from .progress import Progress, progress
from .reduction import Reduction, graph
from .run import Job, run

__all__ = ["Job", "Progress", "Reduction", "connect", "dashboard_link", "graph", "progress", "run"]
