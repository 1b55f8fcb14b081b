"""Where the dashboard of a run, or of a cluster, is to be looked at."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.request import urlopen

from tilestream.cluster import connect

from .base import ClusterConfig, show_page

ANSWER_S = 5.0


def page_of(run: Path | None, cluster: ClusterConfig) -> str:
    """The URL of the page /tilestream: of a run that goes on, or of the cluster at `cluster.scheduler`.

    Raises ValueError where neither or both are given, where no run goes on, or where its dashboard does not answer.
    """
    if (run is None) == (cluster.scheduler is None):
        raise ValueError("give the folder of a run that goes on, or --scheduler ADDRESS")
    if run is None:
        with connect(cluster.scheduler, tls=cluster.encryption, say=lambda line: None) as client:
            return show_page(client)
    try:
        link = str(json.loads((run / "cluster.json").read_text())["dashboard"])
        if not link.startswith("http://127.0.0.1:"):
            raise ValueError(link)
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"no run with a cluster goes on in {str(run)!r}; start one with --out {run}") from None
    try:
        urlopen(link, timeout=ANSWER_S).close()
    except OSError as error:
        raise ValueError(f"{link}, the dashboard of {str(run)!r}, does not answer ({error}): it was killed") from None
    return link
