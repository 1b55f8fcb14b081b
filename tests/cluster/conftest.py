"""A cluster for the tests of this folder, and the three ways to run a job."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client

from tilestream.cluster import connect


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    with connect(workers=2) as client:
        yield client


@pytest.fixture
def dask_log() -> Iterator[list[str]]:
    """What Dask logs from warnings up; its loggers do not propagate, so caplog sees nothing of it."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]  # those with handlers
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(params=["synchronous", "threads", "distributed"])
def scheduler(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Keyword arguments of `run`."""
    if request.param == "distributed":
        return {"client": request.getfixturevalue("client")}
    return {"scheduler": request.param}
