"""Topologies: the coordinates of ranks in 3D-parallel training, and how the ranks regroup for generation.

Rank r of a p-t-d topology is r = dp·(p·t) + pp·t + tp: tensor ranks are neighbours, then pipeline stages, then
data-parallel replicas. All ranks are 0-based and global.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from fractions import Fraction
from typing import Literal, get_args

import msgspec

Style = Literal["vanilla", "hybridflow", "deepspeed"]
Backend = Literal["3d", "fsdp", "zero1", "zero2"]  # how the ranks of a model divide it


class Coordinates(msgspec.Struct, frozen=True, order=True):
    """A rank's coordinates in training: pipeline stage, tensor index, data-parallel replica."""

    pp: int
    tp: int
    dp: int


class GenerationCoordinates(msgspec.Struct, frozen=True, order=True):
    """A rank's coordinates in generation: stage and tensor index of its shard, micro-DP index, training replica."""

    pp: int
    tp: int
    micro_dp: int
    dp: int


class Topology(msgspec.Struct, frozen=True):
    """p pipeline stages, t tensor shards, d data-parallel replicas. Raises ValueError for a size below 1."""

    pp: int = 1
    tp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        if min(self.pp, self.tp, self.dp) < 1:
            raise ValueError(f"topology {self}: every size of p-t-d is at least 1")

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Parse "p-t-d", or "p-t" for one replica. Raises ValueError naming the text."""
        sizes = text.strip().split("-")
        if len(sizes) not in (2, 3) or not all(size.isascii() and size.isdigit() for size in sizes):
            raise ValueError(f"topology {text!r}: write p-t-d, e.g. 1-2-2")
        return cls(*map(int, sizes))

    def __str__(self) -> str:
        return f"{self.pp}-{self.tp}-{self.dp}"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pp * self.tp * self.dp

    @property
    def replica_size(self) -> int:
        """Ranks of one data-parallel replica, which holds the model once."""
        return self.pp * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of a rank. Raises ValueError for a rank that the topology does not have."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not among the {self.world_size} ranks of topology {self}")
        dp, within = divmod(rank, self.replica_size)
        pp, tp = divmod(within, self.tp)
        return Coordinates(pp, tp, dp)

    def rank(self, coordinates: Coordinates) -> int:
        """The rank at these coordinates. Raises ValueError for coordinates outside the topology."""
        pp, tp, dp = coordinates.pp, coordinates.tp, coordinates.dp
        if not (0 <= pp < self.pp and 0 <= tp < self.tp and 0 <= dp < self.dp):
            raise ValueError(f"pp {pp}, tp {tp}, dp {dp} lies outside topology {self}")
        return dp * self.replica_size + pp * self.tp + tp

    @property
    def tensor_groups(self) -> list[list[int]]:
        """Ranks that share a stage of a replica."""
        return group_ranks(self.world_size, lambda r: ((c := self.coordinates(r)).dp, c.pp))

    @property
    def pipeline_groups(self) -> list[list[int]]:
        """Ranks that hold the same tensor index through the stages of a replica."""
        return group_ranks(self.world_size, lambda r: ((c := self.coordinates(r)).dp, c.tp))

    @property
    def data_groups(self) -> list[list[int]]:
        """Ranks that hold the same shard in different replicas."""
        return group_ranks(self.world_size, lambda r: ((c := self.coordinates(r)).pp, c.tp))


class GenerationGrouping(msgspec.Struct, frozen=True):
    """How the ranks of `topology` generate with `pp` stages and `tp` tensor shards.

    A training replica of p·t ranks becomes micro_dp = p·t / (pp·tp) generation replicas. The styles differ in the shard
    that a rank generates with: "vanilla" and "deepspeed" number the ranks consecutively, "hybridflow" gives each rank a
    shard that contains the one it trains (HybridFlow, section 5.3). Raises ValueError if pp does not divide p, tp does
    not divide t, or the style is unknown.
    """

    topology: Topology
    pp: int = 1
    tp: int = 1
    style: Style = "hybridflow"

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            raise ValueError(f"grouping style {self.style!r}: know {', '.join(get_args(Style))}")
        for axis, size, whole in (("pp", self.pp, self.topology.pp), ("tp", self.tp, self.topology.tp)):
            if size < 1 or whole % size:
                raise ValueError(
                    f"generation {axis} {size} does not divide training {axis} {whole} of topology {self.topology}"
                )

    @property
    def micro_dp(self) -> int:
        """Generation replicas in one training replica."""
        return self.topology.replica_size // (self.pp * self.tp)

    def coordinates(self, rank: int) -> GenerationCoordinates:
        """The coordinates of a rank in generation. Raises ValueError for a rank that the topology does not have."""
        at = self.topology.coordinates(rank)
        if self.style == "hybridflow":
            stages, shards = self.topology.pp // self.pp, self.topology.tp // self.tp  # of training, per one here
            micro = at.pp % stages * shards + at.tp % shards
            return GenerationCoordinates(at.pp // stages, at.tp // shards, micro, at.dp)
        micro, within = divmod(at.pp * self.topology.tp + at.tp, self.pp * self.tp)
        pp, tp = divmod(within, self.tp)
        return GenerationCoordinates(pp, tp, micro, at.dp)

    @property
    def tensor_groups(self) -> list[list[int]]:
        """Ranks that share one stage of one generation replica."""
        return self._groups(lambda c: (c.dp, c.micro_dp, c.pp))

    @property
    def pipeline_groups(self) -> list[list[int]]:
        """Ranks that hold the same tensor index through the stages of one generation replica."""
        return self._groups(lambda c: (c.dp, c.micro_dp, c.tp))

    @property
    def micro_dp_groups(self) -> list[list[int]]:
        """Ranks of a training replica that generate with the same shard, in different generation replicas."""
        return self._groups(lambda c: (c.dp, c.pp, c.tp))

    def received_bytes(self, m: int) -> Fraction:
        """Most bytes that a rank receives in the transition from training to generation, for m parameter bytes.

        (tpd-1)/tpd·m for deepspeed (gathers from every rank), (tp-1)/tp·m for vanilla (gathers the replica),
        and for hybridflow what a rank needs less what it owns: (1/(t_g·p_g) - 1/(t·p))·m (paper, table 2).
        """
        if self.style == "hybridflow":
            return max(self._needed(m) - self._kept(rank, m) for rank in range(self.topology.world_size))
        return m - self._owned(m)

    def _groups(self, key: Callable[[GenerationCoordinates], Hashable]) -> list[list[int]]:
        return group_ranks(self.topology.world_size, lambda rank: key(self.coordinates(rank)))

    def _owned(self, m: int) -> Fraction:
        ranks = self.topology.world_size if self.style == "deepspeed" else self.topology.replica_size
        return Fraction(m, ranks)

    def _needed(self, m: int) -> Fraction:
        return Fraction(m, self.pp * self.tp)

    def _kept(self, rank: int, m: int) -> Fraction:
        """Bytes of a rank's training shard that its generation shard contains: the overlap of two tiles."""
        train, generate = self.topology.coordinates(rank), self.coordinates(rank)
        layers = _overlap(train.pp, self.topology.pp, generate.pp, self.pp)
        columns = _overlap(train.tp, self.topology.tp, generate.tp, self.tp)
        return m * layers * columns


def group_ranks(world_size: int, key: Callable[[int], Hashable]) -> list[list[int]]:
    """Groups of ranks with equal keys, ordered by their first rank; each group is in rank order."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for rank in range(world_size):
        groups[key(rank)].append(rank)
    return sorted(groups.values())


def _overlap(i: int, n: int, j: int, k: int) -> Fraction:
    """Overlap of the i-th of n equal parts of the unit interval with the j-th of k equal parts."""
    start, stop = max(Fraction(i, n), Fraction(j, k)), min(Fraction(i + 1, n), Fraction(j + 1, k))
    return max(stop - start, Fraction(0))


def generating_topology(backend: Backend, topology: Topology) -> Topology:
    """The topology whose ranks a generation layout regroups.

    Each of S fully sharded ranks owns a part of every matrix, as tensor ranks do. So they regroup like S tensor ranks,
    and can generate with any number of tensor shards that divides S.
    """
    if backend == "fsdp" and topology.replica_size == 1:
        return Topology(1, topology.dp, 1)
    return topology


def generation_grouping(backend: Backend, topology: Topology, layout: Topology) -> GenerationGrouping:
    """How the ranks of a topology generate in a layout p-t. Raises ValueError if the layout does not divide it."""
    return GenerationGrouping(generating_topology(backend, topology), layout.pp, layout.tp)
