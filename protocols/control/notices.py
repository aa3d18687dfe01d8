"""What a service reports to its controller: small typed values, in the order in which things happened."""

from __future__ import annotations

import msgspec

from protocols.stage import Failure


class Span(msgspec.Struct, frozen=True):
    """A stretch of time of one service, for the timeline and the idle-time accounts."""

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
    trainable: bool = True  # False: alive, and the algorithm's filter has no use for it; the join has let it go


class Generated(msgspec.Struct, frozen=True, tag=True):
    """Rows left the engine, for the ledger and the token counters."""

    sample_ids: list[int]
    tokens: int


class RowsLost(msgspec.Struct, frozen=True, tag=True):
    """Rows that a stage had taken in can't be read any more: their sender's process is gone, and they with it."""

    stage: str
    sample_ids: list[int]


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """A sink finished one batch."""

    stage: str
    step: int
    values: dict[str, float] = {}


class Busy(msgspec.Struct, frozen=True, tag=True):
    """Time spent, reported in small groups."""

    spans: list[Span]


class LeaseAsked(msgspec.Struct, frozen=True, tag=True):
    """A stage with all its inputs in hand asks for its pool's devices."""

    ticket: int
    stage: str


class LeaseReturned(msgspec.Struct, frozen=True, tag=True):
    """It gives them back, before it sends or publishes anything."""

    ticket: int


class Waiting(msgspec.Struct, frozen=True, tag=True):
    """Who waits for what since when; `what` empty: not any more. Feeds the live view and the wait-for graph."""

    who: str
    what: str = ""
    on: str = ""
    since: float = 0.0


class ServiceFailed(msgspec.Struct, frozen=True, tag=True):
    """A stage raised: the run can't go on as it is."""

    service: str
    stage: str
    error: str


Notice = PromptSettled | Generated | RowsLost | StepDone | Busy | LeaseAsked | LeaseReturned | Waiting | ServiceFailed
