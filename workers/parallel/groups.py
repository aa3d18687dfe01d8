"""Groups of ranks, and the collectives that sharded models need, some of them differentiable.

A group of one communicates nothing, so a model on one device runs without torch.distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from protocols.layout.topology import Topology

# Renamed in torch 2.13, which warns about the old name.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

COLLECTIVE_TIMEOUT = timedelta(minutes=5)  # how long a rank may keep the others waiting: longer than any computation


class RankGroup:
    """Global ranks in rising order, and this process's place among them."""

    def __init__(self, ranks: Sequence[int], rank: int, process_group: dist.ProcessGroup | None) -> None:
        self.ranks = tuple(ranks)
        self.index = self.ranks.index(rank)
        self.process_group = process_group  # None: a group of one

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its entrywise maximum over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.process_group)
        return tensor

    def gather_rows_(self, rows: Tensor) -> Tensor:
        """Fill `rows` [size, n], of which each rank has row `index`, in place: no second buffer is needed."""
        if self.size > 1:
            _all_gather_flat(rows.view(-1), rows[self.index], group=self.process_group)
        return rows

    def sum_rows(self, rows: Tensor) -> Tensor:
        """This rank's row [n] of the sum over the ranks of their `rows` [size, n]."""
        if self.size == 1:
            return rows[0]
        own = torch.empty_like(rows[0])
        _reduce_scatter_flat(own, rows.view(-1), group=self.process_group)
        return own

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        """Replace a tensor by that of global rank `source`."""
        if self.size > 1:
            dist.broadcast(tensor, source, group=self.process_group)
        return tensor

    def gather_bytes(self, message: bytes) -> list[bytes]:
        """Every rank's message, in the order of the ranks; small ones, which may differ in length."""
        if self.size == 1:
            return [message]
        device = "cuda" if dist.get_backend(self.process_group) == "nccl" else "cpu"
        lengths = torch.zeros(self.size, 1, dtype=torch.int64, device=device)
        lengths[self.index] = len(message)
        longest = int(self.gather_rows_(lengths).max())
        rows = torch.zeros(self.size, max(longest, 1), dtype=torch.uint8)
        rows[self.index, : len(message)] = torch.tensor(list(message), dtype=torch.uint8)
        rows = self.gather_rows_(rows.to(device)).cpu()
        return [row[:n].numpy().tobytes() for row, n in zip(rows, lengths.flatten().tolist(), strict=True)]

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a contiguous tensor to the rank at place `to` of the group, which calls `receive_`."""
        dist.send(tensor, self.ranks[to], group=self.process_group)

    def receive_(self, tensor: Tensor, source: int) -> None:
        """Fill a contiguous tensor with what the rank at place `source` of the group sends."""
        dist.recv(tensor, self.ranks[source], group=self.process_group)

    def wait(self, device: torch.device) -> None:
        """Return when all ranks have called."""
        self.sum_(torch.zeros(1, device=device))


def join_groups(partition: Sequence[Sequence[int]], rank: int) -> RankGroup:
    """Create every group of a partition of the ranks; return this rank's, or a group of itself where it is in none.

    Every process of the world calls this with the same partitions in the same order: torch waits for all of them.
    COLLECTIVE_TIMEOUT bounds each collective; by default torch would wait half an hour on gloo, whatever the world's
    timeout is.
    """
    own = RankGroup((rank,), rank, None)
    for ranks in partition:
        process_group = dist.new_group(list(ranks), timeout=COLLECTIVE_TIMEOUT) if len(ranks) > 1 else None
        if rank in ranks:  # only others are given an int, torch's sign of a non-member
            own = RankGroup(ranks, rank, None if isinstance(process_group, int) else process_group)
    return own


class ProcessGroups(NamedTuple):
    """The groups that one rank of a topology belongs to."""

    tensor: RankGroup  # the shards of its stage
    pipeline: RankGroup  # the stages of its replica, at its tensor index
    data: RankGroup  # its shard in the other replicas
    replica: RankGroup  # all of its replica
    tie: RankGroup  # the first and the last stage, for those two; where embeddings are tied across stages

    @classmethod
    def join(cls, topology: Topology, rank: int, tied_across_stages: bool = False) -> ProcessGroups:
        """Create them; every rank of the topology calls."""
        size = topology.replica_size
        replicas = [list(range(start, start + size)) for start in range(0, topology.world_size, size)]
        ends = [[ranks[0], ranks[-1]] for ranks in topology.pipeline_groups] if tied_across_stages else []
        partitions = (topology.tensor_groups, topology.pipeline_groups, topology.data_groups, replicas, ends)
        return cls(*(join_groups(partition, rank) for partition in partitions))


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum_(gradients[0].contiguous().clone()), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: RankGroup) -> Tensor:
        return group.sum_(tensor.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        rows = tensor.new_empty(group.size, tensor.numel())
        rows[group.index] = tensor.reshape(-1)
        parts = group.gather_rows_(rows).view(group.size, *tensor.shape)
        return torch.cat(parts.unbind(), dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].chunk(ctx.group.size, dim=-1)[ctx.group.index], None


def copied(tensor: Tensor, group: RankGroup) -> Tensor:
    """Identity in the forward pass; sums the gradients of the ranks in the backward pass."""
    return _Copied.apply(tensor, group) if group.size > 1 else tensor  # pyright: ignore[reportReturnType]


def summed(tensor: Tensor, group: RankGroup) -> Tensor:
    """The sum over the ranks, on all of them; in the backward pass each gets the gradient of the sum."""
    return _Summed.apply(tensor, group) if group.size > 1 else tensor  # pyright: ignore[reportReturnType]


def joined(tensor: Tensor, group: RankGroup) -> Tensor:
    """Concatenate the ranks' [..., n] to [..., size x n], on all; in the backward pass each gets the gradient's slice.

    All ranks must compute the same loss from it: its gradient is taken once, not summed over the ranks.
    """
    return _Joined.apply(tensor, group) if group.size > 1 else tensor  # pyright: ignore[reportReturnType]
