"""Bringing a sharded model together on one rank, under the names of its checkpoint.

For what leaves the system whole: a publication, an exported folder. Nobody but the first rank holds more than its
shard, and it holds the whole on the host.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.sharding.decoder import flat, unflat
from workers.sharding.groups import RankGroup
from workers.sharding.plan import ShardPlan


@torch.no_grad()
def collect_whole(plan: ShardPlan, replica: RankGroup, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors on the first rank of a replica, contiguous in host memory; on the others an empty dict.

    All ranks of the replica call, with their shards laid out along their cut; ranks stand stage by stage in it. A
    tied head is left out: it is the embedding.
    """
    found: dict[str, Tensor] = {}
    replica.wait(next(iter(parameters.values())).device)  # NCCL wants all of them in a group's first operation
    for spec in ShardPlan(plan.decoder).parameters(0):
        first = plan.stage_of(spec) * plan.tp
        owners = range(first, first + (plan.tp if spec.cut is not None else 1))
        own = flat(parameters[spec.name].detach(), spec) if replica.index in owners else None
        if replica.index == 0:
            like = next(iter(parameters.values()))
            entries = torch.empty(spec.elements, dtype=like.dtype, device=like.device)
            for owner, chunk in zip(owners, entries.chunk(len(owners)), strict=True):
                if owner == 0 and own is not None:
                    chunk.copy_(own)
                else:
                    replica.receive_(chunk, owner)
            found[spec.name] = unflat(entries, spec, spec.shape).contiguous().cpu()
        elif own is not None:
            replica.send(own, 0)
    return found
