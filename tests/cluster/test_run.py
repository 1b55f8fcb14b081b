"""The bounded window, failures, deaths of workers. Functions sent to workers are local so that they pickle by value."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster

from tilestream.cluster import Job, Poison, Reduction, connect, run


def _unfinished_tasks(client: Client) -> int:
    return client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))


def _wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> bool:
    end_s = time.monotonic() + limit_s
    while not (held := condition()) and time.monotonic() < end_s:
        time.sleep(0.05)
    return held


def test_every_job_comes_back_once(scheduler: dict[str, Any]) -> None:
    results: dict[str, int] = {}
    run(
        (Job.call(f"image-{i}", lambda a, b: a * b, i, 10) for i in range(9)),
        window=4,
        on_result=lambda job, result: results.__setitem__(job.name, result),
        **scheduler,
    )
    assert results == {f"image-{i}": 10 * i for i in range(9)}


@pytest.mark.parametrize("window", [1, 3])
def test_the_window_bounds_what_is_in_flight(scheduler: dict[str, Any], window: int) -> None:
    drawn = done = most = 0

    def jobs() -> Iterator[Job]:
        nonlocal drawn, most
        for i in range(10):
            drawn += 1
            most = max(most, drawn - done)
            yield Job.call(f"image-{i}", time.sleep, 0.01)

    def on_result(job: Job, result: None) -> None:
        nonlocal done
        done += 1
        if "client" in scheduler:
            assert len(scheduler["client"].futures) <= window, "futures are released as results come"

    run(jobs(), window=window, on_result=on_result, **scheduler)
    assert (drawn, done, most) == (10, 10, window)


def test_a_failing_job_does_not_stop_the_others(scheduler: dict[str, Any]) -> None:
    def divide(value: int) -> float:
        return 6 / value

    results, errors = {}, {}
    run(
        [Job.call(f"image-{i}", divide, i) for i in (1, 0, 2, 3)],
        window=2,
        on_result=lambda job, result: results.update({job.name: result}),
        on_error=lambda job, error: errors.update({job.name: error}),
        **scheduler,
    )
    assert results == {"image-1": 6, "image-2": 3, "image-3": 2}
    assert list(errors) == ["image-0"]
    assert isinstance(errors["image-0"], ZeroDivisionError)


def test_without_on_error_the_failure_is_raised_and_the_rest_cancelled(scheduler: dict[str, Any]) -> None:
    drawn = []

    def jobs() -> Iterator[Job]:
        for i in range(20):
            drawn.append(i)
            yield Job.call(f"image-{i}", lambda i: 1 / (i - 2), i)

    with pytest.raises(ZeroDivisionError) as caught:
        run(jobs(), window=2, on_result=lambda job, result: None, **scheduler)
    assert caught.value.__notes__ == ["in job 'image-2'"]
    assert len(drawn) < 10
    if "client" in scheduler:
        assert _wait_until(lambda: _unfinished_tasks(scheduler["client"]) == 0)


def test_an_interrupt_cancels_what_is_in_flight(scheduler: dict[str, Any]) -> None:
    def interrupt(job: Job, result: Any) -> None:
        raise KeyboardInterrupt

    wait_s = [0.0] + [0.2] * 30
    many = Reduction(tuple(wait_s), lambda part: {0: time.sleep(part)}, {0: tuple(range(31))}, max, max)
    start_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run([Job.call("first", int), Job("second", many)], window=2, on_result=interrupt, **scheduler)
    assert time.monotonic() - start_s < 2.5, "the 6 s of the second job are not waited for"
    if "client" in scheduler:
        assert _wait_until(lambda: _unfinished_tasks(scheduler["client"]) == 0)


def test_a_worker_that_dies_once_costs_nothing_but_time(client: Client, tmp_path: Path) -> None:
    """Dask itself computes again what was lost."""
    marker = tmp_path / "died"

    def fragile(part: int) -> dict[int, float]:
        if part == 3 and not marker.exists():
            marker.touch()
            os._exit(1)
        return {0: 0.1 * part}

    fragile_job = Job("image", Reduction((1, 2, 3), fragile, {0: (0, 1, 2)}, lambda _, p: p, lambda values: values))
    results = []
    run([fragile_job], client=client, window=1, on_result=lambda job, result: results.append(result))
    assert results == [[[0.1, 0.2, 0.1 * 3]]]
    assert marker.exists()
    client.wait_for_workers(2, timeout=10)


def test_jobs_whose_workers_die_are_tried_again_alone(tmp_path: Path) -> None:
    """With allowed-failures 0 every death is a KilledWorker, so that each try costs one worker, not four."""

    def die(name: str, times: int) -> str:
        deaths = tmp_path / name
        count = len(deaths.read_text()) if deaths.exists() else 0
        if count < times:
            deaths.write_text("x" * (count + 1))
            os._exit(1)
        return name

    results, errors = [], dict[str, Exception]()
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}), connect(workers=1) as client:
        run(
            [
                Job.call("frail", die, "frail", 1),
                Job.call("poison", die, "poison", 99),
                Job.call("good", die, "good", 0),
            ],
            client=client,
            window=3,
            on_result=lambda job, result: results.append(result),
            on_error=lambda job, error: errors.update({job.name: error}),
        )
    assert sorted(results) == ["frail", "good"]
    assert list(errors) == ["poison"]
    assert isinstance(errors["poison"], Poison)
    assert "its tasks ended 1 worker processes in a row while nothing else ran" in str(errors["poison"])
    assert len((tmp_path / "poison").read_text()) in (2, 3)  # the first strike may be another's death


def test_a_worker_that_takes_too_much_memory_is_ended_and_its_job_named(tmp_path: Path) -> None:
    def greedy() -> int:
        held = []
        for _ in range(200):
            held.append(bytearray(os.urandom(1) * 2**24))
            time.sleep(0.05)
        return len(held)

    errors: list[Exception] = []
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        connect(workers=1, memory_limit=2**29) as client,
    ):
        run(
            [Job.call("greedy", greedy)],
            client=client,
            window=1,
            on_result=lambda job, result: None,
            on_error=lambda job, error: errors.append(error),
        )
    assert [type(error) for error in errors] == [Poison]
    assert "or its limit of memory" in str(errors[0])


@pytest.mark.slow
def test_jobs_that_hang_are_tried_again_alone(tmp_path: Path) -> None:
    def hang(name: str, times: int) -> str:
        tries = tmp_path / name
        count = len(tries.read_text()) if tries.exists() else 0
        tries.write_text("x" * (count + 1))
        if count < times:
            time.sleep(600)
        return name

    results, errors = [], dict[str, Exception]()
    with connect(workers=2) as client:
        run(
            [Job.call(name, hang, name, times) for name, times in (("slow", 1), ("stuck", 99), ("good", 0))],
            client=client,
            window=3,
            on_result=lambda job, result: results.append(result),
            on_error=lambda job, error: errors.update({job.name: error}),
            stall_s=6,
        )
    assert sorted(results) == ["good", "slow"]
    assert list(errors) == ["stuck"]
    assert isinstance(errors["stuck"], Poison)
    assert "nothing was done on tcp://127.0.0.1:" in str(errors["stuck"])
    assert "for 6 s while nothing else ran" in str(errors["stuck"])


def test_without_workers_the_run_ends() -> None:
    with (
        LocalCluster(n_workers=0, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
        pytest.raises(ConnectionError, match="for 1 s no worker has been there to take the tasks"),
    ):
        run([Job.call("one", int)], client=client, window=1, on_result=lambda job, result: None, stall_s=1)


def test_tasks_take_what_they_ask_for(client: Client) -> None:
    asked = {"resources": {"GPU": 1.0}, "stall_s": 1.0}
    message = r"no worker with the resources {'GPU': 1.0} has been there"
    with pytest.raises(ConnectionError, match=message):
        run([Job.call("one", int)], client=client, window=1, on_result=lambda job, result: None, **asked)


def test_others_work_is_left_alone(client: Client) -> None:
    """Jobs that nobody takes, while another client's task runs for longer than the watchdog waits."""
    with Client(client.scheduler.address, set_as_default=False) as other:
        theirs = other.submit(time.sleep, 4, pure=False)
        before = set(client.run(os.getpid).values())
        asked = {"resources": {"GPU": 1.0}, "stall_s": 1.5}
        with pytest.raises(ConnectionError, match="no worker with the resources"):
            run([Job.call("one", int)], client=client, window=1, on_result=lambda job, result: None, **asked)
        assert theirs.result(timeout=20) is None
        assert set(client.run(os.getpid).values()) == before


def test_what_is_done_when_a_run_is_interrupted_is_kept(client: Client) -> None:
    """Three short jobs end while the first result is looked at; the fourth is cancelled."""
    results = []

    def interrupt(job: Job, result: Any) -> None:
        results.append(job.name)
        if len(results) == 1:
            time.sleep(2)
            raise KeyboardInterrupt

    jobs = [Job.call(f"image-{i}", time.sleep, 0.1) for i in range(3)] + [Job.call("long", time.sleep, 60)]
    with pytest.raises(KeyboardInterrupt):
        run(jobs, client=client, window=4, on_result=interrupt)
    assert sorted(results) == ["image-0", "image-1", "image-2"]
    client.restart()  # nothing else ends the last one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "give one of them"),
        ({"window": 0, "scheduler": "synchronous"}, "window=0 must be at least 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run([], on_result=lambda job, result: None, **options)
