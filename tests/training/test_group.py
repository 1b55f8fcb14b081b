"""Processes that train together: the sum is that of one process, and nobody waits for the dead."""

import copy
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from tilestream.training import Group, PeerLost, TrainingConfig, fit, joined

CPU = torch.device("cpu")


def settings(**changes):
    return TrainingConfig(**{"epochs": 3, "batch_size": 8, "learning_rate": 0.02, "optimizer": "sgd", **changes})


def plain_net(classes=2):
    """No batch norm, no dropout."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, classes),
    )  # fmt: skip


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()


def together(count, work, timeout_s=20.0):
    """What work(group) returns in each of `count` ranks, or the exception: threads, for no group is global."""
    address = free_address()

    def one(rank):
        torch.set_num_threads(1)
        try:
            with joined(rank, count, address, "127.0.0.1", CPU, timeout_s) as group:
                return work(group)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_sums_and_shares():
    def work(group):
        tensors = [torch.full((2, 3), group.rank + 1.0), torch.tensor([10.0**group.rank])]
        group.add(tensors)
        return tensors, group.share({"n": group.rank, "t": (torch.arange(3) + group.rank, None, "x")})

    for tensors, shared in together(3, work):
        assert torch.equal(tensors[0], torch.full((2, 3), 6.0))
        assert tensors[1].item() == 111
        assert shared["n"] == 0
        assert torch.equal(shared["t"][0], torch.arange(3))
        assert shared["t"][1:] == (None, "x")
    assert [part.tolist() for part in (Group(rank, 3).part(np.arange(7)) for rank in range(3))] == [
        [0, 1, 2], [3, 4], [5, 6],
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "balance"), [(2, "weights"), (3, "sampling")])
def test_ranks_do_what_one_process_does(blobs, tmp_path, count, balance):
    """41 examples: parts differ in size, and with weighted classes in weight."""
    train, validation = blobs(41, 1, 3), blobs(30, 2, 3)
    config, start = settings(balance=balance, rotation_deg=20, colour=0.1), plain_net(3)
    alone = copy.deepcopy(start)
    expected = fit(alone, train, validation, config, tmp_path / "alone")
    nets = [copy.deepcopy(start) if rank == 0 else plain_net(3).double().float() for rank in range(count)]
    nn.init.ones_(nets[1][0].weight)  # rank 0's weights are everybody's
    found = together(
        count, lambda group: fit(nets[group.rank], train, validation, config, tmp_path / f"{group.rank}", group=group)
    )
    for history, net in zip(found, nets, strict=True):
        for record, wanted in zip(history.records, expected.records, strict=True):
            assert record.train_loss == pytest.approx(wanted.train_loss, rel=1e-5)
            assert record.validation_loss == pytest.approx(wanted.validation_loss, rel=1e-5)
            assert record.validation_auc == wanted.validation_auc
        for value, other in zip(net.state_dict().values(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
        assert same_bits(net, nets[0])
    assert not same_bits(start, alone)
    assert [(tmp_path / f"{rank}" / "checkpoint.pt").exists() for rank in range(count)] == [True] + [False] * (
        count - 1
    )


def test_running_statistics_are_those_of_all(blobs, tmp_path):
    def net():
        torch.manual_seed(1)
        return nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))

    train, validation, alone, nets = blobs(48, 1), blobs(20, 2), net(), [net(), net()]
    train.images += np.linspace(0, 3, 48, dtype=np.float32)[:, None, None, None]
    config = settings(epochs=1)
    fit(alone, train, validation, config, tmp_path / "alone")
    together(2, lambda group: fit(nets[group.rank], train, validation, config, tmp_path / "two", group=group))
    assert same_bits(*nets)
    torch.testing.assert_close(nets[0][0].running_mean, alone[0].running_mean)
    assert nets[0][0].num_batches_tracked == alone[0].num_batches_tracked == 6


def test_resumed_ranks_end_with_the_same_bits(blobs, small_net, tmp_path):
    train, validation, config = blobs(41, 1), blobs(30, 2), settings(optimizer="adamw")
    net = nn.Sequential(*(layer for layer in small_net() if not isinstance(layer, nn.Dropout)))

    def run(folder, epochs):
        nets = [copy.deepcopy(net), copy.deepcopy(net)]
        wanted = config.model_copy(update={"epochs": epochs, "schedule": "constant"})
        together(2, lambda group: fit(nets[group.rank], train, validation, wanted, tmp_path / folder, group=group))
        state = torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)
        return nets, state["net"]

    whole, wanted = run("whole", 4)
    run("cut", 2)
    resumed, found = run("cut", 4)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert same_bits(whole[0], resumed[0])
    assert same_bits(whole[0], resumed[1])
    alone = copy.deepcopy(net)
    config = config.model_copy(update={"epochs": 4, "schedule": "constant"})
    history = fit(alone, train, validation, config, tmp_path / "cut", on_batch=pytest.fail)
    assert len(history.records) == 4, "one process reads what ranks have made, and finds nothing to do"
    assert same_bits(whole[0], alone)


def test_a_rank_that_leaves_ends_the_others_and_keeps_the_checkpoint(blobs, tmp_path):
    train, validation, nets = blobs(41, 1), blobs(30, 2), [plain_net(), plain_net()]

    class Gone(Exception):
        pass

    def work(group):
        def on_batch(done, of):
            if group.rank == 1 and len(epochs) == 1 and done == 2:
                raise Gone

        epochs = []
        return fit(
            nets[group.rank], train, validation, settings(), tmp_path, group=group,
            on_batch=on_batch, on_epoch=epochs.append,
        )  # fmt: skip

    begun_s = time.monotonic()
    left, gone = together(2, work, timeout_s=60)
    assert time.monotonic() - begun_s < 30
    assert isinstance(gone, Gone)
    assert isinstance(left, PeerLost)
    assert "Connection closed by peer" in str(left) or "Connection reset" in str(left)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert '"epoch":1' in kept["history"]
    assert '"epoch":2' not in kept["history"]


def test_who_does_not_come_or_says_nothing_is_not_waited_for(tmp_path):
    with (
        pytest.raises(PeerLost, match=r"not all 2 ranks came within 0\.5 s"),
        joined(0, 2, free_address(), "127.0.0.1", CPU, 0.5),
    ):
        pass
    done = threading.Event()

    def work(group):
        if group.rank == 1:
            assert done.wait(30)
            return None
        try:
            group.add([torch.ones(1)])
        finally:
            done.set()

    silent, _ = together(2, work, timeout_s=1.0)
    assert isinstance(silent, PeerLost)


def test_all_listeners_are_on_the_host():
    before = {c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN"}

    def work(group):
        group.add([torch.ones(1)])
        return {c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN"}

    listening = together(2, work)[0] - before
    assert listening
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_parts_that_are_too_small_are_refused(blobs, tmp_path):
    with pytest.raises(ValueError, match="ranks=5 are too many for batches of 8 examples; use fewer, or batch_size=10"):
        fit(plain_net(), blobs(40, 1), blobs(20, 2), settings(), tmp_path, group=Group(0, 5))
