"""The progress page: its numbers, its bounds, and the page itself in a real browser."""

import asyncio
import base64
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from distributed import Client, LocalCluster
from tornado.websocket import websocket_connect

from tilestream.cluster import Job, connect, dashboard, dashboard_link, run
from tilestream.cluster.progress import TOPIC

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STATE = {
    "action": "state",
    "run": "/runs/a",
    "holder": "process 1 on here",
    "stage": "saliency",
    "unit": "photographs",
    "images": 3,
    "total_images": 12,
    "failed": 1,
    "tiles": 30,
    "total_tiles": 120,
    "megapixels": 7.5,
    "elapsed_s": 10.0,
    "left_s": 30.0,
    "ended": False,
}


def _png() -> bytes:
    """Black, 4 x 3 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(3 * 5))) + chunk(b"IEND", b"")


PICTURE = {
    "action": "picture",
    "run": "/runs/a",
    "stage": "saliency",
    "id": "13_left",
    "png": base64.b64encode(_png()).decode(),
    "crop": [0.25, 0.5, 0.75, 1.0],
    "value": -0.5,
}


def _quarantine(name: str, run: str = "/runs/a", reason: str = "no retina") -> dict[str, str]:
    return {"action": "quarantine", "run": run, "stage": "ingest", "id": name, "reason": reason}


@contextmanager
def _cluster(**options: Any) -> Iterator[Client]:
    """A scheduler in this process, without workers."""
    with (
        LocalCluster(
            n_workers=0, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0", **options
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def empty() -> Iterator[Client]:
    with _cluster() as client:
        dashboard.install(client)
        yield client


def _plugin(client: Client) -> Any:
    return client.cluster.scheduler.plugins["tilestream"]


def _get(client: Client, path: str) -> bytes:
    with urlopen(dashboard_link(client).removesuffix("status") + path, timeout=10) as answer:
        return bytes(answer.read())


def _json(client: Client) -> dict[str, Any]:
    found = json.loads(_get(client, "tilestream.json"), parse_constant=pytest.fail)
    assert isinstance(found, dict)
    return found


def _counters(client: Client) -> dict[str, float]:
    lines = [line for line in _get(client, "metrics").decode().splitlines() if line.startswith("tilestream_")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def _wait_until(condition: Callable[[], Any], limit_s: float = 15.0) -> bool:
    end_s = time.monotonic() + limit_s
    while not (held := bool(condition())) and time.monotonic() < end_s:
        time.sleep(0.1)
    return held


def test_nothing_yet(empty: Client) -> None:
    found = _json(empty)
    assert (found["version"], found["runs"], found["workers"], found["tiles"]) == (1, [], [], 0)
    assert b"No run yet" in _get(empty, "tilestream")
    assert _counters(empty) == {}


def test_what_the_driver_says_is_there_for_machines(empty: Client) -> None:
    for message in (STATE, _quarantine("10_left"), _quarantine("11_left"), _quarantine("10_left", reason="blurred")):
        empty.log_event(TOPIC, dict(message))
    found = _json(empty)
    [state] = found["runs"]
    assert {**state, "action": "state"}.items() >= STATE.items()
    assert (state["live"], state["fraction"], state["quarantined"], state["picture"]) == (True, 0.25, 2, None)
    assert state["quarantine"] == [
        {"stage": "ingest", "id": "10_left", "reason": "blurred"},
        {"stage": "ingest", "id": "11_left", "reason": "no retina"},
    ]
    assert found["malformed"] == 0


@pytest.mark.parametrize(
    ("change", "fraction"),
    [
        ({"total_tiles": None}, 0.25),
        ({"total_tiles": None, "total_images": None}, None),
        ({"total_tiles": None, "total_images": 0}, 1.0),
        ({"total_tiles": 15}, 1.0),
    ],
)
def test_the_part_done(empty: Client, change: dict[str, Any], fraction: float | None) -> None:
    empty.log_event(TOPIC, {**STATE, **change})
    assert _json(empty)["runs"][0]["fraction"] == fraction


def test_the_picture_is_served_and_kept_nowhere_else(empty: Client) -> None:
    empty.log_event(TOPIC, dict(PICTURE))
    first = _json(empty)["runs"][0]["picture"]
    assert {**first, "url": None} == {
        "stage": "saliency",
        "id": "13_left",
        "value": -0.5,
        "crop": [0.25, 0.5, 0.75, 1.0],
        "url": None,
    }
    assert _get(empty, first["url"]) == _png()
    empty.log_event(TOPIC, {**PICTURE, "id": "13_right"})
    assert _get(empty, _json(empty)["runs"][0]["picture"]["url"]) == _png()
    with pytest.raises(HTTPError, match="404") as caught:
        _get(empty, first["url"])
    caught.value.close()
    assert "png" not in str(empty.get_events(TOPIC))


def test_installing_again_keeps_what_is_there(empty: Client) -> None:
    empty.log_event(TOPIC, dict(STATE))
    dashboard.install(empty)
    dashboard.dask_setup(empty.cluster.scheduler)
    assert len(_json(empty)["runs"]) == 1
    for page in ("status", "workers", "tilestream"):
        assert _get(empty, page).count(b'<a href="tilestream">Tilestream</a>') == 1, page
    assert b'<a href="status">Status</a>' in _get(empty, "tilestream")


def test_it_can_be_taken_away_and_put_back(empty: Client) -> None:
    empty.unregister_scheduler_plugin("tilestream")
    with pytest.raises(HTTPError, match="404") as caught:
        _get(empty, "tilestream.json")
    caught.value.close()
    assert _counters(empty) == {}
    dashboard.install(empty)
    assert _json(empty)["runs"] == []


@pytest.mark.parametrize(("options", "prefix"), [({"dashboard": False}, ""), ({"http_prefix": "/lab/7"}, "lab/7/")])
def test_without_dasks_dashboard_and_behind_a_prefix(options: dict[str, Any], prefix: str) -> None:
    with _cluster(scheduler_kwargs=options) as client:
        dashboard.install(client)
        for name in ("tilestream", "tilestream.json", "statics/css/base.css"):
            assert _get(client, prefix + name), name


def test_counters_are_the_schedulers_own_and_never_fall(empty: Client) -> None:
    """Two schedulers in a process share Dask's one collector."""

    def tell(**fields: Any) -> None:
        empty.log_event(TOPIC, {**STATE, **fields})

    with _cluster() as other:
        dashboard.install(other)
        other.log_event(TOPIC, {**STATE, "images": 70})
        tell()
        tell(tiles=28)  # a worker has died
        tell(tiles=31, images=4, megapixels=9.5)
        assert _counters(other)['tilestream_images_total{stage="saliency"}'] == 70
        saliency = {"images": 4, "tiles": 31, "megapixels": 9.5, "failed": 1, "quarantined": 0}
        expected = {f'tilestream_{name}_total{{stage="saliency"}}': value for name, value in saliency.items()}
        assert _counters(empty) == expected
    tell(holder="process 2 on here", images=2)  # resumed: it counts from nothing
    tell(holder="process 2 on here", images=2, ended=True)
    tell(holder="process 2 on here", images=1)  # the same stage once more
    tell(run="/runs/b", images=10)
    tell(stage='a "stage"\n', images=5)
    empty.log_event(TOPIC, _quarantine("10_left"))
    empty.log_event(TOPIC, _quarantine("10_left"))
    found = _counters(empty)
    assert found['tilestream_images_total{stage="saliency"}'] == 4 + 2 + 1 + 10
    assert found['tilestream_images_total{stage="a \\"stage\\"\\n"}'] == 5
    assert found['tilestream_quarantined_total{stage="ingest"}'] == 1


MALFORMED: list[Any] = [
    "text",
    None,
    [],
    {},
    {"action": "dance"},
    {"action": ["state"]},
    {"action": "tick", "token": "a", "megapixels": 1.0},  # of no worker
    {"action": "tick", "worker": "tcp://nobody:1", "megapixels": 1.0},
    {"action": "state", "run": "/runs/a"},
    *({**STATE, name: None} for name in STATE if name not in ("total_images", "total_tiles", "left_s")),
    {**STATE, "images": -1},
    {**STATE, "images": 10**30},
    {**STATE, "images": True},
    {**STATE, "megapixels": float("nan")},
    {**STATE, "left_s": float("inf")},
    {**STATE, "run": 5},
    {**PICTURE, "png": "<svg onload=alert(1)>"},
    {**PICTURE, "png": base64.b64encode(b"<svg onload=alert(1)>").decode()},
    {**PICTURE, "png": base64.b64encode(_png() + bytes(1 << 21)).decode()},
    {**PICTURE, "png": None},
    {**PICTURE, "crop": [0.5, 0.0, 0.25, 1.0]},
    {**PICTURE, "crop": [0.0, 0.0, 1.0, 1.5]},
    {**PICTURE, "crop": [0.0, 0.0, 1.0]},
    {**PICTURE, "value": float("nan")},
    {"action": "quarantine", "run": "/runs/a", "stage": "ingest", "id": 4, "reason": "no"},
]


def test_malformed_messages_change_nothing_but_their_count(empty: Client) -> None:
    plugin = _plugin(empty)
    for number, message in enumerate(MALFORMED, start=1):
        plugin.log_event(TOPIC, dict(message) if isinstance(message, dict) else message)
        assert plugin.malformed == number, message
    plugin.log_event("all", {"action": "state"})  # another topic
    found = _json(empty)
    assert (found["malformed"], found["runs"], plugin.totals) == (len(MALFORMED), [], {})


def test_what_is_kept_is_bounded(empty: Client) -> None:
    plugin = _plugin(empty)
    for number in range(500):
        plugin.log_event(TOPIC, {**STATE, "run": f"/runs/{number}", "stage": f"stage {number}", "holder": "x" * 10**5})
        plugin.log_event(TOPIC, {**PICTURE, "run": f"/runs/{number}"})
    for number in range(5000):
        plugin.log_event(TOPIC, _quarantine(f"{number}", "/runs/499", "y" * 10**4))
    found = _json(empty)
    assert [state["run"] for state in found["runs"]] == [f"/runs/{number}" for number in range(499, 491, -1)]
    assert found["runs"][0]["quarantined"] == 5000
    assert [entry["id"] for entry in found["runs"][0]["quarantine"]] == [f"{i}" for i in range(4999, 4799, -1)]
    assert len(_get(empty, "tilestream.json")) < 300_000
    assert len(plugin.totals) <= 65
    assert sum(value for name, value in _counters(empty).items() if "images" in name) == 500 * 3


def test_rates_are_of_the_last_half_minute(empty: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(dashboard, "monotonic", lambda: now_s)
    plugin = _plugin(empty)
    for second in range(101):
        now_s = 1000.0 + second
        tiles = 100 + 4 * second  # the first hundred were done before we came
        plugin.log_event(TOPIC, {**STATE, "tiles": tiles, "megapixels": tiles / 2, "elapsed_s": 50.0 + second})
        if second in (10, 100):
            [state] = plugin.json()["runs"]
            assert (state["tiles_per_s"], state["megapixels_per_s"]) == (4, 2)
    assert len(next(iter(plugin.runs.values())).rate.seconds) <= 30
    for quiet_s, rate, live in ((10, 4 * 2 / 3, True), (40, 0, False)):
        now_s = 1100.0 + quiet_s
        [state] = plugin.json()["runs"]
        assert (state["tiles_per_s"], state["quiet_s"], state["live"]) == (pytest.approx(rate), quiet_s, live)
    plugin.log_event(TOPIC, {**STATE, "tiles": 600, "elapsed_s": 150.0, "ended": True})
    [state] = plugin.json()["runs"]
    assert (state["tiles_per_s"], state["live"]) == (4, False), "the mean of all of it"


def test_workers_are_seen_working_and_leaving() -> None:
    with connect(workers=2) as client:
        dashboard.install(client)
        jobs = [Job.call(f"image-{i}", time.sleep, 0.05, size=2.0) for i in range(30)]
        run(jobs, client=client, window=8, on_result=lambda job, result: None)
        assert _wait_until(lambda: _json(client)["tiles"] == 30)
        found = _json(client)
        assert found["megapixels"] == pytest.approx(60)
        assert found["tiles_per_s"] > 1
        workers = {worker["address"]: worker for worker in found["workers"]}
        assert workers.keys() == client.nthreads().keys()
        assert sum(worker["tiles"] for worker in workers.values()) == 30
        for worker in workers.values():
            assert worker["tiles"] > 0
            assert worker["state"] == "running"
            assert 1 << 20 < worker["memory_bytes"] < worker["memory_limit_bytes"]
            assert 0 <= worker["seen_s"] < 10
        address, pid = next(iter(client.run(os.getpid).items()))
        os.kill(pid, signal.SIGKILL)

        def states() -> dict[str, str]:
            return {worker["address"]: worker["state"] for worker in _json(client)["workers"]}

        assert _wait_until(lambda: len(states()) == 3), "the dead one and the one that replaces it"
        assert states()[address] == "gone"
        assert _json(client)["tiles"] == 30
        plugin = _plugin(client)
        plugin.gone[address] -= 100.0
        assert address not in states()


@contextmanager
def _process(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file, subprocess.Popen([sys.executable, *command], stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def _scheduler(folder: Path, *options: str, code: str = "", port: int = 0) -> Iterator[tuple[Any, str, str]]:
    """A `dask scheduler` of its own: its process, its address and its dashboard's."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    start = f"{code}\nfrom distributed.cli.dask_scheduler import main; main()"
    where = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", f"127.0.0.1:{port}"]
    command = ["-c", start, *where, "--scheduler-file", str(file), *options]
    with _process(*command, log=folder / "scheduler.log") as process:
        assert _wait_until(lambda: file.exists() and file.read_text().endswith("}"), 30), (
            folder / "scheduler.log"
        ).read_text()
        identity = json.loads(file.read_text())
        yield process, identity["address"], f"http://127.0.0.1:{identity['services']['dashboard']}/"


@contextmanager
def _workers(address: str, folder: Path, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    command = ["-m", "distributed.cli.dask_worker", address, "--host", "127.0.0.1", "--no-nanny", "--nthreads", "1"]
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                _process(*command, "--local-directory", str(folder / str(i)), log=folder / f"worker-{i}.log")
            )
            for i in range(count)
        ]


@pytest.mark.parametrize("how", ["preload", "plugin"])
def test_on_a_real_scheduler(how: str, tmp_path: Path) -> None:
    options = ["--preload", "tilestream.cluster.dashboard"] if how == "preload" else []
    with (
        _scheduler(tmp_path, *options) as (_, address, _),
        _workers(address, tmp_path, 1),
        connect(address, timeout_s=30) as client,
    ):
        assert _counters(client) == {}  # before the plugin is there, too
        if how == "plugin":
            dashboard.install(client)
        client.log_event(TOPIC, dict(STATE))
        dashboard.install(client)
        jobs = [Job.call(f"image-{i}", int) for i in range(5)]
        run(jobs, client=client, window=2, on_result=lambda job, result: None)
        assert _wait_until(lambda: _json(client)["tiles"] == 5)
        [worker] = _json(client)["workers"]
        assert worker["tiles"] == 5
        assert _json(client)["runs"][0]["tiles"] == 30
        assert _counters(client)['tilestream_tiles_total{stage="saliency"}'] == 30
        assert b'<a href="tilestream">' in _get(client, "status")


def test_a_scheduler_without_tilestream_is_one_error(tmp_path: Path) -> None:
    with (
        _scheduler(tmp_path, code="import sys; sys.modules['tilestream'] = None") as (_, address, _),
        Client(address, timeout=30, set_as_default=False) as client,
    ):
        with pytest.raises(ImportError, match=r"has no page 'tilestream' \(.*install this version") as caught:
            dashboard.install(client)
        assert "\n" not in str(caught.value)
        assert client.scheduler_info(n_workers=0)["type"] == "Scheduler", "it goes on"


class _Browser:
    """One page of a headless Chromium, over its DevTools protocol."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.loop, self.serial = folder, asyncio.new_event_loop(), 0
        self.socket: Any = None

    def call(self, method: str, **params: Any) -> Any:
        async def exchange() -> Any:
            self.serial += 1
            await self.socket.write_message(json.dumps({"id": self.serial, "method": method, "params": params}))
            while True:
                answer = json.loads(await self.socket.read_message())
                if answer.get("id") == self.serial:
                    return answer["result"]

        return self.loop.run_until_complete(asyncio.wait_for(exchange(), 20))

    def value(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.value(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def number(self, name: str) -> int:
        """A big number of the first run."""
        pairs = self.value("[...document.querySelectorAll('.numbers div')].map(it => it.innerText.split('\\n'))")
        return next(int(value.split(" ")[0].replace(",", "")) for label, value, *_ in pairs if label == name)


@contextmanager
def _browser(folder: Path, url: str) -> Iterator[_Browser]:
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-proxy-server"),
        *("--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}"),
    ]
    assert CHROMIUM is not None
    with ExitStack() as stack:
        browser = _Browser(folder)
        stack.callback(browser.loop.close)
        log = stack.enter_context((folder / "chromium.log").open("wb"))
        process = stack.enter_context(
            subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=log, stderr=log, start_new_session=True)
        )
        stack.callback(lambda: os.killpg(process.pid, signal.SIGKILL))
        port = folder / "profile" / "DevToolsActivePort"
        assert _wait_until(lambda: port.exists() and port.read_text(), 30)
        address = f"http://127.0.0.1:{port.read_text().split()[0]}/json/new?{url}"
        with urlopen(Request(address, method="PUT"), timeout=20) as answer:
            target = json.loads(answer.read())["webSocketDebuggerUrl"]

        async def open_socket() -> Any:
            return await websocket_connect(target, connect_timeout=20)

        browser.socket = browser.loop.run_until_complete(open_socket())
        yield browser
        browser.socket.close()
        browser.loop.run_until_complete(asyncio.sleep(0.1))


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")


@pytest.mark.slow
@needs_chromium
def test_names_are_text_in_the_page(empty: Client, tmp_path: Path) -> None:
    evil = "<img src=x onerror='window.hacked = 1'></script><script>window.hacked = 1</script>\"'"
    texts = ("run", "holder", "stage", "unit")
    empty.log_event(TOPIC, {**STATE, **dict.fromkeys(texts, evil)})
    empty.log_event(TOPIC, _quarantine(evil, evil, evil))
    empty.log_event(TOPIC, {**PICTURE, "run": evil, "id": evil})
    with _browser(tmp_path, dashboard_link(empty).replace("status", "tilestream")) as browser:
        assert _wait_until(lambda: browser.text("figcaption"))
        assert _wait_until(lambda: browser.value("document.querySelector('figure img').naturalWidth") == 4)
        time.sleep(1.5)
        assert browser.value("window.hacked ?? null") is None
        assert browser.value("document.querySelectorAll('#tilestream img').length") == 1
        for selector in ("[data-of=title]", ".quarantine td", "figcaption", "[data-of=where]"):
            assert evil in browser.text(selector), selector
        frame, image = (
            browser.value(f"JSON.parse(JSON.stringify(document.querySelector('{it}').getBoundingClientRect()))")
            for it in ("figure span", "figure img")
        )
        y0, x0, y1, x1 = PICTURE["crop"]
        assert frame["top"] - image["top"] == pytest.approx(y0 * image["height"], abs=1)
        assert frame["left"] - image["left"] == pytest.approx(x0 * image["width"], abs=1)
        assert frame["height"] == pytest.approx((y1 - y0) * image["height"], abs=1)
        assert frame["width"] == pytest.approx((x1 - x0) * image["width"], abs=1)
        hosts = browser.value("[...new Set(performance.getEntriesByType('resource').map(it => new URL(it.name).host))]")
        assert hosts == [browser.value("location.host")], "nothing comes from elsewhere"


@pytest.mark.slow
@needs_chromium
def test_the_open_page_lives_through_deaths(tmp_path: Path) -> None:
    """One page, never loaded again: numbers move, a worker is killed, the run ends, the scheduler dies and returns."""
    preload = ["--preload", "tilestream.cluster.dashboard"]
    with ExitStack() as later:
        with (
            _scheduler(tmp_path, *preload) as (scheduler, address, url),
            _workers(address, tmp_path, 2) as workers,
            connect(address, workers=2, timeout_s=30) as client,
        ):
            browser = later.enter_context(_browser(tmp_path, f"{url}tilestream"))
            assert _wait_until(lambda: browser.text("#word") == "No run yet, 2 workers")
            browser.value("window.mark = 1")
            done = 0

            def count(job: Job, result: Any) -> None:
                nonlocal done
                done += 1
                if done % 5 == 0 or done == 150:
                    counts = {"images": done, "tiles": done, "megapixels": float(done), "ended": done == 150}
                    client.log_event(TOPIC, {**STATE, **counts, "total_images": 150, "total_tiles": 150})

            jobs = [Job.call(f"image-{i}", time.sleep, 0.1, size=1.0) for i in range(150)]
            runner = threading.Thread(
                target=run, args=(jobs,), kwargs={"client": client, "window": 6, "on_result": count}
            )
            runner.start()
            assert _wait_until(lambda: browser.text(".numbers") and browser.number("photographs") >= 10)
            assert browser.text(".badge") == "running"
            assert browser.text("#workers tbody").count("running") == 2
            first = browser.number("tiles")
            assert _wait_until(lambda: browser.number("tiles") > first)
            now = browser.value("document.querySelector('[role=progressbar]').getAttribute('aria-valuenow')")
            assert 0 < int(now) < 100
            assert browser.value("document.querySelector('.navbar li.active').textContent.trim()") == "Tilestream"

            workers[0].send_signal(signal.SIGKILL)
            assert _wait_until(lambda: "gone" in browser.text("#workers tbody"))
            assert browser.text("#word") == "1 running, 1 worker"
            second = browser.number("tiles")
            assert _wait_until(lambda: browser.number("tiles") > second), "the other goes on"
            runner.join(timeout=60)
            assert done == 150
            assert _wait_until(lambda: browser.number("photographs") == 150 and browser.text(".badge") == "ended")

        assert _wait_until(lambda: "not reachable" in browser.text("#word"))
        assert scheduler.poll() is not None
        assert browser.number("photographs") == 150, "the last numbers stay in sight"
        with _scheduler(tmp_path, *preload, port=int(url.rstrip("/").rpartition(":")[2])) as (_, _, again):
            assert again == url
            assert _wait_until(lambda: browser.text("#word") == "No run yet, 0 workers")
            assert browser.value("window.mark") == 1, "it is the same page"
