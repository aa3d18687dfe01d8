"""The ranks, the backend and the device of a role's model. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from protocols.layout.topology import Backend, Topology

if TYPE_CHECKING:
    import torch


class Sharding(NamedTuple):
    """The ranks of a model, and what they share."""

    topology: Topology = Topology()
    backend: Backend = "3d"  # what the replicas of a trained model divide, see `workers.parallel.backends`
    device: torch.device | str = "cpu"  # of this rank
    recompute: bool = False  # keep one activation a layer, and compute the others again in the backward pass


ONE_DEVICE = Sharding()  # the CPU

# What a stage's method returns on a rank whose answer the service does not collect: not the last stage's first rank.
NOT_COLLECTED: Any = None
