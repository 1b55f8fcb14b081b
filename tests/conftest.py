"""Fixtures for all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """Tests start from one seed, on one thread: many short kernels on few cores are slower with more."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
