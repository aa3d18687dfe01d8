"""Lets the ranks of one model find each other and form torch.distributed's world of their processes.

rank 0:  opens a store on a free port; the coordinator passes its address to the other ranks, which connect
all:     join the world through the store: gloo on CPU, NCCL on CUDA
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from workers.parallel.groups import COLLECTIVE_TIMEOUT, RankGroup

RENDEZVOUS = timedelta(minutes=2)  # for a rank to reach the store, which rank 0 has opened by then

Rendezvous = TCPStore


def create_store(host: str) -> tuple[Rendezvous, str]:
    """Open a store on a free port of this machine; also its address "host:port". For rank 0, which keeps it open."""
    store = Rendezvous(host, 0, is_master=True, wait_for_workers=False, timeout=RENDEZVOUS)
    return store, f"{host}:{store.port}"


def connect_store(address: str) -> Rendezvous:
    """Connect to rank 0's store. Raises RuntimeError if it can't be reached in time."""
    host, _, port = address.rpartition(":")
    return Rendezvous(host, int(port), is_master=False, timeout=RENDEZVOUS)


def own_device(rank: int) -> torch.device:
    """The device of a rank: one of the GPUs that its process sees, in turn, else the CPU."""
    count = torch.cuda.device_count()
    return torch.device("cuda", rank % count) if count else torch.device("cpu")


class World:
    """All ranks of a model, and this process's place among them."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._group = RankGroup(range(size), rank, dist.group.WORLD if size > 1 else None)

    def exchange(self, message: bytes) -> list[bytes]:
        """Gather every rank's message, in rank order. All ranks call it; meant for small messages."""
        return self._group.gather_bytes(message)

    def leave(self) -> None:
        """Close the connections. The other ranks may have left already."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join_world(store: Rendezvous, rank: int, size: int, *, timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """Become rank `rank` of `size`; returns when all ranks have joined. `timeout` also bounds every later collective.

    Raises RuntimeError if a rank does not join.
    """
    device = own_device(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device)
