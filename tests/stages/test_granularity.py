"""How tiles are shared out to tasks: what it costs, what it holds, and that it changes no bit."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from distributed import Client

from tilestream.cluster import Job, graph, run
from tilestream.engine import plan, trace
from tilestream.geometry import GRANULARITIES, Region, Tile, TilePlan
from tilestream.nets import load_model
from tilestream.stages import saliency_tasks as tasks
from tilestream.stages.granularity import choose, shares
from tilestream.stages.jobs import Load, window


def grid(rows: int, columns: int, side: int = 1000, halo: int = 100, gigaflops: float = 100.0) -> TilePlan:
    """A plan of square tiles with halos, which costs `gigaflops` a tile."""
    extent = (rows * side, columns * side)
    tiles = []
    for index in range(rows * columns):
        y, x = (index // columns) * side, (index % columns) * side
        cell = Region(y, y + side, x, x + side)
        window = Region(y - halo, y + side + halo, x - halo, x + side + halo).intersect(Region.whole(extent))
        tiles.append(Tile(index, cell, window, cell))
    flops = int(rows * columns * gigaflops * 1e9)
    return TilePlan(extent, extent, (1, 1), (side, side), tuple(tiles), 1 << 20, 1 << 20, flops, flops)


def test_groups_are_rows_of_tiles_in_order():
    layout = grid(3, 4)
    assert [len(layout.groups(granularity)) for granularity in GRANULARITIES] == [1, 3, 12]
    for granularity in GRANULARITIES:
        assert [index for group in layout.groups(granularity) for index in group] == list(range(12))
    assert [list(group) for group in layout.groups("band")] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_exchanged_pixels_are_the_halos_between_groups():
    layout = grid(2, 3)
    assert layout.exchanged_px(layout.groups("image")) == 0
    strips = 2 * 100 * 3000
    assert (
        layout.exchanged_px(layout.groups("band")) == 2 * strips + 8 * 100 * 100
    )  # both sides', corners counted twice
    theirs = strips + 8 * 100 * 1000 + 8 * 100 * 100
    mine = 4 * (1000**2 - 900**2) + 2 * (1000**2 - 900 * 800)
    assert layout.exchanged_px(layout.groups("tile")) == theirs + mine


def test_the_inner_part_of_a_cell_meets_no_window_of_another_group():
    layout = grid(3, 3)
    assert layout.inner(4, range(4, 5)) == Region(1100, 1900, 1100, 1900)
    assert layout.inner(4, range(3, 6)) == Region(1100, 1900, 1000, 2000)
    assert layout.inner(4, range(9)) == layout.tiles[4].cell
    assert grid(3, 3, halo=600).inner(4, range(4, 5)).empty


@pytest.mark.parametrize(
    ("images", "slots", "expected"),
    [
        (100, 2, "image"),  # more photographs than workers: nothing is exchanged
        (1, 1, "image"),
        (1, 16, "tile"),  # one photograph: all workers on it
        (1, 4, "band"),
        (4, 4, "image"),
    ],
)
def test_what_is_chosen(images, slots, expected):
    assert choose(grid(4, 4, gigaflops=200), images, slots, 2**33).granularity == expected


def test_a_photograph_beyond_the_budget_is_always_shared_out():
    layout = grid(4, 4)
    bytes_ = layout.image[0] * layout.image[1] * 3 * 4
    assert choose(layout, 100, 2, bytes_).granularity == "image"
    assert choose(layout, 100, 2, bytes_ - 1).granularity != "image"


def test_shares_say_what_they_cost():
    found = {share.granularity: share for share in shares(grid(4, 4), 10, 2)}
    assert found["image"].moved_bytes == 0
    assert 0 < found["band"].moved_bytes < found["tile"].moved_bytes
    assert found["image"].tasks == 1 < found["band"].tasks < found["tile"].tasks
    assert str(found["image"]) == "a whole image a task, 1 an image, at most 0.0 MiB exchanged"


def test_tasks_are_counted_as_dask_does(model, made):
    layout = plan(trace(model.net), (301, 397), tile=128)
    for share in shares(layout, 1, 1):
        task = tasks.Task(str(made.store.path), "1_left", *_file(made), plan="", granularity=share.granularity)
        lazy = graph(tasks.reduction(replace(task, plan=str(_record(layout, made)))), "x")
        assert len(lazy.dask) == share.tasks


@pytest.mark.parametrize(
    ("load", "slots", "memory", "expected"),
    [
        (Load(), 2, 2**30, 4),
        (Load(), 1, 2**30, 2),
        (Load(tasks=4), 2, 2**30, 2),
        (Load(tasks=100), 2, 2**30, 2),
        (Load(tasks=4), 8, 2**30, 5),
        (Load(tasks=4, held_bytes=2**30), 8, 2**28, 2),
        (Load(tasks=4, held_bytes=2**40), 8, 2**28, 1),
    ],
)
def test_the_window_is_bounded_by_workers_and_memory(load, slots, memory, expected):
    assert window(load, slots, memory) == expected


@pytest.fixture(scope="module")
def model(made):
    return load_model(made.models / "first.safetensors")


def _file(made):
    path = made.models / "first.safetensors"
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()


def _record(layout, made):
    path = made.run.parent / f"plan-{layout.image}-{layout.tile_px}.json"
    path.write_text(layout.to_json())
    return path


@pytest.mark.parametrize("tile_px", [64, 128, 320])
@pytest.mark.parametrize("reduce", ["mean", "absmax"])
def test_all_granularities_give_the_same_bits(made, model, address, tmp_path, tile_px, reduce):
    """Many tiles, each with a halo over several others: the strips of all come together in one order.

    Maps that are written have whole cells exchanged, the others strips alone.
    """
    layout = plan(trace(model.net), made.store.levels("3_left")[0][1:], tile=tile_px)
    found = {}
    with Client(address, set_as_default=False) as client:
        for granularity in GRANULARITIES:
            for where, options in {"here": {"scheduler": "synchronous"}, "cluster": {"client": client}}.items():
                target = tmp_path / f"{granularity}-{where}"
                zarr.create_array(target, shape=layout.image, chunks=(tile_px, tile_px), dtype="f4")
                task = tasks.Task(
                    str(made.store.path), "3_left", *_file(made), plan=str(_record(layout, made)),
                    write=str(target), granularity=granularity, reduce=reduce,
                )  # fmt: skip
                results = []
                for each in (task, replace(task, write=None)):
                    job = Job("3_left", tasks.reduction(each), tiles=len(layout.tiles))
                    run([job], window=1, on_result=lambda _, value, to=results: to.append(value), **options)
                assert (results[0].peak, results[0].probability) == (results[1].peak, results[1].probability)
                np.testing.assert_array_equal(results[0].overview, results[1].overview)
                values = np.asarray(zarr.open_array(target, mode="r")[:])
                found[granularity, where] = results[0].peak, results[0].probability, values, results[0].overview
    first = found["tile", "here"]
    assert np.abs(first[2]).max() > 0
    for peak, probability, values, overview in found.values():
        assert (peak, probability) == first[:2]
        np.testing.assert_array_equal(values, first[2])
        np.testing.assert_array_equal(overview, first[3])


def test_threads_are_those_of_the_task_whoever_else_uses_the_worker(made, model, address):
    """Another run on the same workers may have set another number since."""
    layout = plan(trace(model.net), made.store.levels("3_left")[0][1:], tile=320)
    task = tasks.Task(str(made.store.path), "3_left", *_file(made), plan=str(_record(layout, made)))
    seen = {}

    def threads(count: int) -> int:
        tasks.source(replace(task, threads=count))
        return torch.get_num_threads()

    with Client(address, set_as_default=False) as client:
        client.run(torch.set_num_threads, 1)
        for count in (2, 1):
            job = Job.call(f"{count}", threads, count)
            run([job], client=client, window=1, on_result=lambda job, value: seen.update({job.name: value}))
    assert seen == {"2": 2, "1": 1}
