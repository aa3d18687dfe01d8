"""What trains a model on many ranks: one word chooses how the replicas hold its state.

word    weights      gradient     moments       of a rank, in shares of its stage's tensor shard
3d      1            1            1             replicas alike
zero1   1            1            1/d
zero2   1            1/d          1/d
fsdp    1/d          1/d          1/d
"""

from __future__ import annotations

from pathlib import Path

import torch

from protocols.layout.topology import Backend, Topology, generating_topology
from workers.parallel.fully_sharded import FullyShardedModel
from workers.parallel.model import ParallelModel
from workers.parallel.plan import Head
from workers.parallel.zero import ZeroModel

__all__ = ["generating_topology", "parallel_model"]


def parallel_model(
    backend: Backend,
    folder: str | Path,
    topology: Topology,
    *,
    head: Head = "tokens",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    recompute: bool = False,
) -> ParallelModel:
    """This rank's part of a model; the arguments are ParallelModel's. With one replica all words mean the same."""
    if topology.dp == 1 or backend == "3d":
        return ParallelModel(folder, topology, head=head, dtype=dtype, device=device, recompute=recompute)
    if backend == "fsdp":
        return FullyShardedModel(folder, topology, head=head, dtype=dtype, device=device, recompute=recompute)
    stage = 1 if backend == "zero1" else 2
    return ZeroModel(folder, topology, stage=stage, head=head, dtype=dtype, device=device, recompute=recompute)
