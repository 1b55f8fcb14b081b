"""Start a cluster on this machine, or join one, and set its workers up."""

import logging
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import dask
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Security, Worker, WorkerPlugin
from distributed.comm import CommClosedError

from .security import LOOPBACK, Tls, check_listeners, check_place

GPU = "GPU"
"""The resource that a worker with a GPU offers: a task on it takes one."""
WORKER_TTL = "60 s"
"""A worker of a new cluster that has not been heard of for so long (it is stopped, its machine is gone) is given up."""


class _Setup(WorkerPlugin):
    """Runs the callables in each worker process, those that join later (or are restarted) too."""

    def __init__(self, setup: Sequence[Callable[[], None]], ignore_interrupt: bool) -> None:
        self.callables = tuple(setup)
        self.ignore_interrupt = ignore_interrupt

    def setup(self, worker: Worker) -> None:
        # Ctrl-C reaches the whole process group; the driver alone answers it and then closes the workers in order.
        if self.ignore_interrupt and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        for call in self.callables:
            call()


@contextmanager
def connect(
    scheduler: str | None = None,
    *,
    workers: int | None = None,
    threads: int = 1,
    memory_limit: str | float | None = "auto",
    gpus: bool = False,
    host: str = LOOPBACK,
    tls: Tls = Tls(),  # noqa: B008, frozen
    setup: Sequence[Callable[[], None]] = (),
    say: Callable[[str], None] = print,
    timeout_s: float = 10.0,
) -> Iterator[Client]:
    """A client of a new cluster on this machine (`scheduler` None) or of the one at an address; closed on leaving.

    A new cluster has `workers` processes (default: one a core) with `threads` task threads each and `memory_limit`
    bytes (or "4 GiB"; "auto" shares the machine's memory out) a process. It listens on loopback, or on `host` if `tls`
    encrypts; its dashboard on loopback only; and its scratch folder goes with it. With `gpus` it is a LocalCUDACluster
    of dask-cuda, a process a GPU. Of a cluster that is joined, `workers` says for how many to wait (default 1),
    `threads` and `memory_limit` are its own affair, and leaving closes only the client; it is refused if it speaks in
    the clear beyond its machine, and `say` gets a warning if its dashboard does.

    An exception that leaves the context kills a new cluster's workers: their tasks are not waited for.

    `setup` runs once in every worker process before its first task, in those that join later too; the callables
    must pickle. Inside the context the client is Dask's current one.

    Raises ConnectionError when `timeout_s` seconds bring no scheduler at the address, or no workers; ValueError for
    fewer than one worker or thread, and for what would be neither on loopback nor encrypted. What a `setup` callable
    raises is raised here.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    check_place(scheduler, host, tls)
    security = tls.security()
    if scheduler is None:
        opened = _start(workers, threads, memory_limit, gpus, {"host": host, "security": security})
    else:
        opened = _join(scheduler, workers or 1, timeout_s, security, say)
    with opened as client, prepared(client, setup, ignore_interrupt=scheduler is None):
        yield client


@contextmanager
def prepared(client: Client, setup: Sequence[Callable[[], None]], *, ignore_interrupt: bool = False) -> Iterator[None]:
    """Runs callables in every worker process, before its next task, in those that join meanwhile too.

    What one of them raises is raised here.
    """
    name = f"tilestream-setup-{uuid.uuid4().hex}"
    with said_lost():
        client.register_plugin(_Setup(setup, ignore_interrupt=ignore_interrupt), name=name)
    try:
        yield
    finally:
        if client.status == "running":  # workers that join after we have left are not ours to set up
            with suppress(OSError, TimeoutError):
                client.unregister_worker_plugin(name)


@contextmanager
def said_lost() -> Iterator[None]:
    """ConnectionError, in one line, for the ways in which Dask says that a scheduler does not answer any more."""
    try:
        yield
    except (CommClosedError, TimeoutError):
        raise ConnectionError("the scheduler is gone; see its log, then run again") from None


def dashboard_link(client: Client) -> str:
    """The URL of the dashboard through loopback, as http://127.0.0.1:8787/status.

    For a scheduler on another machine it is the near end of a tunnel that keeps the port, such as `ssh -L`.
    """
    port = client.scheduler_info(n_workers=0)["services"]["dashboard"]
    link = urlsplit(client.dashboard_link)
    return f"{link.scheme}://{LOOPBACK}:{port}{link.path}"


@contextmanager
def _start(
    workers: int | None, threads: int, memory_limit: str | float | None, gpus: bool, place: dict[str, Any]
) -> Iterator[Client]:
    if workers is None and not gpus:
        workers = CPU_COUNT
    # left out, "auto" divides by the number of workers; handed over, by threads per core, which starves a lone worker
    limit = {} if memory_limit == "auto" else {"memory_limit": memory_limit}
    with (
        tempfile.TemporaryDirectory(prefix="tilestream-", ignore_cleanup_errors=True) as folder,
        dask.config.set({"distributed.scheduler.worker-ttl": WORKER_TTL}),
        ExitStack() as quiet,
        _kind(gpus)(
            n_workers=workers,
            threads_per_worker=1 if gpus else threads,
            dashboard_address=f"{LOOPBACK}:0",
            local_directory=folder,
            **place,
            **limit,
        ) as cluster,
        Client(cluster, set_as_default=False, security=place["security"]) as client,
    ):
        try:
            yield client
        except BaseException:
            # Nothing but the end of its process stops a task, and Dask would wait seconds for it and log its regret.
            _silence(quiet)
            for nanny in cluster.workers.values():
                nanny.auto_restart = False
                if nanny.pid is not None:
                    os.kill(nanny.pid, signal.SIGKILL)
            raise


def _kind(gpus: bool) -> Callable[..., LocalCluster]:
    if not gpus:
        return LocalCluster  # type: ignore[no-any-return]
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError:
        raise ValueError("device='cuda' needs dask-cuda for a cluster on this machine; pip install 'tilestream[gpu]', "
                         "or device='cpu'") from None  # fmt: skip
    return partial(LocalCUDACluster, resources={GPU: 1})


@contextmanager
def _join(
    scheduler: str, workers: int, timeout_s: float, security: Security | None, say: Callable[[str], None]
) -> Iterator[Client]:
    with ExitStack() as quiet, _reach(scheduler, timeout_s, security) as client:
        with said_lost():
            _wait_for_workers(client, scheduler, workers, timeout_s)
            check_listeners(client, say)
        try:
            yield client
        finally:
            if client.status != "running":  # the scheduler is lost, which `run` has said
                _silence(quiet)


def _reach(scheduler: str, timeout_s: float, security: Security | None) -> Client:
    try:
        return Client(scheduler, timeout=timeout_s, set_as_default=False, security=security)
    except Exception as error:  # a bad address raises ValueError, a missing transport ImportError, a silence OSError
        reason = str(error).partition("\n")[0]
    raise ConnectionError(
        f"scheduler={scheduler!r} cannot be reached ({reason}); give the address that `dask scheduler` printed, "
        f"as tcp://host:8786, or none to start a cluster on this machine"
    )


def _wait_for_workers(client: Client, scheduler: str, workers: int, timeout_s: float) -> None:
    with suppress(TimeoutError):
        client.wait_for_workers(workers, timeout=timeout_s)
        return
    found = len(client.scheduler_info(n_workers=-1)["workers"])
    raise ConnectionError(
        f"scheduler={scheduler!r} has {found} workers after {timeout_s:g} s, {workers} are needed; "
        f"start more with `dask worker {scheduler}`"
    )


def _silence(stack: ExitStack) -> None:
    """No logging until the stack unwinds: Dask logs what it meets while it closes in disorder."""
    stack.callback(logging.disable, logging.root.manager.disable)
    logging.disable(logging.CRITICAL)
