"""How a role's ranks share its model: which module each holds, and what the replicas divide.

word    weights      gradient     moments       of a rank, in shares of its stage's tensor shard
3d      1            1            1             replicas alike
zero1   1            1            1/d
zero2   1            1/d          1/d
fsdp    1/d          1/d          1/d

Bytes per parameter, without activations; moments are AdamW's two, and masters are stepped where they are:

dtype      3d, one device     zero1              zero2           fsdp
float32    4 + 4 + 8          4 + 4 + 12 / d     4 + 12 / d      16 / d     weights + gradient + moments
bfloat16   2 + 4 + 4 + 8      2 + 4 + 16 / d     2 + 16 / d      16 / d     weights + gradient + masters + moments

A rank holds a `DecoderShard` where p or t cuts the model, where a hybrid engine regroups the ranks, and on several
ranks of a family that has a sharding plan. Otherwise it holds a `WholeModule`: one device, other families, adapters.
"""

from __future__ import annotations

from transformers import AutoConfig

from protocols.layout.topology import Backend
from workers.parallel.fully_sharded import FullyShardedModel
from workers.parallel.model import ParallelModel
from workers.parallel.plan import Head, has_plan
from workers.parallel.sharding import Sharding
from workers.parallel.whole_module import WholeModule
from workers.parallel.zero import Zero1Model, Zero2Model
from workers.settings import Model
from workers.training.models import DTYPES, LOCAL_ONLY

_MODELS: dict[Backend, type[ParallelModel]] = {
    "3d": ParallelModel,
    "zero1": Zero1Model,
    "zero2": Zero2Model,
    "fsdp": FullyShardedModel,
}


def trained_model(
    model: Model,
    sharding: Sharding,
    *,
    head: Head = "tokens",
    seed: int | None = None,
    regrouped: bool = False,
    trains: bool = True,
) -> ParallelModel:
    """This rank's part of a model to train, from its folder; with one replica all backends are the same.

    `seed` decides the adapters, and the score head of a folder without one; without a seed the folder needs it.
    `regrouped`: a hybrid engine generates with these ranks in another layout, so they hold shards of a decoder. Raises
    ValueError, with the numbers, where model, topology and torch.distributed's world don't fit.
    """
    topology, module = sharding.topology, None
    if not _is_cut(model, sharding, regrouped):
        module = WholeModule(model, sharding, head, seed, trains=trains)
    elif model.lora.rank:
        raise ValueError(f"lora: adapters train on ranks that hold the model whole, {topology} cuts it: want 1-1-d")
    kind = _MODELS[sharding.backend] if topology.dp > 1 else ParallelModel
    return kind(
        model.path, topology, head=head, dtype=DTYPES[model.dtype], device=sharding.device,
        recompute=sharding.recompute, head_chunk=model.head_chunk, attention=model.attention, trains=trains,
        module=module,
    )  # fmt: skip


def frozen_model(model: Model, sharding: Sharding, *, head: Head = "tokens") -> ParallelModel:
    """This rank's part of a model that only answers, without gradients. Raises as `trained_model` does."""
    backend = "fsdp" if sharding.backend == "fsdp" else "3d"  # ZeRO divides what only training needs
    return trained_model(model, sharding._replace(backend=backend, recompute=False), head=head, trains=False)


def _is_cut(model: Model, sharding: Sharding, regrouped: bool) -> bool:
    """Whether the ranks hold shards of a decoder, by its family's plan."""
    if sharding.topology.replica_size > 1 or regrouped:
        return True
    if sharding.topology.dp == 1 or model.lora.rank:
        return False
    return has_plan(AutoConfig.from_pretrained(model.path, **LOCAL_ONLY).to_dict())
