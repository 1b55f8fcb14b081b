"""Graphs of reductions: what they hold and what they compute. Functions are local so that they pickle by value."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dask.utils import key_split

from tilestream.cluster import Job, Reduction, graph, run


def _result(reduction: Reduction, scheduler: dict[str, Any]) -> Any:
    results = []
    run([Job("image", reduction)], window=1, on_result=lambda job, result: results.append(result), **scheduler)
    [result] = results
    return result


def test_a_float32_sum_has_the_same_bits_everywhere(scheduler: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    pieces = (rng.standard_normal((12, 1000)) * 10.0 ** rng.integers(-4, 5, (12, 1))).astype(np.float32)

    def work(part: tuple[int, float]) -> dict[int, np.ndarray]:
        index, wait_s = part
        time.sleep(wait_s)  # parts end out of order
        return {0: pieces[index], 1: -pieces[index]}

    def add(destination: int, arrays: list[np.ndarray]) -> np.ndarray:
        total = np.zeros(1000, np.float32)
        for array in arrays:
            total += array
        return total

    parts = tuple((index, 0.02 * (index % 3 == 0)) for index in range(12))
    routes = {1: tuple(range(12)), 0: tuple(range(12))}  # given in no order: values come in order of destination
    found = _result(Reduction(parts, work, routes, add, np.stack), scheduler)

    expected = add(0, list(pieces))
    np.testing.assert_array_equal(found, np.stack([expected, -expected]), strict=True)
    assert (expected != add(0, list(pieces[::-1]))).any(), "the order must matter for this test to say anything"


def test_pieces_go_where_routes_say(scheduler: dict[str, Any]) -> None:
    """Overlapping strips: part i contributes to the rows i and i + 1."""
    routes = {row: tuple(part for part in (row - 1, row) if 0 <= part < 4) for row in range(5)}
    reduction = Reduction(
        parts=("a", "b", "c", "d"),
        map=lambda part: {row: f"{part}{row}" for row in (ord(part) - 97, ord(part) - 96)},
        routes=routes,
        combine=lambda destination, pieces: "+".join(pieces),
        finalize=tuple,
    )
    assert _result(reduction, scheduler) == ("a0", "a1+b1", "b2+c2", "c3+d3", "d4")


def test_a_prelude_reaches_every_part(scheduler: dict[str, Any]) -> None:
    forward = Reduction(
        (1, 2, 3), lambda part: {0: part}, {0: (0, 1, 2)}, lambda _, pieces: sum(pieces), lambda v: v[0]
    )
    backward = Reduction(
        parts=(1, 2),
        map=lambda part, total: {0: part * total},
        routes={0: (0, 1)},
        combine=lambda _, pieces: pieces,
        finalize=lambda values: values[0],
        prelude=forward,
    )
    assert _result(backward, scheduler) == [6, 12]
    assert backward.n_parts == 5
    single = replace(backward, parts=(7,), routes={0: (0,)})  # its one part is a task of its own, all in one
    assert _result(single, scheduler) == [42]


def test_parts_are_never_taken_for_tasks_or_keys(scheduler: dict[str, Any]) -> None:
    parts = ((len, "abc"), "tile-@image", ["x"])
    reduction = Reduction(
        parts, lambda part: {0: part}, {0: (0, 1, 2)}, lambda _, pieces: pieces, lambda values: values
    )
    assert _result(reduction, scheduler) == [[(len, "abc"), "tile-@image", ["x"]]]


def test_only_the_piece_that_a_destination_needs_is_its_input() -> None:
    reduction = Reduction(
        (0, 1), lambda part: {}, {0: (0,), 1: (0, 1)}, combine=lambda _, pieces: None, finalize=lambda values: None
    )
    lazy = graph(reduction, "left-eye")
    tasks = dict(lazy.dask)
    inputs = {key: set(task.dependencies) for key, task in tasks.items()}
    tile, piece, cell = (f"{prefix}-@left-eye" for prefix in ("tile", "piece", "cell"))
    assert inputs == {
        (tile, 0): set(),
        (tile, 1): set(),
        (piece, 0, 0): {(tile, 0)},
        (piece, 1, 0): {(tile, 0)},
        (cell, 0): {(piece, 0, 0)},
        (cell, 1): {(piece, 1, 0), (tile, 1)},  # a tile with one destination returns its piece, nothing to cut out
        "image-@left-eye": {(cell, 0), (cell, 1)},
    }
    assert {key_split(key) for key in tasks} == {"tile", "piece", "cell", "image"}, "the dashboard's groups"


@pytest.mark.parametrize(
    ("parts", "routes", "message"),
    [
        ((1, 2), {0: (1, 0)}, r"routes\[0\]=\(1, 0\) must be ascending"),
        ((1, 2), {0: (0, 0, 1)}, "each once"),
        ((1, 2), {0: (0, 2)}, r"indices in \[0, 2\)"),
        ((1, 2), {0: (0,)}, r"parts \[1\] of 2 lead to no destination"),
        ((), {}, r"parts \[\] of 0"),
    ],
)
def test_bad_routes_are_refused(parts: tuple[int, ...], routes: dict[int, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reduction(parts, dict, routes, max, max)


def test_a_map_that_departs_from_its_routes_is_an_error() -> None:
    reduction = Reduction((1,), lambda part: {0: 1, 7: 1}, {0: (0,)}, lambda _, pieces: pieces, lambda values: values)
    with pytest.raises(ValueError, match=r"destinations \[0, 7\], routes want \[0\]"):
        graph(reduction, "image").compute(scheduler="synchronous")
