"""How a role's ranks share its model: which module each holds, and what the replicas divide.

word    weights      gradient     moments       of a rank, in shares of its stage's tensor shard
3d      1            1            1             replicas alike
zero1   1            1            1/d
zero2   1            1/d          1/d
fsdp    1/d          1/d          1/d

A rank holds a `DecoderShard` where p or t cuts the model, where a hybrid engine regroups the ranks, and on several
ranks of a family that has a sharding plan. Otherwise it holds a `WholeModule`: one device, other families, adapters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from protocols.layout.topology import Backend, Topology
from workers.parallel.fully_sharded import FullyShardedModel
from workers.parallel.model import ParallelModel
from workers.parallel.plan import Head, has_plan
from workers.parallel.sharding import Sharding
from workers.parallel.whole_module import WholeModule
from workers.parallel.zero import ZeroModel
from workers.settings import Lora, Model
from workers.training.models import DTYPES


def trained_model(
    model: Model, sharding: Sharding, *, head: Head = "tokens", seed: int = 0, regrouped: bool = False
) -> ParallelModel:
    """This rank's part of a model to train, from its folder. `seed` and `regrouped`: see parallel_model.

    Raises ValueError, with the numbers, where model, topology and torch.distributed's world don't fit.
    """
    return parallel_model(
        sharding.backend, model.path, sharding.topology, head=head, dtype=DTYPES[model.dtype], device=sharding.device,
        recompute=sharding.recompute, lora=model.lora, seed=seed, regrouped=regrouped,
    )  # fmt: skip


def frozen_model(model: Model, sharding: Sharding, *, head: Head = "tokens") -> ParallelModel:
    """This rank's part of a model that only answers, without gradients. Raises as `trained_model` does."""
    own = parallel_model(
        "3d", model.path, sharding.topology, head=head, dtype=DTYPES[model.dtype], device=sharding.device
    )
    own.freeze()
    return own


def parallel_model(
    backend: Backend,
    folder: str | Path,
    topology: Topology,
    *,
    head: Head = "tokens",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    recompute: bool = False,
    lora: Lora | None = None,
    seed: int | None = None,
    regrouped: bool = False,
) -> ParallelModel:
    """This rank's part of a model; most arguments are ParallelModel's. With one replica all words mean the same.

    `seed` decides adapters, and the score head of a folder without one; a model without a seed needs such a head.
    `regrouped`: a hybrid engine generates with these ranks in another layout, so they hold shards of a decoder.
    """
    module = None
    if not _is_cut(folder, topology, lora, regrouped):
        module = WholeModule(folder, head, dtype, device, lora=lora, seed=seed, recompute=recompute)
    elif lora is not None and lora.rank:
        raise ValueError(f"lora: adapters train on ranks that hold the model whole, {topology} cuts it: want 1-1-d")
    if topology.dp == 1 or backend == "3d":
        return ParallelModel(
            folder, topology, head=head, dtype=dtype, device=device, recompute=recompute, module=module
        )
    if backend == "fsdp":
        return FullyShardedModel(
            folder, topology, head=head, dtype=dtype, device=device, recompute=recompute, module=module
        )
    return ZeroModel(
        folder, topology, stage=1 if backend == "zero1" else 2, head=head, dtype=dtype, device=device,
        recompute=recompute, module=module,
    )  # fmt: skip


def _is_cut(folder: str | Path, topology: Topology, lora: Lora | None, regrouped: bool) -> bool:
    """Whether the ranks hold shards of a decoder, by its family's plan."""
    if topology.replica_size > 1 or regrouped:
        return True
    if topology.dp == 1 or (lora is not None and lora.rank):
        return False
    return has_plan(AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False).to_dict())
