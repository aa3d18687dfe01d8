"""The ranks of one model find each other, and then form torch.distributed's world of their processes.

rank 0:  hosts a meeting (a store on a port of its own) --its address, by way of the front--> the others visit it
all:     join the world through it: gloo on CPU, NCCL on CUDA
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from workers.parallel.groups import COLLECTIVE_TIMEOUT, RankGroup

RENDEZVOUS = timedelta(minutes=2)  # for a visitor to reach it; rank 0 has opened it by then

Rendezvous = TCPStore


def create_store(host: str) -> tuple[Rendezvous, str]:
    """A place to meet on a free port of this machine, and its address "host:port". For rank 0, which keeps it open."""
    meeting = Rendezvous(host, 0, is_master=True, wait_for_workers=False, timeout=RENDEZVOUS)
    return meeting, f"{host}:{meeting.port}"


def connect_store(address: str) -> Rendezvous:
    """The place that rank 0 hosts. Raises RuntimeError where nobody is there in time."""
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
        """What every rank says, in their order. All call it; meant for small messages."""
        return self._group.gather_bytes(message)

    def leave(self) -> None:
        """Give up the connections. The other ranks may have gone already."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join_world(meeting: Rendezvous, rank: int, size: int, *, timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """Become rank `rank` of `size`; returns when all have. `timeout` bounds this, and later every collective.

    Raises RuntimeError where a rank does not come.
    """
    device = own_device(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device)
