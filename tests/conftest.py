"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tilestream.cluster import connect

# a machine that is busy with other work is no fault of the code's
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _seeded():
    """Tests start from one seed, on one thread: many short kernels on few cores are slower with more."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Address of a scheduler with two workers, which runs join: starting a cluster for each would take longer."""
    with connect(workers=2) as client:
        yield client.cluster.scheduler_address
