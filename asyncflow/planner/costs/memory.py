"""Memory of a model's ranks: resident, transient while it runs, and the KV cache. Bytes per device."""

from __future__ import annotations

import math

import msgspec

from asyncflow.planner.costs.costs import GRADIENT_BYTES, OPTIMIZER_BYTES, micro_rows
from asyncflow.planner.costs.devices import GB
from asyncflow.planner.costs.shapes import WEIGHT_BYTES, Shape
from asyncflow.planner.costs.workload import ModelWork, Workload
from protocols.layout.topology import Topology


class Footprint(msgspec.Struct, frozen=True):
    """Bytes on the heaviest rank of a layout, without generation."""

    weights: float  # always
    optimizer: float  # always: master weights and moments, sharded over all ranks
    gradients: float  # while it trains
    activations: float  # while it trains or infers

    @property
    def resident(self) -> float:
        """Held during the whole step, whichever model runs."""
        return self.weights + self.optimizer

    @property
    def transient(self) -> float:
        """Held only while one of the model's own stages runs."""
        return self.gradients + self.activations

    def __str__(self) -> str:
        parts = {name: getattr(self, name) / GB for name in self.__struct_fields__}
        return ", ".join(f"{name} {size:.1f}" for name, size in parts.items() if size)


def footprint(model: ModelWork, topology: Topology, workload: Workload, recompute: bool) -> Footprint:
    """The memory of training and inference."""
    own = model.shape.stage_parameters(topology.pp) / topology.tp
    rows = math.ceil(workload.samples / (workload.mini_batches if model.trains else 1) / topology.dp)
    tokens = max(micro_rows(rows, topology.pp, workload) * workload.sample_tokens, workload.longest_sample)
    runs = model.trains or model.forwards
    return Footprint(
        weights=own * WEIGHT_BYTES,
        optimizer=own * OPTIMIZER_BYTES / topology.dp if model.trains else 0.0,
        gradients=own * GRADIENT_BYTES if model.trains else 0.0,
        activations=activations(model, topology, tokens, recompute) if runs else 0.0,
    )


def generation_bytes(shape: Shape, topology: Topology, pp: int, tp: int) -> float:
    """Bytes of weights that a generation shard adds to the training shard, which it contains."""
    return max(0.0, shape.parameters * WEIGHT_BYTES * (1 / (pp * tp) - 1 / topology.replica_size))


def kv_capacity(shape: Shape, pp: int, tp: int, free: float, workload: Workload) -> float:
    """Sequences of mean length whose KV cache fits in `free` bytes per rank; 0 if the longest one does not fit."""
    token = shape.kv_bytes(pp, tp)
    if free < workload.longest_sample * token:
        return 0.0
    return free // (workload.sample_tokens * token)


def activations(
    model: ModelWork, topology: Topology, tokens: float, recompute: bool, weight_bytes: int = WEIGHT_BYTES
) -> float:
    """Activations of the micro-batches in flight on the first stage, and the head's outputs in float32.

    In bfloat16 a layer keeps tokens x hidden x (10 + 24/t) bytes, without the attention matrix (Korthikanti et al.,
    2022), and as much more as a weight has more bytes; with recomputation only its input, plus one layer at a time in
    full.
    """
    shape, pp, tp = model.shape, topology.pp, topology.tp
    layer = tokens * shape.hidden * (10 + 24 / tp) * weight_bytes / WEIGHT_BYTES
    head = tokens * (shape.outputs or shape.vocabulary) / tp * 4
    if not model.trains:
        return layer + head
    kept = tokens * shape.hidden * weight_bytes if recompute else layer
    return pp * shape.layers / pp * kept + layer + 2 * head
