"""Ranks: all at once, each on a worker of its own; when one ends, all do."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from distributed import Client

from tilestream.cluster import RankLost, connect, run_ranks
from tilestream.cluster.ranks import Rank


class PeerLost(Exception):
    """What a rank raises that finds another one gone."""


def meet(rank: Rank) -> tuple[int, int, int, str]:
    """Rank 0 listens on the address that all were told, the others call: it works only if all run at once."""
    if rank.number == 0:
        with socket.create_server(rank.address) as server:
            for _ in range(rank.count - 1):
                server.accept()[0].close()
    else:
        for _ in range(100):
            try:
                socket.create_connection(rank.address).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    rank.tell({"pid": os.getpid()})
    return rank.number, rank.count, os.getpid(), rank.host


def until_unwanted(rank: Rank, folder: str) -> None:
    """Leaves a file when it has ended."""
    while rank.wanted():
        time.sleep(0.02)
    with open(f"{folder}/{rank.number}", "w") as file:
        file.write("ended")


def one_raises(rank: Rank, folder: str) -> None:
    if rank.number == 1:
        time.sleep(0.2)
        raise FloatingPointError("loss=nan")
    until_unwanted(rank, folder)


def one_dies(rank: Rank, folder: str) -> None:
    if rank.number == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    until_unwanted(rank, folder)
    raise PeerLost("connection closed by peer")


def cause_and_echo(rank: Rank) -> None:
    if rank.number == 0:
        raise PeerLost("connection closed by peer")
    time.sleep(1.5)
    raise ValueError("damaged photograph")


def only_echo(rank: Rank) -> None:
    raise PeerLost(f"{rank.number} heard nothing for 60 s")


def deaf(rank: Rank) -> None:
    if rank.number == 1:
        raise ValueError("damaged")
    time.sleep(100)


def test_ranks_run_at_once_and_talk(client: Client):
    said = []
    found = run_ranks(client, meet, 2, on_message=lambda number, message: said.append((number, message["pid"])))
    assert [(number, count) for number, count, *_ in found] == [(0, 2), (1, 2)]
    assert len({pid for *_, pid, _ in found}) == 2
    assert {host for *_, host in found} == {"127.0.0.1"}
    assert sorted(said) == [(number, pid) for number, _, pid, _ in found]


def test_what_one_raises_ends_all_and_names_it(client: Client, tmp_path):
    with pytest.raises(FloatingPointError, match="loss=nan") as caught:
        run_ranks(client, partial(one_raises, folder=str(tmp_path)), 2)
    assert caught.value.__notes__[0].startswith("in rank 1 of 2, on tcp://127.0.0.1:")
    assert [path.name for path in tmp_path.iterdir()] == ["0"], "the other one has ended before this returns"


def test_the_cause_is_raised_not_its_echo(client: Client):
    with pytest.raises(ValueError, match="damaged photograph"):
        run_ranks(client, cause_and_echo, 2, echoes=PeerLost)


def test_only_echoes_are_a_lost_rank(client: Client):
    with pytest.raises(RankLost, match=r"rank [01] of 2, on tcp://127.0.0.1:\d+: [01] heard nothing for 60 s"):
        run_ranks(client, only_echo, 2, echoes=PeerLost)


def test_too_few_workers(client: Client):
    with pytest.raises(ValueError, match=r"ranks=3 must be in \[1, 2\], the workers; start more"):
        run_ranks(client, meet, 3)
    with pytest.raises(ValueError, match=r"ranks=1 must be in \[1, 0\], the workers that offer {'GPU': 1}"):
        run_ranks(client, meet, 1, resources={"GPU": 1})


def test_beyond_this_machine_only_where_it_is_allowed(client: Client, monkeypatch):
    monkeypatch.setattr("tilestream.cluster.ranks.is_loopback", lambda host: False)
    with pytest.raises(ValueError, match="ranks would talk unencrypted"):
        run_ranks(client, meet, 2)
    assert len(run_ranks(client, meet, 2, in_clear=True)) == 2


def test_a_dead_worker_and_a_deaf_one(tmp_path):
    with connect(workers=2) as client:
        with pytest.raises(RankLost, match=r"rank 1 of 2 is lost with its worker tcp://127.0.0.1:\d+; see"):
            run_ranks(client, partial(one_dies, folder=str(tmp_path)), 2, echoes=PeerLost)
        assert [path.name for path in tmp_path.iterdir()] == ["0"]
        client.wait_for_workers(2, timeout=20)
        begun_s = time.monotonic()
        with pytest.raises(ValueError, match="damaged"):
            run_ranks(client, deaf, 2, grace_s=0.5)
        assert time.monotonic() - begun_s < 20
        client.wait_for_workers(2, timeout=20)
        assert len(run_ranks(client, meet, 2)) == 2, "the restarted workers are free"


def one_freezes(rank: Rank) -> None:
    if rank.number == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    raise PeerLost("heard nothing for a while")


def test_a_worker_that_does_not_answer_is_restarted_at_once(monkeypatch):
    """It used to hold the driver for as long as Dask waits for a connection, and longer."""
    monkeypatch.setattr("tilestream.cluster.ranks._SETTLE_S", 0.5)
    monkeypatch.setattr("tilestream.cluster.ranks._ANSWER_S", 1.0)
    with connect(workers=2) as client:
        begun_s = time.monotonic()
        with pytest.raises(RankLost, match=r"rank 0 of 2, on .*: heard nothing"):
            run_ranks(client, one_freezes, 2, echoes=PeerLost)
        assert time.monotonic() - begun_s < 25  # five of them the nanny's, before it kills
        client.wait_for_workers(2, timeout=20)
        assert len(run_ranks(client, meet, 2)) == 2


def test_ctrl_c_ends_ranks_soon(client: Client, tmp_path):
    def stop(number, message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ranks(client, partial(told, folder=str(tmp_path)), 2, on_message=stop)
    for _ in range(100):
        if len(list(tmp_path.iterdir())) == 2:
            break
        time.sleep(0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_ranks_whose_driver_is_gone_end(client: Client, tmp_path):
    """Training would go on for days on a cluster that was joined."""
    with ThreadPoolExecutor(1) as pool:
        driver, begun = Client(client.cluster.scheduler_address, set_as_default=False), threading.Event()
        work = partial(told, folder=str(tmp_path))
        running = pool.submit(run_ranks, driver, work, 2, on_message=lambda *_: begun.set())
        assert begun.wait(20)
        assert not list(tmp_path.iterdir())
        driver.close()
        with pytest.raises(ConnectionError):
            running.result(20)
    for _ in range(100):
        if len(list(tmp_path.iterdir())) == 2:
            break
        time.sleep(0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def told(rank: Rank, folder: str) -> None:
    rank.tell("begun")
    until_unwanted(rank, folder)
