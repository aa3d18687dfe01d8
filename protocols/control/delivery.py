"""Rows on their way: what travels between services, and between a service's coordinator and its ranks.

A shard is put once by the rank that made it. What moves from then on is its name: ids, lengths and a reference,
which stands beside these messages as their payload. Only the rank that works on a row reads its bytes.
"""

from __future__ import annotations

import msgspec

from protocols.data.messages import Metrics
from protocols.layout.row_plan import Segment
from protocols.roles import Sampling
from protocols.stage import Failure


class Shard(msgspec.Struct, frozen=True):
    """Rows of one message in one frame, in the frame's order."""

    sample_ids: list[int]
    nbytes: int  # of the frame
    lengths: list[int] = []  # tokens of each row, for cuts that balance by them; empty: not told


class Delivery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows that arrived on one edge: values in one payload a shard beside it, and tombstones.

    Over a run each row of the edge comes once, or again under its own name: receivers refuse what they had.
    """

    edge: str  # "reward.score#1.0": consumer stage and input position
    term: int
    shards: list[Shard] = []
    failures: list[Failure] = []
    attempt: int = 0  # rises where a row is made anew because its bytes were lost
    step: int = -1  # of a closed batch on its way to the trainers

    @property
    def rows(self) -> int:
        """Rows with values."""
        return sum(len(shard.sample_ids) for shard in self.shards)


class Reading(msgspec.Struct, frozen=True):
    """What a rank reads of one input: the segments' sources are the payloads beside the call."""

    schema: int  # the only message type that it accepts
    segments: list[Segment]


class RankCall(msgspec.Struct, frozen=True):
    """One rank's part of a firing: the same rows of every input, in the same order."""

    stage: str
    method: str
    sample_ids: list[int]  # of its rows
    readings: list[Reading]
    step: int = -1
    nbytes: int = 0  # of the frames that it reads from: how large an answer is to be expected
    sampling: Sampling | None = None  # of a call that generates


class Damaged(msgspec.Struct, frozen=True):
    """Rows of a call whose frame was refused: by which input, their positions in the call, and why."""

    input: int
    rows: list[int]
    cause: str


class RankReply(msgspec.Struct, frozen=True):
    """What a rank did: its output's rows are in the payloads beside it, one a shard."""

    start: float  # seconds, time.time()
    end: float
    read_bytes: list[int]  # by reading
    shards: list[Shard] = []
    failures: list[Failure] = []
    metrics: Metrics | None = None
    damaged: list[Damaged] = []
    lost: list[int] = []  # positions of rows whose bytes are gone: their owner died
    drawn: int = 0  # response tokens, of a call that generates


class EdgeStatistics(msgspec.Struct, frozen=True):
    """One channel as its consumer sees it, since the service started."""

    edge: str
    depth: int  # rows that wait
    capacity: int  # 0: bounded at the source
    peak: int  # most rows that ever waited
    rows: int  # taken in, tombstones included
    refused: int  # sent again, late, or of a prompt that is over
    damaged: int  # rows whose frame was refused
    inline_bytes: int  # of frames that travelled inside the delivery
    read_bytes: dict[int, int]  # rank -> bytes of frames that it read; -1: the coordinator of several ranks
    wait_seconds: float  # time that senders waited for room, summed


class ServiceStatistics(msgspec.Struct, frozen=True):
    """The counts of a service's channels, and what its stages wait for."""

    service: str
    ranks: int
    edges: list[EdgeStatistics]
    kept: int  # deliveries that are kept until their prompts end
    waits: dict[str, str]  # stage -> "what on whom"
