"""Time of a model's stages in a layout: rooflines, collectives, pipeline bubbles, decoding. In seconds.

One set of formulas and constants serves every model, size and placement. Times add up within a rank: nothing overlaps,
except that a matrix product overlaps the reading of its own weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from asyncflow.planner.costs.devices import Device
from asyncflow.planner.costs.shapes import WEIGHT_BYTES, Shape
from asyncflow.planner.costs.workload import Workload
from protocols.layout.topology import Topology

GRADIENT_BYTES = 4  # float32
OPTIMIZER_BYTES = 12  # float32 master weight and Adam's two moments
STATE_BYTES = GRADIENT_BYTES + WEIGHT_BYTES + 2 * OPTIMIZER_BYTES  # per parameter, moved by an optimizer step


class Generation(NamedTuple):
    """Seconds to generate a step's samples: until the last one is finished, and while the engines are full."""

    latency_s: float
    load_s: float  # the latency without the tail in which few sequences are left


class Pass(NamedTuple):
    """The cost of a pass over a micro-batch, in units of a forward pass."""

    computes: int
    exchanges: int  # of activations between tensor-parallel ranks, and between pipeline stages
    trains: bool


FORWARD, BACKWARD, RECOMPUTING = Pass(1, 1, False), Pass(3, 2, True), Pass(4, 3, True)


def micro_rows(rows: int, pp: int, workload: Workload) -> int:
    """Samples of a micro-batch: within the token budget, and few enough for at least pp micro-batches."""
    return max(1, min(int(workload.micro_batch_tokens // workload.sample_tokens), rows // pp))


def all_reduce_s(payload: float, ranks: int, device: Device, sharing: int = 1) -> float:
    """A ring all-reduce of `payload` bytes: 2 (r-1)/r of them, in 2 (r-1) hops."""
    if ranks == 1:
        return 0.0
    hops = 2 * (ranks - 1)
    return hops / ranks * payload / device.rate(ranks, sharing) + hops * device.latency_s(ranks)


def forward_s(shape: Shape, topology: Topology, workload: Workload, device: Device) -> float:
    """One forward pass over the step's samples: inference."""
    rows = math.ceil(workload.samples / topology.dp)
    micro = micro_rows(rows, topology.pp, workload)
    turn = turn_s(shape, topology, device, micro * workload.sample_tokens, workload.sample_tokens / 2, FORWARD)
    return (rows / micro + topology.pp - 1) * turn


def update_s(shape: Shape, topology: Topology, workload: Workload, device: Device, recompute: bool) -> float:
    """All optimizer steps of a step: forward and backward of each mini-batch, gradient exchange, optimizer.

    A backward pass costs two forward passes, and a third if activations are recomputed.
    """
    rows = math.ceil(workload.samples / workload.mini_batches / topology.dp)
    micro = micro_rows(rows, topology.pp, workload)
    tokens, context = micro * workload.sample_tokens, workload.sample_tokens / 2
    turn = turn_s(shape, topology, device, tokens, context, RECOMPUTING if recompute else BACKWARD)
    passes = (rows / micro + topology.pp - 1) * turn
    return workload.mini_batches * workload.epochs * (passes + optimizer_step_s(shape, topology, device))


def optimizer_step_s(shape: Shape, topology: Topology, device: Device) -> float:
    """Time of an optimizer step beyond its passes: exchange of gradients and weights, memory traffic of the state."""
    own = shape.stage_parameters(topology.pp) / topology.tp
    state = own / topology.dp * STATE_BYTES / device.bandwidth
    return _gradients_s(own, topology, device) + state + device.efficiency.optimizer_s


def turn_s(shape: Shape, topology: Topology, device: Device, tokens: float, context: float, over: Pass) -> float:
    """Time of one pipeline stage on a micro-batch of `tokens` tokens with a mean context of `context` tokens.

    m micro-batches take m + p - 1 such turns.
    """
    pp, tp = topology.pp, topology.tp
    flops = device.training_flops if over.trains else device.flops
    product = tokens * shape.stage_flops(pp, context) / tp / flops
    read = shape.stage_parameters(pp) * WEIGHT_BYTES / tp / device.bandwidth
    launch = (shape.layers / pp + 1) * device.efficiency.layer_s
    between = tokens * shape.hidden * WEIGHT_BYTES
    reduced = 2 * shape.layers / pp * all_reduce_s(between, tp, device)
    handed_on = between / tp / device.rate(pp * tp) + device.latency_s(pp * tp) if pp > 1 else 0.0
    return over.computes * (max(product, read) + launch) + over.exchanges * (reduced + handed_on)


def generation_s(
    shape: Shape, pp: int, tp: int, replicas: int, rows: int, capacity: float, workload: Workload, device: Device
) -> Generation:
    """Generate `rows` samples with engines of pp x tp ranks whose KV caches hold `capacity` sequences each.

    A decoding step reads the weights once and the cache of every running sequence; pp groups of sequences follow each
    other through the stages. New sequences replace finished ones at once (continuous batching), so a batch larger than
    the capacity takes rows/capacity mean lengths plus the tail: the expected longest of the last sequences.
    """
    mine = math.ceil(rows / replicas)
    running = max(1.0, min(mine, workload.running_sequences, capacity))
    mean = workload.response.mean
    tail = workload.response.expected_maximum(running) - mean
    steady, steps = mine / running * mean, mine / running * mean + tail
    prefill = prefill_s(shape, pp, tp, mine * workload.prompt.mean, workload.prompt.mean / 2, device)
    context = workload.prompt.mean + mean / 2
    busy = decode_s(shape, pp, tp, running, context, device)
    thinning = decode_s(shape, pp, tp, mine * mean / steps, context, device)
    return Generation(prefill + steps * thinning, prefill + steady * busy)


def prefill_s(shape: Shape, pp: int, tp: int, tokens: float, context: float, device: Device) -> float:
    """Prefill prompts of `tokens` tokens in total, with a mean context of `context` tokens."""
    product = tokens * shape.forward_flops(context) / (pp * tp) / device.flops
    return product + all_reduce_s(2 * shape.layers / pp * tokens * shape.hidden * WEIGHT_BYTES, tp, device)


def decode_s(shape: Shape, pp: int, tp: int, running: float, context: float, device: Device) -> float:
    """Decode one token for each of `running` sequences with a mean context of `context` tokens."""
    group = running / pp
    read = shape.parameters * WEIGHT_BYTES / tp + running * context * shape.kv_bytes(pp, tp)
    product = running * shape.forward_flops(context) / (pp * tp)
    reduced = 2 * shape.layers * all_reduce_s(group * shape.hidden * WEIGHT_BYTES, tp, device)
    hand_on = (pp - 1) * (group * shape.hidden * WEIGHT_BYTES / device.rate(pp * tp) + device.latency_s(pp * tp))
    host = device.efficiency.host_step_s + running * device.efficiency.host_sequence_s
    return max(read / device.bandwidth, product / device.flops) + reduced + hand_on + host


def transition_s(shape: Shape, topology: Topology, pp: int, tp: int, device: Device) -> float:
    """Reshard from training to generation on the same ranks: each receives (1/(t_g p_g) - 1/(t p)) of the weights."""
    missing = 1 / (pp * tp) - 1 / topology.replica_size
    if missing == 0:
        return 0.0
    neighbours = topology.replica_size // (pp * tp)
    return missing * shape.parameters * WEIGHT_BYTES / device.rate(neighbours) + neighbours * device.latency_s(
        neighbours
    )


def publication_s(shape: Shape, pp: int, tp: int, device: Device) -> float:
    """Publish weights to engines in another pool: every rank receives its shard over the network."""
    return shape.parameters * WEIGHT_BYTES / (pp * tp) / (device.network_bytes_per_s * device.efficiency.link)


def _gradients_s(own: float, topology: Topology, device: Device) -> float:
    """Reduce-scatter the gradients of `own` parameters over the replicas and all-gather the updated weights.

    The replicas of a node share its network: their concurrent rings use all of it together.
    """
    if topology.dp == 1:
        return 0.0
    moved = (topology.dp - 1) / topology.dp * own * (GRADIENT_BYTES + WEIGHT_BYTES)
    inside = topology.world_size <= device.devices_per_node
    ranks = topology.world_size if inside else max(topology.world_size, device.devices_per_node + 1)
    sharing = max(1, device.devices_per_node // topology.replica_size)
    return moved / device.rate(ranks, sharing) + 2 * (topology.dp - 1) * device.latency_s(ranks)
