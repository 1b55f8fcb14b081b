"""Dask and nothing else: start or join a cluster, run reductions in a bounded window, show progress.

The package knows neither images nor torch: it is handed callables. A `Reduction` says how the parts of one image become
one result, a `Job` names it, and `run` keeps a window of jobs in flight on a client or on a local scheduler.
"""

from .connect import GPU, connect, dashboard_link, prepared, said_lost
from .progress import Progress, progress, tell
from .ranks import Rank, RankLost, run_ranks
from .reduction import Reduction, graph, tile_done
from .run import Job, Poison, run
from .security import LOOPBACK, Tls, check_place

__all__ = [
    "GPU",
    "LOOPBACK",
    "Job",
    "Poison",
    "Progress",
    "Rank",
    "RankLost",
    "Reduction",
    "Tls",
    "check_place",
    "connect",
    "dashboard_link",
    "graph",
    "prepared",
    "progress",
    "run",
    "run_ranks",
    "said_lost",
    "tell",
    "tile_done",
]
