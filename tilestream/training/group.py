"""The processes that train one network together: gradients are added up, what rank 0 has is shared."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

_dist: Any = torch.distributed  # its stubs lack what makes a group that is not global


class PeerLost(RuntimeError):
    """Another process of the group is gone, or was silent for too long."""


@dataclass
class Group:
    """This process is number `rank` of `count`; alone unless made by `joined`."""

    rank: int = 0
    count: int = 1
    backends: dict[str, Any] = field(default_factory=dict, repr=False)
    """By type of device."""

    def part(self, items: np.ndarray) -> np.ndarray:
        """This process's share of items (n, ...): in order, of equal size up to one."""
        return np.array_split(items, self.count)[self.rank]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all processes: the same bits in each; one message for all of them."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        self._done(self.backends[flat.device.type].allreduce([flat], _dist.AllreduceOptions()))
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        with torch.no_grad():
            for tensor, total in zip(tensors, parts, strict=True):
                tensor.copy_(total.view(tensor.shape))

    def share(self, value: Any) -> Any:
        """What rank 0 calls this with: tensors on the CPU, numbers, texts, in tuples and mappings."""
        if self.count == 1:
            return value
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).clone()
        size = torch.tensor([len(data) if self.rank == 0 else 0])
        self.add([size])
        data = data if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        self._done(self.backends["cpu"].broadcast([data], _dist.BroadcastOptions()))
        return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)

    def _done(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:  # gloo names its own file and line, then the reason
            raise PeerLost(str(error).partition("] ")[2].partition(". This")[0] or str(error)) from None


ALONE = Group()


@contextmanager
def joined(
    rank: int, count: int, address: tuple[str, int], host: str, device: torch.device, timeout_s: float
) -> Iterator[Group]:
    """The group of `count` processes that meet at rank 0's `address`; left when the context is.

    On the CPU they speak by gloo, and gradients on GPUs by NCCL. Every listener is bound to `host`, this machine's
    address for the others, nothing is encrypted or authenticated: it is for loopback, or a private network.

    Raises PeerLost when not all of them come within `timeout_s` seconds, and from what the group is asked for when
    one of them is gone, or silent for as long.
    """
    if count == 1:
        yield ALONE
        return
    limit = timedelta(seconds=timeout_s)
    group, store, listener = Group(rank, count), None, None
    try:
        try:
            if rank == 0:  # by itself TCPStore would listen on every interface
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                listener = socket.create_server(address, family=family, backlog=count).detach()
            store = _dist.TCPStore(
                *address, count, rank == 0, timeout=limit, wait_for_workers=False, master_listen_fd=listener
            )
            options = _dist.ProcessGroupGloo._Options()
            options._timeout, options._threads = limit, 1
            options._devices = [_dist.ProcessGroupGloo.create_device(hostname=host)]
            group.backends["cpu"] = _dist.ProcessGroupGloo(_dist.PrefixStore("cpu", store), rank, count, options)
            if device.type == "cuda":
                fast = _dist.ProcessGroupNCCL.Options()
                fast._timeout = limit
                group.backends["cuda"] = _dist.ProcessGroupNCCL(_dist.PrefixStore("cuda", store), rank, count, fast)
        except (RuntimeError, OSError) as error:
            raise PeerLost(f"not all {count} ranks came within {timeout_s:g} s ({str(error)[:200]})") from None
        yield group
    finally:
        group.backends.clear()  # closes connections, so that the others notice at once
        del store
