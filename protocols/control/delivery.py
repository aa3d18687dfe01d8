"""Messages that carry rows between services, and between a service's coordinator and its ranks.

The rank that computed a shard stores it once. These messages name its rows by id and length; a payload travels beside
them and leads to the bytes. Only the rank that works on a row reads its bytes.
"""

from __future__ import annotations

import msgspec

from protocols.data.messages import Metrics
from protocols.layout.row_plan import Segment
from protocols.roles import Sampling
from protocols.stage import Failure


class Shard(msgspec.Struct, frozen=True):
    """The rows of one frame, in the frame's order."""

    sample_ids: list[int]
    nbytes: int  # of the frame
    lengths: list[int] = []  # the tokens of each row, to balance ranks by tokens; empty: unknown


class Delivery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows sent on one edge: one payload per shard beside it, and tombstones.

    A delivery may be repeated; receivers refuse by id the rows they had before.
    """

    edge: str  # "reward.score#1.0": the consumer stage and its input position
    term: int
    shards: list[Shard] = []
    failures: list[Failure] = []
    attempt: int = 0  # rises when a row is regenerated because its bytes were lost
    step: int = -1  # of a closed batch for the trainers

    @property
    def rows(self) -> int:
        """The number of rows with values."""
        return sum(len(shard.sample_ids) for shard in self.shards)


class Reading(msgspec.Struct, frozen=True):
    """The rows a rank reads of one input. A segment's source is the position of a payload beside the call."""

    schema: int  # the message type that the rank accepts
    segments: list[Segment]


class RankCall(msgspec.Struct, frozen=True):
    """One rank's part of a firing: the same rows of every input, in the same order."""

    stage: str
    method: str
    sample_ids: list[int]  # of its rows
    readings: list[Reading]
    step: int = -1
    nbytes: int = 0  # of the frames it reads from, an estimate of the size of the answer
    sampling: Sampling | None = None  # of a call that generates


class Damaged(msgspec.Struct, frozen=True):
    """Rows of a call whose frame was refused. `rows`: their positions in the call."""

    input: int
    rows: list[int]
    cause: str


class RankReply(msgspec.Struct, frozen=True):
    """A rank's answer to a call. The rows of its output are in the payloads beside it, one per shard."""

    start: float  # seconds, time.time()
    end: float
    read_bytes: list[int]  # by input
    shards: list[Shard] = []
    failures: list[Failure] = []
    metrics: Metrics | None = None
    damaged: list[Damaged] = []
    lost: list[int] = []  # positions of the rows whose bytes were lost with their owner
    generated_tokens: int = 0  # response tokens, of a call that generates


class EdgeStatistics(msgspec.Struct, frozen=True):
    """The counts of one channel at its consumer, since the service started."""

    edge: str
    depth: int  # waiting rows
    capacity: int  # 0: bounded at the source
    peak: int  # the most rows that ever waited
    rows: int  # accepted, tombstones included
    refused: int  # duplicates, late rows, and rows of finished prompts
    damaged: int  # rows whose frame was refused
    inline_bytes: int  # of frames that travelled inside the delivery
    read_bytes: dict[int, int]  # rank -> bytes of the frames it read; -1: the coordinator of several ranks
    wait_seconds: float  # total time that senders waited for room


class ServiceStatistics(msgspec.Struct, frozen=True):
    """The counts of a service's channels, and the waits of its stages."""

    service: str
    ranks: int
    edges: list[EdgeStatistics]
    kept: int  # deliveries in the outbox
    waits: dict[str, str]  # stage -> "what on whom"
