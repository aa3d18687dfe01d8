"""The input of a simulation: an algorithm's stages, services in pools, their speeds, and length distributions."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from asyncflow.control.settings import Pace
from asyncflow.dataflow.graph import Dataflow
from asyncflow.planner.costs.speeds import Speed
from asyncflow.planner.costs.workload import Lengths

WARM_UP = 2  # steps until a run with staleness 0 is steady; each version of staleness adds one


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a simulation needs to know about one run."""

    dataflow: Dataflow
    services: Mapping[str, str]  # stage -> the service that runs it
    pools: Mapping[str, str]  # service -> pool; "" if it needs no device
    devices: Mapping[str, int]  # pool -> devices
    speeds: Mapping[str, Speed]  # by service
    pace: Pace
    prompt: Lengths
    response: Lengths
    firing_rows: int = 64  # maximum rows of one call of a stage
    mailbox_rows: int = 0  # capacity of a mailbox with one input; 0: one step's samples
    whole_batches: bool = False  # the engine finishes a batch before the next; else new sequences fill free slots
    call_s: float = 0.0  # overhead of one call to a service
    record_s: float = 0.0  # writing the durable record of a step
    cores: float = 0.0  # how many devices' work runs at full speed at once; 0: no limit
    crowded: float = 0.0  # the same while more devices are busy than there are cores; 0: equal to `cores`
    delays: Mapping[str, Mapping[str, float]] = {}  # service -> stage method -> seconds added to each call
    turn_tokens: int = 16  # that an engine generates before it looks for new weights and rows
    dropped: float = 0.0  # share of prompts that are not trainable
    seed: int = 0

    @property
    def steady(self) -> range:
        """The steady steps: those that neither fill the pipeline nor, at the end, drain it."""
        first = min(WARM_UP + self.pace.staleness, self.pace.steps - 1)
        return range(first, max(first + 1, self.pace.steps - self.pace.staleness))

    @property
    def samples_per_step(self) -> int:
        """Samples of one batch."""
        return self.pace.prompts_per_step * self.pace.samples_per_prompt
