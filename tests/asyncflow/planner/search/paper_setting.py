"""The paper's cluster and batch: 16 machines of 8 A100-80G on 200 Gb/s each; 1024 prompts, 1024 + 1024 tokens.

PPO makes 8 optimizer steps of a batch; data-parallel ranks get equal parts of it, as the paper's training framework
(Megatron-LM) demands. Nothing else is set: devices and reach are the catalogue's.
"""

from __future__ import annotations

import msgspec

from asyncflow.planner.costs.devices import CATALOGUE, Cluster
from asyncflow.planner.costs.layouts import Layout
from asyncflow.planner.costs.workload import Lengths, ModelWork, Workload

MACHINE_NETWORK = 200e9 / 8  # bytes a second, for 8 devices
DEVICE = msgspec.structs.replace(CATALOGUE["A100-80G"], network_bytes_per_s=MACHINE_NETWORK / 8)
WORKLOAD = Workload(1024, Lengths.fixed(1024), Lengths.fixed(1024), mini_batches=8)


def cluster(count: int) -> Cluster:
    return Cluster(DEVICE, count)


def even(model: ModelWork, layout: Layout) -> bool:
    """Whether a model's batches (mini-batches if it trains) divide into equal parts."""
    return WORKLOAD.samples // (WORKLOAD.mini_batches if model.trains else 1) % layout.topology.dp == 0
