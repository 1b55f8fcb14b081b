"""A reduction as a value, and its Dask graph (the idea is flox's `Aggregation`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dask._task_spec import Task, TaskRef
from dask.delayed import Delayed


@dataclass(frozen=True)
class Reduction:
    """How the parts of one image become one result: map every part, combine a destination's pieces, finalize.

    Pieces reach `combine` in ascending order of their part and values reach `finalize` in ascending order of their
    destination, so the result depends on no worker count, order of completion or scheduler.
    Raises ValueError when `routes` is not ascending, leaves the parts, or leaves a part out.
    """

    parts: tuple[Any, ...]
    """Small picklable arguments, one a tile task."""
    map: Callable[..., Mapping[int, Any]]
    """part -> {destination: piece}, a piece for each destination that `routes` says, no other. With a prelude, its
    result is the second argument. May run more than once (a worker died): it must be idempotent."""
    routes: Mapping[int, tuple[int, ...]]
    """destination -> indices of the parts that contribute to it, ascending."""
    combine: Callable[[int, list[Any]], Any]
    """(destination, its pieces in order of part) -> value. The pieces are shared: it must not write to them."""
    finalize: Callable[[list[Any]], Any]
    """values in order of destination -> result, the only thing that returns to the driver."""
    prelude: Reduction | None = None
    """A sweep that comes first and whose result every `map` receives."""

    def __post_init__(self) -> None:
        unrouted = set(range(len(self.parts)))
        for destination, sources in self.routes.items():
            if list(sources) != sorted(set(sources)) or not set(sources) <= set(range(len(self.parts))):
                raise ValueError(
                    f"routes[{destination}]={sources} must be ascending indices in [0, {len(self.parts)}), each once"
                )
            unrouted -= set(sources)
        if unrouted or not self.parts:
            raise ValueError(
                f"parts {sorted(unrouted)} of {len(self.parts)} lead to no destination and would not run; "
                f"route every part to one (its piece may be None)"
            )

    @property
    def n_parts(self) -> int:
        """The tile tasks that it takes, the prelude's included."""
        return len(self.parts) + (self.prelude.n_parts if self.prelude else 0)


def graph(reduction: Reduction, name: str, tick: Callable[[], None] | None = None) -> Delayed:
    """The reduction as a lazy Dask value, computed by any of Dask's schedulers.

    `name` must be unique on the scheduler for as long as the result is wanted. Keys begin with tile-, piece-, cell- and
    image-, by which the dashboard groups them. `tick` is called where a part ran, after it or by `tile_done` within.
    """
    tasks: dict[Any, Task] = {}
    return Delayed(_add(tasks, reduction, name, tick), tasks)


_running = threading.local()


def tile_done() -> None:
    """Called by a `map` whose part holds several tiles after each of them: progress is told tile by tile."""
    tick = getattr(_running, "tick", None)
    if tick is not None:
        _running.told = True
        tick()


def _add(tasks: dict[Any, Task], reduction: Reduction, name: str, tick: Callable[[], None] | None) -> str:
    def add(key: Any, *call: Any) -> TaskRef:
        tasks[key] = Task(key, *call)
        return TaskRef(key)

    # "@" ends the prefix that Dask shows: letters alone after the hyphen would make a group for each name
    tile, piece, cell, image = (f"{prefix}-@{name}" for prefix in ("tile", "piece", "cell", "image"))
    prelude = [TaskRef(_add(tasks, reduction.prelude, f"{name}/prelude", tick))] if reduction.prelude else []
    if len(reduction.parts) == 1:  # one task instead of several that wait for each other's turn
        steps = (reduction.map, reduction.combine, reduction.finalize)
        add(image, _single, *steps, tick, tuple(sorted(reduction.routes)), *reduction.parts, *prelude)
        return image
    destinations: list[list[int]] = [[] for _ in reduction.parts]
    for destination in sorted(reduction.routes):
        for part in reduction.routes[destination]:
            destinations[part].append(destination)
    pieces: dict[tuple[int, int], TaskRef] = {}
    for index, part in enumerate(reduction.parts):
        targets = tuple(destinations[index])
        whole = add((tile, index), _map, reduction.map, tick, targets, part, *prelude)
        for target in targets:  # several: cut out where the tile ran, so that no piece travels with another
            single = whole if len(targets) == 1 else add((piece, target, index), _extract, whole, target)
            pieces[target, index] = single
    cells = [
        add((cell, target), _combine, reduction.combine, target, *(pieces[target, part] for part in sources))
        for target, sources in sorted(reduction.routes.items())
    ]
    add(image, _finalize, reduction.finalize, *cells)
    return image


def _map(
    function: Callable[..., Mapping[int, Any]],
    tick: Callable[[], None] | None,
    targets: tuple[int, ...],
    part: Any,
    *prelude: Any,
) -> Any:
    """{destination: piece}, or the piece alone when there is one destination."""
    _running.tick, _running.told = tick, False
    try:
        pieces = function(part, *prelude)
    finally:
        _running.tick = None
    if sorted(pieces) != list(targets):
        raise ValueError(f"map returned pieces for destinations {sorted(pieces)}, routes want {list(targets)}")
    if tick is not None and not _running.told:
        tick()
    return pieces if len(targets) > 1 else pieces[targets[0]]


def _single(
    function: Callable[..., Mapping[int, Any]],
    combine: Callable[[int, list[Any]], Any],
    finalize: Callable[[list[Any]], Any],
    tick: Callable[[], None] | None,
    targets: tuple[int, ...],
    *arguments: Any,
) -> Any:
    made = _map(function, tick, targets, *arguments)
    pieces = made if len(targets) > 1 else {targets[0]: made}
    return finalize([combine(target, [pieces[target]]) for target in targets])


def _extract(pieces: Mapping[int, Any], target: int) -> Any:
    return pieces[target]


def _combine(function: Callable[[int, list[Any]], Any], target: int, *pieces: Any) -> Any:
    return function(target, list(pieces))


def _finalize(function: Callable[[list[Any]], Any], *values: Any) -> Any:
    return function(list(values))
