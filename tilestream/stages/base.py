"""What every stage has: a configuration that is checked, a context to run in, files it reads and writes."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from distributed import Client
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError
from rich.console import Console

from tilestream.cluster import GPU, LOOPBACK, Tls, check_place, connect, dashboard_link, said_lost
from tilestream.cluster.dashboard import install
from tilestream.store import Store, is_url


class StageConfig(BaseModel):
    """A stage's settings: a pydantic model whose field descriptions are the command line's help."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ClusterConfig(StageConfig):
    """Where tile tasks run. It changes results by `memory` (the tiles of a new run) and `threads` (last bits) alone."""

    scheduler: str | None = Field(None, description="address of a running Dask scheduler (default: a local cluster)")
    workers: int | None = Field(
        None, ge=1, description="worker processes (default: one a core); to join: how many to wait for"
    )
    threads: int = Field(1, ge=1, description="torch threads a worker; another number changes last bits")
    memory: ByteSize = Field(
        ByteSize(2 * 2**30), gt=0, description="budget of a tile task, like 800MiB (default: 2GiB)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where networks run; auto: GPUs that the workers offer, or those of this machine"
    )
    host: str = Field(LOOPBACK, description="address that a new cluster listens on; another needs TLS")
    tls: bool = Field(False, description="encrypt a new cluster's connections with credentials made for it")
    tls_ca: Path | None = Field(None, description="file of the authority, PEM, for TLS with permanent credentials")
    tls_cert: Path | None = Field(None, description="file of the certificate, PEM")
    tls_key: Path | None = Field(None, description="file of its key, PEM")
    start_timeout: float = Field(
        10,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="seconds to wait for a joined scheduler and its workers",
    )
    stall_timeout: float = Field(
        600, gt=0, le=1e6, allow_inf_nan=False, description="seconds without a tile done until workers are restarted"
    )
    as_json: bool = Field(False, description="progress and messages as JSON lines on standard output, for machines")

    @property
    def encryption(self) -> Tls:
        return Tls(self.tls, self.tls_ca, self.tls_cert, self.tls_key)


@dataclass
class Context:
    """One run: its folder, its store, its cluster (started when first asked for), and how to speak."""

    run: Path
    store_path: Path | str | None = None
    """A folder, or a URL like s3://bucket/prefix."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    models: Path | None = None
    """Folder with the models to use, where they are not this run's own."""
    resume: bool = False
    name: str = ""
    """The stage's name in its pipeline."""
    attempt: str = "0"
    page: str = ""
    """URL of the dashboard's page, once there is a cluster."""
    holding: bool = False
    """Whether this process holds the run's folder."""
    console: Console = field(default_factory=lambda: Console(stderr=True, soft_wrap=True))
    _stack: ExitStack = field(default_factory=ExitStack)
    _client: Client | None = None

    def __post_init__(self) -> None:
        """Absolute paths: workers of a cluster that is joined were started in folders of their own."""
        check_place(self.cluster.scheduler, self.cluster.host, self.cluster.encryption)
        if self.cluster.as_json:
            self.console = Console(soft_wrap=True)
        self.run = self.run.absolute()
        if self.store_path is not None:
            self.store_path = str(self.store_path) if is_url(self.store_path) else Path(self.store_path).absolute()
        self.models = self.models and self.models.absolute()

    @property
    def store(self) -> Store:
        if self.store_path is None:
            raise ValueError("this stage needs a store; give --store PATH")
        return Store(self.store_path)

    @property
    def models_path(self) -> Path:
        return self.models or self.run / "models"

    def client(self) -> Client:
        """The cluster of this run; started or joined once, closed with the context."""
        if self._client is None:
            asked = self.cluster
            self._client = self._stack.enter_context(
                connect(
                    asked.scheduler,
                    workers=asked.workers,
                    gpus=asked.scheduler is None and _wants_local_gpus(asked.device),
                    host=asked.host,
                    tls=asked.encryption,
                    setup=[partial(set_threads, asked.threads)],
                    say=self.say,
                    timeout_s=asked.start_timeout,
                )
            )
            try:
                self.page = show_page(self._client)
            except ImportError as error:
                self.page = dashboard_link(self._client)
                self.say(f"cluster: {error}")
            count = len(self.workers())
            self.say(f"cluster: {count} worker{'s' * (count != 1)}, dashboard {self.page}")
            self._record_address()
        return self._client

    @property
    def running(self) -> Client | None:
        """The cluster of this run, if it has been asked for by now."""
        return self._client

    def workers(self) -> dict[str, Any]:
        """What Dask knows of each worker, by address."""
        found: dict[str, Any] = self.client().scheduler_info(n_workers=-1)["workers"]
        return found

    @property
    def slots(self) -> int:
        """Tasks at a time, over all workers."""
        return sum(worker["nthreads"] for worker in self.workers().values())

    @property
    def device(self) -> str:
        """Where networks run: cuda, if workers offer GPUs as a resource and it is not declined, or cpu."""
        offered = any(worker["resources"].get(GPU) for worker in self.workers().values())
        if self.cluster.device == "cuda" and not offered:
            raise ValueError(f"device='cuda', but no worker offers a GPU; start them with --resources {GPU}=1")
        return "cuda" if offered and self.cluster.device != "cpu" else "cpu"

    @property
    def labels(self) -> dict[str, str]:
        """What tells this run from others on a cluster."""
        return {"run": str(self.run), "holder": holder()}

    def _record_address(self) -> None:
        """For `tilestream dashboard RUN`, while this run goes on."""
        path = self.run / "cluster.json"
        if self.holding:
            write_json(path, {"dashboard": self.page, "holder": holder()})
            self._stack.callback(path.unlink, missing_ok=True)

    def say(self, line: str) -> None:
        """One line for the person, or the machine, that watches."""
        text = json.dumps({"action": "say", "text": line}) if self.cluster.as_json else line
        self.console.print(text, highlight=False, markup=False, emoji=False)

    @property
    def partial_path(self) -> Path:
        """Folder of this stage's unfinished work; it goes when the stage is done.

        Its name is drawn anew when work starts afresh: a task of a killed run that still goes on, on a cluster that was
        joined, writes into a folder that is not there any more.
        """
        return self.run / "journal" / f"{self.name}.partial-{self.attempt}"

    def __enter__(self) -> Context:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._client = None
        self._stack.__exit__(kind, error, trace)
        if isinstance(error, OSError):
            with said_lost():
                raise error


def show_page(client: Client) -> str:
    """URL of the page on which runs are watched, which the scheduler has from now on; ImportError where it cannot."""
    install(client)
    return dashboard_link(client).removesuffix("status") + "tilestream"


def holder() -> str:
    """This process, as others are told of it."""
    return f"process {os.getpid()} on {platform.node()}"


def _wants_local_gpus(device: str) -> bool:
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def set_threads(count: int) -> None:
    """Sets torch's threads in a worker process: nannies start them with one, whatever the machine has."""
    torch.set_num_threads(count)


Paths = Callable[[Any, Context], Iterable[Path]]


@dataclass(frozen=True)
class Stage:
    """A step: `run(config, context)` makes what `writes` names from what `reads` names, and the store if it uses it."""

    verb: str
    config: type[StageConfig]
    run: Callable[[Any, Context], None]
    reads: Paths = lambda config, context: ()
    writes: Paths = lambda config, context: ()
    uses_store: bool = True
    operational: frozenset[str] = frozenset()
    """Fields of the configuration that do not change results."""
    may_grow: frozenset[str] = frozenset()
    """Fields that may change while unfinished work is kept: the epochs of a training that is resumed."""


def parse(model: type[StageConfig], values: Mapping[str, Any], where: str = "") -> Any:
    """A configuration from plain values; ValueError in one line, with the nearest known name for an unknown key."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError("; ".join(_explain(e, model, where) for e in error.errors())) from None


def _explain(error: Mapping[str, Any], model: type[BaseModel], where: str) -> str:
    name = ".".join(str(part) for part in error["loc"])
    full = f"{where}.{name}" if where and name else where or name
    if error["type"] == "extra_forbidden":
        return f"{full} is not known; {nearest(name, model.model_fields)}"
    return f"{full}={error['input']!r}: {error['msg'].removeprefix('Value error, ')}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A way out for a name that is not known."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path`, synced, when the block ends well; else nothing changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """JSON, whole or not at all; NaN is refused."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's names and files; "missing" where nothing is there."""
    if not path.exists():
        return "missing"
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    hashes = hashlib.sha256()
    for child in sorted(p for p in path.rglob("*") if p.is_file()):
        hashes.update(f"{child.relative_to(path)}\0{digest(child)}\n".encode())
    return hashes.hexdigest()
