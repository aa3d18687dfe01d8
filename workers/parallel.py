"""A model trained by p-t-d ranks as if by one: losses, gradients and their norm are those of the whole batch.

    rows of a replica --micro-batches--> stage 0 --> ... --> stage p-1 --loss--> backward, 1F1B
      --> gradients: summed over d, over both ends of a tie, clipped by their global norm --> the caller's optimizer

Each rank of a replica is given the replica's rows; the replicas' rows together are the batch. Nothing is averaged:
a loss weighs its tokens by global denominators (`share`), so sums over micro-batches and replicas are the batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from protocols.columns import Jagged
from protocols.topology import Topology
from workers.models import MicroBatch, Sequences, micro_batches
from workers.sharding.decoder import DecoderShard, unflat
from workers.sharding.folder import read_shard
from workers.sharding.groups import PATIENCE, RankGroup, join_groups
from workers.sharding.pipeline import Pipeline
from workers.sharding.plan import TOKEN_HEAD, Decoder, Head, Parameter, ShardPlan

# Of the last stage's outputs ([n, L, V] logits, or [n, L, 1] values or scores) and their micro-batch:
Loss = Callable[[Tensor, MicroBatch], Tensor]  # a scalar, in global weights
Read = Callable[[Tensor, MicroBatch], Tensor]  # what to keep of them

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "attn_implementation": "eager"}


class Groups(NamedTuple):
    """The groups that one rank belongs to."""

    tensor: RankGroup  # shards of its stage
    pipeline: RankGroup  # stages of its replica, with its tensor index
    data: RankGroup  # its shard in the other replicas
    replica: RankGroup  # all of its replica
    tie: RankGroup  # the first and the last stage, for those two; where embeddings are tied across stages


class _OwnParameter(NamedTuple):
    """A parameter with its place in the flat gradient."""

    spec: Parameter
    tensor: nn.Parameter
    start: int
    stop: int


class ParallelModel:
    """One rank's part of a model, and the collective operations that all ranks of the topology call together.

    The world of torch.distributed (gloo or NCCL) is the topology's; a topology of one rank needs none. `folder` is a
    transformers folder, of which the rank reads its shard only; `recompute` keeps one activation per layer and
    computes the others again in the backward pass; `timeout` bounds every collective.
    Raises ValueError, with the numbers, where model, topology and world don't fit.
    """

    def __init__(
        self,
        folder: str | Path,
        topology: Topology,
        *,
        head: Head = "tokens",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        recompute: bool = False,
        timeout: timedelta = PATIENCE,
    ) -> None:
        self.topology = topology
        self.rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if world != topology.world_size:
            raise ValueError(f"topology {topology} has {topology.world_size} ranks, torch.distributed has {world}")
        self.place = topology.coordinates(self.rank)
        self.dtype, self.device, self.timeout = dtype, torch.device(device), timeout
        self.config = AutoConfig.from_pretrained(str(folder), **_LOCAL)
        self.plan = plan_of(self.config, topology, head)
        self.groups = _join(topology, self.rank, self.plan.tied_across_stages, timeout)
        self.shard = DecoderShard(self.config, self.plan, self.place.pp, self.groups.tensor, recompute)
        tensors = read_shard(folder, self.plan, self.place.pp, self.place.tp, dtype=dtype, device=self.device)
        self.parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
        self.shard.install(self.parameters)
        self._own = list(_placed(self.plan.parameters(self.place.pp), self.parameters))
        self._pipeline = Pipeline(self.shard, self.groups.pipeline, dtype, self.device)
        self._gradient: Tensor | None = None

    @property
    def answers(self) -> bool:
        """Whether this rank's outputs are its replica's, as the protocols collect them: last stage, tensor index 0."""
        return self.shard.is_last and self.place.tp == 0

    def share(self, count: float) -> float:
        """This replica's part of what all replicas count (0 where that is nothing): a local mean times its share.

        `token_weights` divides by the replica's own tokens or rows; times the share, it divides by the batch's.
        """
        total = float(self.groups.data.sum_(torch.tensor(count, dtype=torch.float64, device=self.device)))
        return count / total if total else 0.0

    def backward(self, data: Sequences, budget: int, loss: Loss) -> float:
        """Set every parameter's `grad` to the gradient of the batch's loss, and return that loss, on every rank.

        `data` are the rows of this replica, perhaps none; `budget` is in padded tokens a micro-batch. All replicas run
        as many micro-batches as the longest; those that have no rows left run one token of weight zero.
        """
        batches, real = self._agreed(data, budget)
        self._attach_gradient()

        def weighed(micro: int, outputs: Tensor) -> Tensor:
            return loss(outputs, batches[micro]) if micro < real else (outputs * 0.0).sum()

        total = self._pipeline.train(batches, weighed)
        self._reduce_gradient()
        counted = total if self.shard.is_last and self.place.tp == 0 else 0.0
        return self.sum_over_world(counted)

    def forward(self, data: Sequences, budget: int, read: Read) -> list[Tensor]:
        """What `read` keeps of each micro-batch's outputs, in order, on the last stage; an empty list on the others."""
        batches, real = self._agreed(data, budget)
        kept = self._pipeline.forward(batches, lambda i, o: read(o, batches[i]) if i < real else o.new_empty(0))
        return kept[:real]

    def clip_gradient(self, limit: float) -> float:
        """Scale the gradient to a global norm of `limit` at most; returns the norm before, on every rank.

        Parameters that several ranks hold count once. `limit` may be infinite.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for own in self._own:
            if self._counts(own.spec) and own.tensor.grad is not None:
                squares += own.tensor.grad.double().square().sum()
        norm = float(self.groups.replica.sum_(squares).sqrt())
        if self._gradient is not None:
            self._gradient.mul_(min(1.0, limit / (norm + 1e-6)))
        return norm

    def release_gradient(self) -> None:
        """Free the gradient's memory; `backward` takes it anew."""
        self._gradient = None
        for own in self._own:
            own.tensor.grad = None

    def _agreed(self, data: Sequences, budget: int) -> tuple[list[MicroBatch], int]:
        """This replica's micro-batches, filled up to the largest number of any replica, and how many are real."""
        batches = list(micro_batches(data, budget))
        real = len(batches)
        most = int(self.groups.data.max_(torch.tensor(real, device=self.device)))
        return batches + [_one_token() for _ in range(most - real)], real

    def _attach_gradient(self) -> None:
        """One flat buffer whose views are the parameters' gradients: replicas sum it in a single collective."""
        if self._gradient is None:
            self._gradient = torch.zeros(self._own[-1].stop, dtype=self.dtype, device=self.device)
        self._gradient.zero_()
        for own in self._own:
            entries = self._gradient[own.start : own.stop]
            own.tensor.grad = unflat(entries, own.spec, tuple(own.tensor.shape))

    def _reduce_gradient(self) -> None:
        assert self._gradient is not None
        if self.groups.tensor.size > 1:
            self._sum_parts([own for own in self._own if own.spec.partial])
        self.groups.data.sum_(self._gradient)
        if self.groups.tie.size > 1:
            self.groups.tie.sum_(self._entries(self._tied()))

    def _sum_parts(self, parts: list[_OwnParameter]) -> None:
        """Each rank of a stage has seen its own heads only: the norms that all heads share get the sum, in one go."""
        if not parts:
            return
        together = self.groups.tensor.sum_(torch.cat([self._entries(own) for own in parts]))
        for own, summed in zip(parts, together.split([own.stop - own.start for own in parts]), strict=True):
            self._entries(own).copy_(summed)

    def _entries(self, own: _OwnParameter) -> Tensor:
        assert self._gradient is not None
        return self._gradient[own.start : own.stop]

    def _tied(self) -> _OwnParameter:
        return self._own[0] if self.shard.is_first else self._own[-1]  # the embedding; the head

    def _counts(self, spec: Parameter) -> bool:
        """Whether this rank is the one that counts a parameter in the norm."""
        if spec.name == TOKEN_HEAD and self.plan.tied_across_stages:
            return False
        return spec.cut is not None or self.place.tp == 0

    def sum_over_world(self, value: float) -> float:
        """The sum of all ranks' values, on each of them. It returns when all have called."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        return float(self.groups.data.sum_(self.groups.replica.sum_(total)))


def plan_of(config: PretrainedConfig, topology: Topology, head: Head = "tokens") -> ShardPlan:
    """How a model is cut by p and t of a topology. Raises ValueError, with the numbers, where it can't be."""
    return ShardPlan(Decoder.of(config.to_dict(), head), topology.pp, topology.tp)


def _join(topology: Topology, rank: int, tied_across_stages: bool, timeout: timedelta) -> Groups:
    size = topology.replica_size
    replicas = [list(range(start, start + size)) for start in range(0, topology.world_size, size)]
    ends = [[ranks[0], ranks[-1]] for ranks in topology.pipeline_groups] if tied_across_stages else []
    partitions = (topology.tensor_groups, topology.pipeline_groups, topology.data_groups, replicas, ends)
    return Groups(*(join_groups(partition, rank, timeout) for partition in partitions))


def _placed(specs: tuple[Parameter, ...], tensors: dict[str, nn.Parameter]) -> Iterator[_OwnParameter]:
    start = 0
    for spec in specs:
        tensor = tensors[spec.name]
        yield _OwnParameter(spec, tensor, start, start + tensor.numel())
        start += tensor.numel()


class _OneToken(NamedTuple):
    """A row that means nothing."""

    prompts: Jagged
    responses: Jagged


def _one_token() -> MicroBatch:
    nothing = np.zeros(0, np.int32)
    row = _OneToken(Jagged.from_rows([[0]], np.int32), Jagged.from_rows([nothing], np.int32))
    return MicroBatch(row, np.arange(1))
