"""The page `/tilestream` in Dask's dashboard: what a run does now, from the events that it and its workers log.

`dask scheduler --preload tilestream.cluster.dashboard` has it from the start, `install(client)` puts it on a scheduler
that runs. No server is added: page, `tilestream.json` and `tilestream.png` are on the scheduler's own, and the counters
`tilestream_{images,tiles,megapixels,failed,quarantined}_total`, by stage, in its `/metrics` (with prometheus_client).

`tilestream.json` holds, besides `version` (1):

- `tiles`, `megapixels`, `tiles_per_s`, `megapixels_per_s`: of all workers, recomputed tiles too; rates here and below
  are those of the last 30 s. `malformed`: events that were not understood.
- `runs`, those that go on first, then the newest first; eight are kept. Of each what its driver said last (`run`, the
  folder; `holder`, `stage`, `unit`, `images`, `total_images`, `failed`, `tiles`, `total_tiles`, `megapixels`,
  `elapsed_s`, `left_s`, `ended`; totals and the time left are null where unknown), `quiet_s` since then, `live` (not
  ended, and heard of in the last 15 s), `fraction` done in [0, 1] or null, `tiles_per_s`, `megapixels_per_s` (of an
  ended stage the mean over all of it), `quarantined`, how many, and `quarantine`, the newest 200, newest first, as
  {`stage`, `id`, `reason`}; `picture`, the latest: {`stage`, `id`, `value`, `crop`: [y0, x0, y1, x1] as fractions of
  its sides, `url`: relative}, or null.
- `workers`: `address`, `name`, `state` (Dask's, or "gone" for a minute), `threads`, `tiles`, `megapixels`,
  `tiles_per_s`, `megapixels_per_s`, `memory_bytes`, `memory_limit_bytes` (null: none), `seen_s` since it was heard of.
"""

from __future__ import annotations

import base64
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from distributed import Client, Scheduler, SchedulerPlugin
from distributed.http.prometheus import PrometheusCollector
from distributed.http.utils import RequestHandler
from distributed.metrics import time as dask_time
from tornado.web import HTTPError

from .progress import TOPIC

_NAME = "tilestream"
_WINDOW_S, _QUIET_S, _GONE_S = 30, 15.0, 60.0
_RUNS, _QUARANTINE, _GONE, _STAGES = 8, 200, 64, 64
_TEXT, _PNG_BYTES = 1000, 1 << 20
_COUNTED = ("images", "tiles", "megapixels", "failed")
_STATE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("holder", "stage", "unit"), (str,)),
    **dict.fromkeys(("images", "failed", "tiles"), (int,)),
    **dict.fromkeys(("total_images", "total_tiles"), (int, type(None))),
    **dict.fromkeys(("megapixels", "elapsed_s"), (int, float)),
    "left_s": (int, float, type(None)),
    "ended": (bool,),
}


def dask_setup(scheduler: Scheduler) -> None:
    """Dask's hook for `--preload`: the page is there from the start."""
    if _NAME not in scheduler.plugins:
        scheduler.add_plugin(Dashboard())  # Dask starts it, right after the preloads


def install(client: Client) -> None:
    """Puts the page on the client's scheduler, from now on; where it is already, nothing changes.

    Raises ImportError where the scheduler cannot import this module: the run may go on without the page.
    """
    try:
        client.register_plugin(Dashboard())
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"scheduler={client.scheduler.address!r} has no page {_NAME!r} ({error}); install this version of "
            f"tilestream where it runs and start it with `--preload {__name__}`"
        ) from error


class _Rate:
    """Two counts, and how fast they grew in the last `_WINDOW_S` seconds."""

    def __init__(self, tiles: float = 0, megapixels: float = 0) -> None:
        self.counts = tiles, megapixels
        self.start_s = monotonic()
        self.seconds = deque([[0.0, 0.0, 0.0]], maxlen=_WINDOW_S)  # which second, and what it added to both

    def update(self, tiles: float, megapixels: float) -> None:
        second = int(monotonic())
        if self.seconds[-1][0] != second:
            self.seconds.append([second, 0.0, 0.0])
        self.seconds[-1][1] += tiles - self.counts[0]
        self.seconds[-1][2] += megapixels - self.counts[1]
        self.counts = tiles, megapixels

    def json(self) -> dict[str, float]:
        span_s = max(1.0, min(_WINDOW_S, monotonic() - self.start_s))
        recent = [second for second in self.seconds if second[0] > int(monotonic()) - _WINDOW_S]
        tiles, megapixels = (max(0.0, sum(second[i] for second in recent)) / span_s for i in (1, 2))
        counts = {"tiles": self.counts[0], "megapixels": self.counts[1]}
        return {**counts, "tiles_per_s": tiles, "megapixels_per_s": megapixels}


@dataclass
class _Run:
    run: str
    state: dict[str, Any]
    serial: int
    heard_s: float = field(default_factory=monotonic)
    rate: _Rate = field(default_factory=_Rate)
    counted: Counter[str] = field(default_factory=Counter)  # of this stage, what the totals hold
    quarantine: dict[tuple[str, str], str] = field(default_factory=dict)
    quarantined: int = 0
    picture: dict[str, Any] | None = None
    png: bytes = b""

    def starts_again(self, state: Mapping[str, Any]) -> bool:
        """Whether the counts of a state begin from nothing: another stage, or the same once more."""
        old = self.state
        return (
            any(old[name] != state[name] for name in ("stage", "holder"))
            or (old["ended"] and not state["ended"])
            or state["elapsed_s"] < old["elapsed_s"] - 1  # messages may overtake each other a little
        )

    def json(self) -> dict[str, Any]:
        state, quiet_s = self.state, monotonic() - self.heard_s
        done, total = (state[f"{name}{'tiles' if state['total_tiles'] else 'images'}"] for name in ("", "total_"))
        mean = {f"{name}_per_s": state[name] / max(state["elapsed_s"], 1e-3) for name in ("tiles", "megapixels")}
        return {
            "run": self.run,
            **self.rate.json(),
            **state,
            **(mean if state["ended"] else {}),
            "quiet_s": quiet_s,
            "live": not state["ended"] and quiet_s < _QUIET_S,
            "fraction": None if total is None else min(1.0, done / total) if total else 1.0,
            "quarantined": self.quarantined,
            "quarantine": [
                {"stage": stage, "id": name, "reason": reason}
                for (stage, name), reason in reversed(self.quarantine.items())
            ],
            "picture": self.picture,
        }


class Dashboard(SchedulerPlugin):
    """Keeps what the events say, within bounds whatever they say. One on a scheduler, under the name tilestream."""

    name = _NAME
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Dask's hook, on the scheduler: routes, an entry in the navigation bar of all pages, counters."""
        from distributed.dashboard.scheduler import template_variables

        self.scheduler = scheduler
        self.runs: dict[str, _Run] = {}  # in the order in which they were heard of last
        self.workers: dict[str, tuple[str, _Rate]] = {}  # address -> name, counts
        self.gone: dict[str, float] = {}  # address -> since when
        self.rate = _Rate()  # of all workers
        self.totals: dict[str, Counter[str]] = {}  # stage -> counts since the start
        self.malformed = self.serial = 0
        for worker in scheduler.workers:
            self.add_worker(scheduler, worker)
        pages = template_variables(scheduler)["pages"]  # the very list that Dask's own pages show
        if _NAME not in pages:
            prefix, arguments = _prefix(scheduler.http_application), {"dask_server": scheduler}
            handlers = {"": _Page, "[.]json": _Json, "[.]png": _Png}
            routes = [(f"{prefix}{_NAME}{suffix}", handler, arguments) for suffix, handler in handlers.items()]
            scheduler.http_application.add_handlers(".*", routes)
            pages.append(_NAME)
        _add_collector(scheduler)

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Dask's hook."""
        self.gone.pop(worker, None)
        self.workers.setdefault(worker, (str(scheduler.workers[worker].name), _Rate()))

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        """Dask's hook: the worker is shown as gone for a while."""
        self.gone[worker] = monotonic()
        for address, since_s in list(self.gone.items()):
            if len(self.gone) > _GONE or monotonic() - since_s > _GONE_S:
                del self.gone[address]
                self.workers.pop(address, None)

    def log_event(self, topic: str, msg: Any) -> None:
        """Dask's hook. What is malformed is counted and otherwise ignored."""
        if topic == TOPIC:
            try:
                actions = {"tick": self._tick, "state": self._state, "quarantine": self._quarantine}
                {**actions, "picture": self._picture}[msg["action"]](msg)
            except Exception:  # a message from anyone in the cluster may hold anything
                self.malformed += 1

    def _tick(self, msg: dict[str, Any]) -> None:
        megapixels = _read(msg, {"megapixels": (int, float)})["megapixels"]
        for rate in (self.workers[msg["worker"]][1], self.rate):
            rate.update(rate.counts[0] + 1, rate.counts[1] + megapixels)

    def _state(self, msg: dict[str, Any]) -> None:
        state = _read(msg, _STATE)
        run = self._run(msg, state)
        if run.starts_again(state):
            run.counted.clear()
            run.rate = _Rate(state["tiles"], state["megapixels"])
        run.rate.update(state["tiles"], state["megapixels"])
        run.state, run.heard_s = state, monotonic()
        for name in _COUNTED:  # a tile of lost work is taken back by its run, but a total never falls
            self._total(state["stage"])[name] += max(0, state[name] - run.counted[name])
            run.counted[name] = max(state[name], run.counted[name])

    def _quarantine(self, msg: dict[str, Any]) -> None:
        entry = _read(msg, dict.fromkeys(("stage", "id", "reason"), (str,)))
        run, key = self._run(msg, entry), (entry["stage"], entry["id"])
        if run.quarantine.pop(key, None) is None:
            run.quarantined += 1
            self._total(entry["stage"])["quarantined"] += 1
        run.quarantine[key] = entry["reason"]
        if len(run.quarantine) > _QUARANTINE:
            del run.quarantine[next(iter(run.quarantine))]

    def _picture(self, msg: dict[str, Any]) -> None:
        encoded = msg.pop("png")  # Dask keeps a topic's last messages and sends them to those who subscribed
        picture = _read(msg, {"stage": (str,), "id": (str,)})
        y0, x0, y1, x1 = crop = [float(edge) for edge in msg["crop"]]
        value = float(msg["value"])
        png = base64.b64decode(encoded, validate=True) if len(encoded) <= _PNG_BYTES * 4 / 3 else b""
        if not (0 <= y0 <= y1 <= 1 and 0 <= x0 <= x1 <= 1 and abs(value) < 1e18 and png[:4] == b"\x89PNG"):
            raise ValueError(f"{crop=}, {value=}, {len(png)=}")
        run = self._run(msg, picture)
        self.serial += 1
        run.png, url = png, f"{_NAME}.png?serial={self.serial}"
        run.picture = {**picture, "value": value, "crop": crop, "url": url}

    def _run(self, msg: dict[str, Any], state: Mapping[str, Any]) -> _Run:
        """The run that a message is of; one not heard of before replaces the one not heard of for longest."""
        name = _read(msg, {"run": (str,)})["run"]
        if (run := self.runs.pop(name, None)) is None:
            self.serial += 1
            unknown = {key: "" if str in kinds else None if type(None) in kinds else 0 for key, kinds in _STATE.items()}
            run = _Run(name, {**unknown, "stage": state["stage"], "ended": False}, self.serial)
        self.runs[name] = run
        if len(self.runs) > _RUNS:
            del self.runs[next(iter(self.runs))]
        return run

    def _total(self, stage: str) -> Counter[str]:
        return self.totals.setdefault(stage if len(self.totals) < _STAGES or stage in self.totals else "", Counter())

    def json(self) -> dict[str, Any]:
        """What `tilestream.json` says, see the module."""
        runs = sorted(self.runs.values(), key=lambda run: run.serial, reverse=True)
        return {
            "version": 1,
            **self.rate.json(),
            "malformed": self.malformed,
            "runs": sorted((run.json() for run in runs), key=lambda run: not run["live"]),
            "workers": [worker for address in self.workers if (worker := self._worker(address))],
        }

    def _worker(self, address: str) -> dict[str, Any] | None:
        name, rate = self.workers[address]
        known = self.scheduler.workers.get(address)
        seen_s = dask_time() - known.last_seen if known else monotonic() - self.gone.get(address, 0.0)
        if known is None and seen_s > _GONE_S:
            return None
        return {
            "address": address,
            "name": name,
            "state": known.status.name if known else "gone",
            **rate.json(),
            "threads": known.nthreads if known else 0,
            "memory_bytes": known.metrics.get("memory", 0) if known else 0,
            "memory_limit_bytes": (known.memory_limit or None) if known else None,
            "seen_s": max(0.0, seen_s),
        }


def _read(msg: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """The fields of a message, texts cut to a length. Raises KeyError, TypeError or ValueError."""
    found: dict[str, Any] = {name: msg[name] for name in fields}
    for name, kinds in fields.items():
        value = found[name]
        if type(value) not in kinds:
            raise TypeError(f"{name}={value!r} must be of {kinds}")
        if str in kinds:
            found[name] = value[:_TEXT]
        elif value is not None and not 0 <= value < 1e18:
            raise ValueError(f"{name}={value} must be in [0, 1e18)")
    return found


class _Handler(RequestHandler):
    """Runs in the scheduler's event loop, as all of the plugin does."""

    def prepare(self) -> None:
        if _NAME not in self.server.plugins:  # it was taken away; routes cannot be
            raise HTTPError(404)
        self.set_header("Cache-Control", "no-store")


class _Page(_Handler):
    def get(self) -> None:
        from distributed.dashboard.components.scheduler import env
        from distributed.dashboard.scheduler import template_variables

        self.set_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'")
        page = Path(__file__).with_suffix(".html").read_text("utf-8")
        self.write(env.from_string(page).render(**template_variables(self.server)))


class _Json(_Handler):
    def get(self) -> None:
        self.write(self.server.plugins[_NAME].json())


class _Png(_Handler):
    def get(self) -> None:
        for run in self.server.plugins[_NAME].runs.values():
            if run.picture and run.picture["url"] == f"{_NAME}.png?{self.request.query}":
                self.set_header("Content-Type", "image/png")
                self.write(run.png)
                return
        raise HTTPError(404)


def _prefix(application: Any) -> str:
    """What the paths of the scheduler's server begin with (`--dashboard-prefix`), with its slashes."""
    routers = [rule.target for rule in application.default_router.rules]
    patterns = [rule.matcher.regex.pattern for router in routers for rule in getattr(router, "rules", ())]
    return next((pattern.partition("statics/")[0] for pattern in patterns if "/statics/" in pattern), "/")


class _Collector(PrometheusCollector):
    """Dask makes one a process and points it, `server`, at the scheduler whose metrics are asked for."""

    def collect(self) -> Iterator[Any]:
        from distributed.http.scheduler.prometheus.core import CounterMetricFamily

        plugin = self.server.plugins.get(_NAME)
        for name in (*_COUNTED, "quarantined") if plugin else ():
            family = CounterMetricFamily(f"{_NAME}_{name}", f"{name.capitalize()} of all runs", labels=["stage"])
            for stage, counts in plugin.totals.items():
                family.add_metric([stage], counts[name])
            yield family


def _add_collector(scheduler: Scheduler) -> None:
    try:
        from distributed.http.scheduler.prometheus import core
    except ModuleNotFoundError:  # prometheus_client is not there: `/metrics` says so
        return
    if _Collector in core.COLLECTORS:
        return
    core.COLLECTORS.append(_Collector)
    if core.PrometheusHandler._collectors:  # metrics were asked for before
        collector = _Collector(scheduler)
        core.prometheus_client.REGISTRY.register(collector)
        core.PrometheusHandler._collectors += (collector,)
