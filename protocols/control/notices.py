"""Notices: what a service reports to its controller, in the order in which it happened."""

from __future__ import annotations

import msgspec

from protocols.stage import Failure


class Span(msgspec.Struct, frozen=True):
    """An interval of one service's time, for the timeline and the idle-time statistics."""

    service: str
    activity: str  # the stage ("policy.update#1"), "publish", "load", "checkpoint"
    start: float  # seconds, time.time()
    end: float
    rows: int = 0
    step: int = -1  # the step it belongs to, -1 where rows of several mix


class PromptSettled(msgspec.Struct, frozen=True, tag=True):
    """All rows of a prompt reached the join: alive, or dead with a cause."""

    prompt_id: int
    alive: list[int]  # sample ids
    dead: list[Failure]
    oldest_version: int = 0  # oldest step among the prompt's tokens
    critic_version: int = -1  # oldest critic step among its values; -1 without a critic
    tokens: int = 0  # response tokens of the rows that are alive
    reward_sum: float = 0.0  # sum of their scores
    cost_sum: float | None = None  # sum of their costs; None where the algorithm has none
    trainable: bool = True  # False: the algorithm's filter dropped it, and the join has freed its rows
    partial: bool = False  # the samples that are alive may be trained without those that are dead

    @property
    def trains(self) -> bool:
        """Whether the samples that are alive wait for a batch; else all samples end untrained."""
        return self.trainable and (self.partial or not self.dead)


class Generated(msgspec.Struct, frozen=True, tag=True):
    """Rows left the engine, for the ledger and the token counters."""

    sample_ids: list[int]
    tokens: int


class RowsLost(msgspec.Struct, frozen=True, tag=True):
    """Rows in a stage's mailbox can't be read any more: the process that held their bytes died."""

    stage: str
    sample_ids: list[int]


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """A sink finished one batch."""

    stage: str
    step: int
    values: dict[str, float] = {}


class Busy(msgspec.Struct, frozen=True, tag=True):
    """Spans of compute time, reported in small groups."""

    spans: list[Span]


class LeaseAsked(msgspec.Struct, frozen=True, tag=True):
    """A stage that has all of its inputs requests its pool's devices."""

    ticket: int
    stage: str


class LeaseReturned(msgspec.Struct, frozen=True, tag=True):
    """A stage returns the devices, before it sends or publishes anything."""

    ticket: int


class Waiting(msgspec.Struct, frozen=True, tag=True):
    """`who` waits for `what` since `since`; empty `what`: no longer. For the live view and the wait-for graph."""

    who: str
    what: str = ""
    on: str = ""
    since: float = 0.0


class ServiceFailed(msgspec.Struct, frozen=True, tag=True):
    """A stage raised an exception; the controller decides how the run goes on."""

    service: str
    stage: str
    error: str


Notice = PromptSettled | Generated | RowsLost | StepDone | Busy | LeaseAsked | LeaseReturned | Waiting | ServiceFailed
