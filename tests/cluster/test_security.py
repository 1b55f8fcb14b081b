"""Loopback or TLS: what is refused, what listens, who is turned away."""

import datetime
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from distributed import Client

from tilestream.cluster import Job, Tls, connect, run
from tilestream.cluster.security import check_address, check_listeners, is_loopback

PLAIN = "is beyond this machine and not encrypted; start it with TLS"


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """An authority and one certificate, as files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    folder, now = tmp_path_factory.mktemp("tls"), datetime.datetime.now(datetime.UTC)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tilestream test")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
    return Tls(ca=folder / "cert.pem", cert=folder / "cert.pem", key=folder / "key.pem")


@pytest.mark.parametrize("kind", ["temporary", "files"])
def test_encrypted_clusters_work_and_turn_plaintext_away(kind: str, credentials: Tls) -> None:
    with connect(workers=1, tls=Tls(temporary=True) if kind == "temporary" else credentials) as client:
        address = client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        results: list[int] = []
        run([Job.call("one", int, "3")], client=client, window=1, on_result=lambda job, value: results.append(value))
        assert results == [3]
        assert all(worker.startswith("tls://") for worker in client.scheduler_info(n_workers=-1)["workers"])
        plain = address.replace("tls://", "tcp://")
        with pytest.raises(OSError, match=r"(?i)timed out|closed|ssl|tls"):
            Client(plain, timeout=1, set_as_default=False)
        with pytest.raises(ValueError, match="speaks TLS; give tls_ca, tls_cert and tls_key"), connect(address):
            pass
        if kind == "files":
            with connect(address, tls=credentials) as joined:
                assert joined.submit(int, "4").result() == 4
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = [c for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("tcp://127.0.0.1:8786", True), ("localhost:8786", True), ("[::1]:8786", True), ("127.9.9.9", True),
        ("::1", True), ("2001:db8::1", False),
        ("tcp://10.0.0.5:8786", False), ("0.0.0.0", False), ("host:8786", False), ("[::]:1", False), ("", False),
    ],
)  # fmt: skip
def test_what_stays_on_this_machine(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


@pytest.mark.parametrize(
    "call",
    [
        lambda: connect("tcp://10.0.0.5:8786"),
        lambda: connect("10.0.0.5:8786"),
        lambda: connect("ws://gpu.example:8786"),
        lambda: connect("ucx://gpu.example:8786"),
    ],
)
def test_the_clear_beyond_this_machine_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=PLAIN), call():
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.5", "::"])
def test_a_new_cluster_listens_on_loopback_or_encrypts(host: str) -> None:
    with pytest.raises(ValueError, match=f"host='{host}' listens beyond this machine, unencrypted"), connect(host=host):
        pass


def test_files_that_are_not_given_or_not_there(tmp_path: Path, credentials: Tls) -> None:
    with pytest.raises(ValueError, match="tls_key is not given"):
        Tls(ca=credentials.ca, cert=credentials.cert).security()
    with pytest.raises(FileNotFoundError, match=r"tls_ca='.*none.pem' is no file"):
        Tls(ca=tmp_path / "none.pem", cert=credentials.cert, key=credentials.key).security()
    with pytest.raises(ValueError, match="leave out tls_ca"):
        Tls(temporary=True, ca=credentials.ca).security()
    with pytest.raises(ValueError, match="tls makes credentials for a new cluster"):
        connect("tls://127.0.0.1:1", tls=Tls(temporary=True)).__enter__()
    with pytest.raises(ValueError, match="is not encrypted; with TLS files the address begins with tls://"):
        check_address("tcp://127.0.0.1:1", credentials.security())


def test_dasks_own_configuration_is_heard(credentials: Tls) -> None:
    import dask

    keys = {"ca-file": credentials.ca, "client.cert": credentials.cert, "client.key": credentials.key}
    with dask.config.set({f"distributed.comm.tls.{name}": str(path) for name, path in keys.items()}):
        security = Tls().security()
    assert security is not None
    assert security.tls_client_cert == str(credentials.cert)


def joined(address: str, workers: list[str], dashboards: list[str]) -> Any:
    """A client of a cluster that listens there, as far as it is asked."""
    return SimpleNamespace(
        scheduler_info=lambda n_workers: {"address": address, "workers": dict.fromkeys(workers)},
        run_on_scheduler=lambda function: dashboards,
    )


def test_a_cluster_that_others_can_reach_in_the_clear_is_refused() -> None:
    said: list[str] = []
    check_listeners(joined("tcp://127.0.0.1:1", ["tcp://127.0.0.1:2"], ["127.0.0.1"]), said.append)
    check_listeners(joined("tls://10.0.0.5:1", ["tls://10.0.0.6:2"], ["127.0.0.1"]), said.append)
    assert said == []
    for scheduler, worker in (("tcp://10.0.0.5:1", "tcp://127.0.0.1:2"), ("tcp://127.0.0.1:1", "tcp://10.0.0.6:2")):
        with pytest.raises(ValueError, match=r"tcp://10.0.0.\d:\d of this cluster listens beyond its machine"):
            check_listeners(joined(scheduler, [worker], []), said.append)
    check_listeners(joined("tcp://127.0.0.1:1", [], ["0.0.0.0", "::"]), said.append)
    assert said == [
        "cluster: the scheduler's dashboard listens on 0.0.0.0, :: without a password; "
        "--dashboard-address 127.0.0.1:8787 keeps it to its machine"
    ]
