"""Who may listen where: loopback, or TLS."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import dask.config
from distributed import Client, Security

LOOPBACK = "127.0.0.1"
_FILES = {"ca_file": "tls_ca", "client.cert": "tls_cert", "client.key": "tls_key"}


@dataclass(frozen=True)
class Tls:
    """How connections are encrypted: by credentials made for a new cluster and forgotten with it, or by PEM files.

    Files that are not given are those of Dask's own configuration (`distributed.comm.tls`), if any.
    """

    temporary: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def security(self) -> Security | None:
        """Dask's form of it; None for none. ValueError names a file that is not given or not there."""
        given = {"tls_ca": self.ca, "tls_cert": self.cert, "tls_key": self.key}
        if self.temporary:
            if named := [name for name, path in given.items() if path]:
                raise ValueError(f"tls makes credentials of its own; leave out {', '.join(named)}, or tls")
            return _temporary()
        for key, name in _FILES.items():
            configured = dask.config.get(f"distributed.comm.tls.{key}", None)
            given[name] = given[name] or (Path(configured) if configured else None)
        if not any(given.values()):
            return None
        if lacking := [name for name, path in given.items() if path is None]:
            raise ValueError(f"{lacking[0]} is not given; TLS needs the three files tls_ca, tls_cert and tls_key")
        for name, path in given.items():
            if not Path(str(path)).is_file():
                raise FileNotFoundError(f"{name}={str(path)!r} is no file")
        ca, cert, key = map(str, given.values())
        roles = {f"tls_{role}_{part}": value for role in ("client", "scheduler", "worker")
                 for part, value in (("cert", cert), ("key", key))}  # fmt: skip
        return Security(tls_ca_file=ca, require_encryption=True, **roles)


def _temporary() -> Security:
    try:
        return Security.temporary()
    except ImportError:
        raise ValueError("tls needs the package 'cryptography'; pip install 'tilestream[tls]'") from None


def is_loopback(address: str) -> bool:
    """Whether an address, with or without protocol and port, stays on this machine."""
    if address.count(":") > 1 and not any(sign in address for sign in ("[", "://")):
        address = f"[{address}]"  # IPv6
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, security: Security | None) -> None:
    """ValueError where a new cluster would listen beyond this machine without encryption."""
    if not is_loopback(host) and security is None:
        raise ValueError(
            f"host={host!r} listens beyond this machine, unencrypted; add tls (or its three files), or use {LOOPBACK}"
        )


def check_address(scheduler: str, security: Security | None) -> None:
    """ValueError for a scheduler beyond this machine that would be spoken to in the clear, or TLS without its files."""
    protocol = urlsplit(scheduler).scheme if "://" in scheduler else "tcp"
    if protocol in ("tls", "wss"):
        if security is None:
            raise ValueError(f"scheduler={scheduler!r} speaks TLS; give tls_ca, tls_cert and tls_key")
    elif protocol in ("tcp", "ws", "ucx", "ucxx") and urlsplit(f"//{scheduler.split('://')[-1]}").hostname:
        if security is not None:
            raise ValueError(f"scheduler={scheduler!r} is not encrypted; with TLS files the address begins with tls://")
        if not is_loopback(scheduler):
            raise ValueError(
                f"scheduler={scheduler!r} is beyond this machine and not encrypted; start it with TLS and give its "
                "tls:// address, or reach it through a tunnel (ssh -L) on 127.0.0.1"
            )


def check_place(scheduler: str | None, host: str, tls: Tls) -> None:
    """ValueError, before anything is started, for what `connect` would refuse."""
    security = Security(require_encryption=True) if tls.temporary else tls.security()
    if scheduler is None:
        check_host(host, security)
    elif tls.temporary:
        raise ValueError("tls makes credentials for a new cluster; to join one give tls_ca, tls_cert and tls_key")
    else:
        check_address(scheduler, security)


def check_listeners(client: Client, say: Callable[[str], None]) -> None:
    """ValueError where a scheduler or worker that is joined speaks in the clear beyond its machine.

    A dashboard that others can reach is told by `say`: Dask's may be published on purpose, behind a proxy.
    """
    info = client.scheduler_info(n_workers=-1)
    for address in [info["address"], *info["workers"]]:
        if address.startswith(("tcp://", "ws://", "ucx")) and not is_loopback(address):
            raise ValueError(
                f"{address} of this cluster listens beyond its machine, unencrypted; start scheduler and workers with "
                f"--host {LOOPBACK}, or with TLS"
            )
    hosts = client.run_on_scheduler(_dashboard_hosts)
    if open_to := sorted({host for host in hosts if not is_loopback(host)}):
        say(f"cluster: the scheduler's dashboard listens on {', '.join(open_to)} without a password; "
            f"--dashboard-address {LOOPBACK}:8787 keeps it to its machine")  # fmt: skip


def _dashboard_hosts(dask_scheduler: object) -> list[str]:
    server = getattr(dask_scheduler, "http_server", None)
    return [socket.getsockname()[0] for socket in getattr(server, "_sockets", {}).values()]
