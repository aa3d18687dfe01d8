"""Which ranks a generation layout regroups, whatever backend trains on them. Torch-free."""

from __future__ import annotations

from protocols.topology import GenerationGrouping, Topology
from workers.settings import Backend


def generating_topology(backend: Backend, topology: Topology) -> Topology:
    """The topology whose ranks a generation layout regroups.

    Fully sharded ranks own parts of every matrix, cut as tensor shards are: they regroup as if they were S tensor
    ranks, and so may generate with any number of tensor shards that divides S.
    """
    if backend == "fsdp" and topology.replica_size == 1:
        return Topology(1, topology.dp, 1)
    return topology


def generation_grouping(backend: Backend, topology: Topology, layout: Topology) -> GenerationGrouping:
    """The ranks of a topology as they generate in a layout p-t. Raises ValueError where that does not divide."""
    return GenerationGrouping(generating_topology(backend, topology), layout.pp, layout.tp)
