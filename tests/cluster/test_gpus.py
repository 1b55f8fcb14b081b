"""What can be seen without a GPU of how workers with GPUs are used: a cluster of dask-cuda, by a stand-in for it."""

import sys
from types import ModuleType
from typing import Any

import pytest
from distributed import LocalCluster, get_worker

from tilestream.cluster import GPU, Job, connect, run


@pytest.fixture
def dask_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """LocalCUDACluster starts a process a GPU unless it is told how many; here, two."""

    def cluster(n_workers: int | None, **options: Any) -> LocalCluster:
        return LocalCluster(n_workers=n_workers or 2, **options)

    module = ModuleType("dask_cuda")
    module.LocalCUDACluster = cluster  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dask_cuda", module)


def test_tasks_take_a_gpu_each(dask_cuda: None) -> None:
    def offered() -> dict[str, float]:
        return dict(get_worker().state.total_resources)

    results: list[dict[str, float]] = []
    with connect(gpus=True, threads=4) as client:
        assert list(client.nthreads().values()) == [1, 1]
        jobs = [Job.call(f"image-{i}", offered) for i in range(4)]
        run(jobs, client=client, window=4, on_result=lambda job, found: results.append(found), resources={GPU: 1})
    assert results == [{GPU: 1.0}] * 4


def test_without_dask_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with pytest.raises(ValueError, match=r"device='cuda' needs dask-cuda.*pip install 'tilestream\[gpu\]'"):
        connect(gpus=True).__enter__()
