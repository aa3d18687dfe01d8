"""Time of one call of a service, given the lengths of its rows: the durations of a simulation, in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from asyncflow.planner.costs import costs, memory
from asyncflow.planner.costs.devices import Device
from asyncflow.planner.costs.layouts import Layout
from asyncflow.planner.costs.shapes import WEIGHT_BYTES
from asyncflow.planner.costs.workload import ModelWork, Workload


class Speed(Protocol):
    """The speed of one service. Lengths are tokens of each row, prompt and response together."""

    @property
    def engines(self) -> int:
        """Generation replicas."""
        ...

    @property
    def slots(self) -> int:
        """Maximum number of concurrent sequences of one engine."""
        ...

    @property
    def switch_s(self) -> float:
        """Resharding from training to generation on the same devices."""
        ...

    @property
    def publish_s(self) -> float:
        """Publishing a copy of the weights, or loading one."""
        ...

    def forward_s(self, lengths: Sequence[int]) -> float:
        """Inference over these rows."""
        ...

    def update_s(self, lengths: Sequence[int]) -> float:
        """All optimizer steps over these rows."""
        ...

    def prefill_s(self, prompts: Sequence[int]) -> float:
        """Prefill of prompts of these lengths on one engine."""
        ...

    def decode_s(self, running: float, context: float) -> float:
        """One token for each of `running` sequences of one engine with a mean context of `context` tokens."""
        ...


class ModelSpeed:
    """A model in a layout on some devices, by the cost model. Implements `Speed`."""

    def __init__(self, model: ModelWork, layout: Layout, device: Device, workload: Workload, cache_bytes: float = 0.0):
        """`cache_bytes` is the KV cache of each device; 0 means enough for all running sequences."""
        self._shape, self._topology, self._device, self._workload = model.shape, layout.topology, device, workload
        self._over = costs.RECOMPUTING if layout.recompute else costs.BACKWARD
        self._rereads = model.rereads and workload.epochs * workload.mini_batches > 1
        self._pp, self._tp = layout.gen_pp or 1, layout.gen_tp or 1
        self.engines = layout.engines if layout.gen_pp else 1
        self.slots = workload.running_sequences
        if cache_bytes:
            fitting = memory.kv_capacity(model.shape, self._pp, self._tp, cache_bytes, workload)
            self.slots = max(1, min(self.slots, int(fitting)))
        hybrid = layout.gen_pp and not model.receives_from
        self.switch_s = costs.transition_s(model.shape, layout.topology, self._pp, self._tp, device) if hybrid else 0.0
        sent = costs.publication_s(model.shape, self._pp, self._tp, device) if model.receives_from else 0.0
        copied = model.shape.parameters * WEIGHT_BYTES / layout.topology.replica_size / device.bandwidth
        self.publish_s = device.efficiency.publish_s + (sent or copied)

    def forward_s(self, lengths: Sequence[int]) -> float:
        return self._passes_s(lengths, costs.FORWARD) if lengths else 0.0

    def update_s(self, lengths: Sequence[int]) -> float:
        """As costs.update_s, for rows of known lengths; includes the policy's extra forward pass over the batch."""
        again = self.forward_s(lengths) if self._rereads else 0.0
        cut = min(self._workload.mini_batches, len(lengths))
        steps = (self._passes_s(lengths[i::cut], self._over) for i in range(cut))
        one_epoch = sum(steps) + cut * costs.optimizer_step_s(self._shape, self._topology, self._device)
        return again + self._workload.epochs * one_epoch

    def prefill_s(self, prompts: Sequence[int]) -> float:
        tokens = sum(prompts)
        context = tokens / len(prompts) / 2 if prompts else 0.0
        return costs.prefill_s(self._shape, self._pp, self._tp, tokens, context, self._device)

    def decode_s(self, running: float, context: float) -> float:
        return costs.decode_s(self._shape, self._pp, self._tp, running, context, self._device)

    def _passes_s(self, lengths: Sequence[int], over: costs.Pass) -> float:
        """Time of the replica with the most tokens; its micro-batches follow each other through the stages."""
        dp, pp = self._topology.dp, self._topology.pp
        share = -(-len(lengths) // dp)
        mine = max((lengths[i : i + share] for i in range(0, len(lengths), share)), key=sum)
        context = sum(mine) / len(mine) / 2
        turns = [
            costs.turn_s(self._shape, self._topology, self._device, tokens, context, over)
            for tokens in padded(mine, self._workload.micro_batch_tokens, max(1, len(mine) // pp))
        ]
        return sum(turns) + (pp - 1) * max(turns)


def padded(lengths: Sequence[int], budget: float, rows: int) -> Iterator[int]:
    """Padded tokens of each micro-batch: rows in order, rows x longest within the budget, at least one row."""
    start, longest = 0, 0
    for row, length in enumerate(lengths):
        most = max(longest, length)
        if row > start and (most * (row + 1 - start) > budget or row - start == rows):
            yield longest * (row - start)
            start, most = row, length
        longest = most
    yield longest * (len(lengths) - start)
