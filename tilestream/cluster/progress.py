"""Progress: a bar on a terminal, a plain or a JSON line now and then elsewhere, and events for the dashboard."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from distributed import Client
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

TOPIC = "tilestream-progress"
"""The topic of Dask's events by which workers and drivers tell what is done."""
_PUBLISH_S = 1.0


def tell(client: Client, action: str, **fields: Any) -> None:
    """An event for who watches: the dashboard's page, or any subscriber of TOPIC. A lost scheduler is no error here."""
    with suppress(OSError, AttributeError):  # a client that has given up has no scheduler to speak to
        client.log_event(TOPIC, {"action": action, **fields})


class Progress:
    """Counts images, tiles and megapixels done; safe to call from several threads. Made by `progress`."""

    def __init__(
        self,
        title: str,
        total_images: int | None,
        total_parts: int | None,
        unit: str,
        changed: Callable[[], None],
        labels: Mapping[str, Any] | None = None,
    ) -> None:
        self.title, self.total_images, self.total_parts, self.unit = title, total_images, total_parts, unit
        self.labels = dict(labels or {})
        self.images = self.failed = self.parts = 0
        self._published_s = float("-inf")
        self.megapixels = 0.0
        self._changed = changed
        self._running: dict[str, tuple[int, int]] = {}  # token -> (ticks, parts)
        self._lock = threading.Lock()
        self._started_s = time.monotonic()

    def start(self, token: str, n_parts: int) -> None:
        """An image of `n_parts` tiles is in flight under a token of its own (a new one if it is tried again)."""
        with self._lock:
            self._running[token] = 0, n_parts

    def tick(self, token: str) -> None:
        """A tile is done. Ticks of images that are no longer in flight, or recomputed tiles, do not count."""
        with self._lock:
            if token not in self._running:
                return
            ticks, n_parts = self._running[token]
            self._running[token] = min(ticks + 1, n_parts), n_parts
        self._changed()

    def drop(self, token: str) -> None:
        """The image is no longer in flight and will be tried again: its ticks are taken back."""
        with self._lock:
            del self._running[token]

    def finish(self, token: str, megapixels: float, *, failed: bool = False) -> None:
        """The image is through. A failed one counts as done for the time left, but adds no megapixels."""
        with self._lock:
            self.parts += self._running.pop(token)[1]
            self.images += 1
            self.failed += failed
            self.megapixels += 0.0 if failed else megapixels
        self._changed()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    @property
    def parts_done(self) -> int:
        """Tiles done, those of images in flight included."""
        with self._lock:
            return self.parts + sum(ticks for ticks, _ in self._running.values())

    @property
    def fraction(self) -> float | None:
        """What part of the work is done, in [0, 1]; None while the total is unknown."""
        done, total = (
            (self.parts_done, self.total_parts) if self.total_parts is not None else (self.images, self.total_images)
        )
        return None if total is None else 1.0 if total == 0 else min(1.0, done / total)

    @property
    def left_s(self) -> float | None:
        """Seconds left at the rate so far."""
        return self.elapsed_s * (1 / self.fraction - 1) if self.fraction else None

    def state(self, ended: bool = False) -> dict[str, Any]:
        """The same for machines."""
        return {
            **self.labels,
            "stage": self.title,
            "unit": self.unit,
            "images": self.images,
            "total_images": self.total_images,
            "failed": self.failed,
            "tiles": self.parts_done,
            "total_tiles": self.total_parts,
            "megapixels": round(self.megapixels, 6),
            "elapsed_s": round(self.elapsed_s, 3),
            "left_s": None if self.left_s is None else round(self.left_s, 3),
            "ended": ended,
        }

    def publish(self, client: Client, *, ended: bool = False) -> None:
        """Tells the scheduler's plugins, at most once a second."""
        if ended or time.monotonic() - self._published_s >= _PUBLISH_S:
            self._published_s = time.monotonic()
            tell(client, "state", **self.state(ended))

    def line(self) -> str:
        """The state of things in one line."""
        fields = [
            f"{_of(self.images, self.total_images)} {self.unit}",
            f"{self.failed} failed" if self.failed else "",
            "" if self.total_parts is None else f"{_of(self.parts_done, self.total_parts)} tiles",
            "" if self.left_s is None else f"{_clock(self.left_s)} left",
            self._rate(),
            f"{_clock(self.elapsed_s)} elapsed",
        ]
        return ", ".join(filter(None, fields))  # what matters least comes last, where a narrow terminal cuts

    def summary(self) -> str:
        """The last line."""
        tiles = "" if self.total_parts is None else f", {self.parts_done} tiles"
        return (
            f"{self.images - self.failed} {self.unit} done, {self.failed} failed{tiles} in {self.elapsed_s:.1f} s "
            f"({self._rate()})"
        )

    def _rate(self) -> str:
        """Megapixels a second, or images where their size is not known beforehand."""
        seconds = max(self.elapsed_s, 1e-9)
        if self.megapixels:
            return f"{self.megapixels / seconds:.1f} MP/s"
        return f"{self.images / seconds:.2f} {self.unit}/s"


@contextmanager
def progress(
    title: str,
    *,
    total_images: int | None = None,
    total_parts: int | None = None,
    unit: str = "images",
    console: Console | None = None,
    interval_s: float = 10.0,
    as_json: bool = False,
    labels: Mapping[str, Any] | None = None,
) -> Iterator[Progress]:
    """Shows progress for the time of the context, then a one-line summary; on standard error unless `console` is given.

    Totals that are not known are None. Where the console is no terminal, a plain line is printed no more often
    than every `interval_s` seconds. With `as_json` every line is `state()` as a JSON object, with `labels`: for
    machines, every second.
    """
    console = console or Console(stderr=True)
    interval_s, bars = (1.0, False) if as_json else (interval_s, console.is_terminal)
    shown_s = [time.monotonic()]
    lock = threading.Lock()

    def show(text: str, ended: bool = False) -> None:
        line = json.dumps({"action": "state", **state.state(ended)}) if as_json else f"{title}: {text}"
        console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def changed() -> None:
        with lock:
            if bars or time.monotonic() - shown_s[0] < interval_s:
                return
            shown_s[0] = time.monotonic()
        show(state.line())

    state = Progress(title, total_images, total_parts, unit, changed, labels)
    end = "stopped, "
    try:
        # rich asks for the line ten times a second: nothing has to be pushed at it
        columns = TextColumn("{task.description}", markup=False), _Bar(state), _Line(state)
        with RichProgress(*columns, console=console, transient=True, disable=not bars) as bar:
            bar.add_task(title, total=1.0)
            yield state
        end = ""
    finally:
        show(end + state.summary(), ended=True)


class _Bar(BarColumn):
    max_refresh = None

    def __init__(self, state: Progress) -> None:
        super().__init__(bar_width=16)
        self.state = state

    def render(self, task: Task):  # type: ignore[no-untyped-def]
        task.completed, task.total = self.state.fraction or 0.0, None if self.state.fraction is None else 1.0
        return super().render(task)


class _Line(ProgressColumn):
    max_refresh = None

    def __init__(self, state: Progress) -> None:
        super().__init__()
        self.state = state

    def render(self, task: Task) -> Text:
        return Text(self.state.line(), no_wrap=True, overflow="ellipsis")


def _of(done: int, total: int | None) -> str:
    return str(done) if total is None else f"{done}/{total}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
