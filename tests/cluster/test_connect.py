"""Starting, joining and leaving clusters."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from distributed import Client, LocalCluster

from tilestream.cluster import Job, connect, dashboard_link, run, tell


def test_nothing_listens_beyond_loopback(client: Client) -> None:
    driver = psutil.Process()
    family = [driver, *driver.children(recursive=True)]
    hosts = {
        connection.laddr.ip
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert hosts == {"127.0.0.1"}
    assert set(client.run(os.getpid).values()) <= {process.pid for process in family}, "workers are separate processes"


def test_the_dashboard_opens(client: Client) -> None:
    link = dashboard_link(client)
    assert link.startswith("http://127.0.0.1:")
    assert urlopen(link, timeout=10).status == 200


def test_setup_runs_once_in_every_worker_and_in_those_that_join_later(tmp_path: Path) -> None:
    def setup() -> None:
        with (tmp_path / str(os.getpid())).open("a") as file:
            file.write("x")

    def calls() -> dict[int, str]:
        return {int(path.name): path.read_text() for path in tmp_path.iterdir()}

    with connect(workers=1, threads=2, setup=[setup]) as client:
        assert calls() == dict.fromkeys(client.run(os.getpid).values(), "x")
        assert list(client.nthreads().values()) == [2]
        folder = Path(client.cluster.workers[0].local_directory)
        client.cluster.scale(2)
        client.wait_for_workers(2, timeout=20)
        assert calls() == dict.fromkeys(client.run(os.getpid).values(), "x")
        pids = list(calls())
        assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert folder.is_relative_to(tempfile.gettempdir())
    assert not folder.exists()


def test_what_setup_raises_is_raised_here(client: Client) -> None:
    def setup() -> None:
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"), connect(client.scheduler.address, setup=[setup]):
        pass


def test_joining_leaves_the_cluster_as_it_was(client: Client) -> None:
    def plugins(dask_scheduler) -> list[str]:  # type: ignore[no-untyped-def]
        return [name for name in dask_scheduler.worker_plugins if name.startswith("tilestream")]

    before = client.run_on_scheduler(plugins)
    with connect(client.scheduler.address, workers=2) as joined:
        assert joined.submit(int, "3").result() == 3
        assert dashboard_link(joined) == dashboard_link(client)
        assert len(client.run_on_scheduler(plugins)) == len(before) + 1
    assert client.run_on_scheduler(plugins) == before
    assert len(client.nthreads()) == 2


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:1",
        "127.0.0.1",
        "",
        "tcp://",
        "http://127.0.0.1:1",
        "127.0.0.1:port",
        "127.0.0.1:99999",
        "inproc://x",
    ],
)
def test_an_address_without_a_scheduler(address: str, dask_log: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    start_s = time.monotonic()
    with pytest.raises(ConnectionError, match="cannot be reached") as caught, connect(address, timeout_s=0.3):
        pass
    assert repr(address) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start_s < 5
    gc.collect()  # what is left of the failed client must not complain either
    assert dask_log == []
    assert capfd.readouterr() == ("", "")


def test_a_cluster_without_enough_workers() -> None:
    with (
        LocalCluster(n_workers=0, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None) as cluster,
        pytest.raises(ConnectionError, match=r"has 0 workers after 0.3 s, 1 are needed"),
        connect(cluster.scheduler_address, timeout_s=0.3),
    ):
        pass


def test_leaving_a_lost_scheduler_is_quick_and_quiet(dask_log: list[str]) -> None:
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    remote = subprocess.Popen(
        [*command, "--dashboard-address", "127.0.0.1:0"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert remote.stderr is not None
    address = next(line.split()[-1] for line in remote.stderr if "Scheduler at:" in line)
    worker = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", address, "--host", "127.0.0.1", "--no-nanny"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with connect(address, timeout_s=20) as client:
            jobs = [Job.call("first", int), Job.call("second", time.sleep, 0.5)]
            lost_s = time.monotonic()
            with pytest.raises(ConnectionError, match="the scheduler is gone"):
                run(jobs, client=client, window=2, on_result=lambda job, result: remote.kill())
            time.sleep(0.3)  # Dask tries to reconnect
        assert time.monotonic() - lost_s < 5
        assert dask_log == []
    finally:
        for process in (remote, worker):
            process.kill()
            process.wait()
        remote.stderr.close()


def test_what_is_told_when_the_cluster_is_gone_is_lost(client: Client) -> None:
    late = Client(client.scheduler.address, set_as_default=False)
    tell(late, "say", text="heard")
    late.close()
    tell(late, "say", text="lost")


@pytest.mark.parametrize("options", [{"workers": 0}, {"threads": 0}])
def test_bad_arguments(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="=0 must be at least 1"), connect(**options):
        pass


def test_workers_leave_ctrl_c_to_the_driver(client: Client) -> None:
    pids = client.run(os.getpid)
    for pid in pids.values():
        os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert client.run(os.getpid) == pids, "the same workers answer"


def test_ctrl_c_ends_quietly_and_leaves_no_process(tmp_path: Path) -> None:
    """The signal goes to the whole process group, as from a terminal."""
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, time\n"
        "from tilestream.cluster import Job, connect, run\n"
        # a shell's background job, as a CI may run us, starts with the signal ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        with connect(workers=2) as client:\n"
        "            say = lambda job, result: print('running', flush=True)\n"
        "            jobs = [Job.call('a', int), *(Job.call(str(i), time.sleep, 60) for i in range(3))]\n"
        "            run(jobs, client=client, window=4, on_result=say)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', flush=True)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-W", "error", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "running\n"
    children = psutil.Process(driver.pid).children(recursive=True)
    assert len(children) >= 2
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=60)
    assert (out, err, driver.returncode) == ("interrupted\n", "", 0)
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
