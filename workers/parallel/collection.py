"""Collects a model on one rank, under the names of its checkpoint, for a publication or an exported folder.

Only the first rank ever holds more than its shard, and it holds the whole in host memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workers.parallel.decoder import flat, unflat
from workers.parallel.groups import RankGroup
from workers.parallel.plan import ShardPlan
from workers.parallel.whole_module import WholePlan


@torch.no_grad()
def collect_whole(
    plan: ShardPlan | WholePlan,
    replica: RankGroup,
    shard: Callable[[str], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    *,
    first: bool,
    wanted: Callable[[str], bool],
) -> dict[str, Tensor]:
    """The whole tensors on the first rank of the first replica, contiguous in host memory; elsewhere an empty dict.

    All ranks of all replicas call. `shard` gives a parameter's shard, laid out along its cut, on this stage and tensor
    index; replicas that share the shards with the first join the all-gather, and nothing else.
    Ranks stand stage by stage in their replica. A tied head is left out: it is the embedding. `wanted` chooses
    parameters by name. A tensor that this rank holds whole in host memory is the parameter itself, others are copies.
    """
    found: dict[str, Tensor] = {}
    replica.wait(device)  # NCCL wants all of them in a group's first operation
    for spec in (spec for spec in plan.undivided().parameters(0) if wanted(spec.name)):
        begin = plan.stage_of(spec) * plan.tp
        owners = range(begin, begin + (plan.tp if spec.cut is not None else 1))
        own = flat(shard(spec.name), spec) if replica.index in owners else None
        if not first:
            continue
        if replica.index != 0:
            if own is not None:
                replica.send(own, 0)
            continue
        if own is not None and len(owners) == 1:
            entries = own
        else:
            entries = torch.empty(spec.elements, dtype=dtype if own is None else own.dtype, device=device)
            for owner, chunk in zip(owners, entries.chunk(len(owners)), strict=True):
                if own is not None and owner == 0:
                    chunk.copy_(own)
                else:
                    replica.receive_(chunk, owner)
        found[spec.name] = unflat(entries, spec, spec.shape).contiguous().cpu()
    return found
