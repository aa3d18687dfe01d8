"""What is simulated: an algorithm's stages on services in pools, their speeds, and the lengths that are drawn."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from asyncflow.control.settings import Pace
from asyncflow.dataflow.graph import Dataflow
from asyncflow.planner.costs.speeds import Speed
from asyncflow.planner.costs.workload import Lengths

WARM_UP = 2  # steps after which a run with staleness 0 repeats itself; each version of staleness adds one


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One run, as a simulation sees it."""

    dataflow: Dataflow
    hosts: Mapping[str, str]  # stage -> the service that answers it
    pools: Mapping[str, str]  # service -> pool; "" where it needs no device
    devices: Mapping[str, int]  # pool -> devices
    speeds: Mapping[str, Speed]  # of every service
    pace: Pace
    prompt: Lengths
    response: Lengths
    firing_rows: int = 64  # most rows of one call of a stage
    mailbox_rows: int = 0  # of a plain mailbox; 0: one step's samples
    whole_batches: bool = False  # the engine runs a batch to its end; else sequences replace finished ones
    call_s: float = 0.0  # handing rows to a service, and firing it
    record_s: float = 0.0  # writing a step down
    cores: float = 0.0  # devices' worth of work that is done at once; 0: all of it
    crowded: float = 0.0  # the same, while more want to work than there are cores; 0: as much
    delays: Mapping[str, Mapping[str, float]] = {}  # service -> stage method -> seconds of waiting in each call
    turn_tokens: int = 16  # that an engine draws before it looks for new weights and rows
    dropped: float = 0.0  # share of prompts that are not worth training
    seed: int = 0

    @property
    def steady(self) -> range:
        """The steps that look alike: neither filling the pipeline nor, towards the end, draining it."""
        first = min(WARM_UP + self.pace.staleness, self.pace.steps - 1)
        return range(first, max(first + 1, self.pace.steps - self.pace.staleness))

    @property
    def samples_per_step(self) -> int:
        """Rows of one batch."""
        return self.pace.prompts_per_step * self.pace.samples_per_prompt
