"""ShardRef: the rows of one encoded frame, by id and length, and the payload that leads to their bytes.

Mailboxes hold references to rows, and `plan_calls` distributes them over ranks. Neither reads the bytes: that is done
by the rank that works on the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec
import numpy as np

from asyncflow.services.channels.endpoint import Frame, Payload, Store
from protocols.control.delivery import RankCall, Reading, Shard
from protocols.data import codec
from protocols.data.columns import Batch, concat, take
from protocols.data.ids import INDEX_BITS
from protocols.data.partition import Rows, cut
from protocols.layout.row_plan import Located, Segment
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.layout.transfer import protocol
from protocols.roles import Sampling
from protocols.stage import Failure

B = TypeVar("B", bound=Batch)


class ShardRef(msgspec.Struct, frozen=True, eq=False):
    """The rows of one frame, and their payload. Compared by identity."""

    shard: Shard
    payload: Payload


RowRef = tuple[ShardRef, int]  # a shard, and the row's position in it


class Partitioning(msgspec.Struct, frozen=True):
    """How a stage's rows are distributed over its ranks."""

    protocol: str
    whole_groups: bool = False  # a prompt's samples stay together
    by_tokens: bool = False  # balance the tokens of the ranks instead of their rows


class RankCallPlan(msgspec.Struct, frozen=True):
    """The call of one rank, with the payloads it reads."""

    rank: int
    call: RankCall
    payloads: list[Payload]


def pack(store: Store, batch: Batch, term: int, attempt: int = 0, *, direct: bool = False) -> ShardRef:
    """Encode a batch as one frame and store it, see `Store.put`. May block: call it in a thread."""
    frame = codec.encode(batch, term=term, attempt=attempt)
    shard = Shard(batch.sample_ids.tolist(), frame.nbytes, batch.token_counts.tolist() if batch.tokens else [])
    return ShardRef(shard, store.put(frame, direct))


def pack_apart(
    store: Store, batch: Batch, term: int, attempt: int = 0, *, direct: bool = False, object_bytes: int = 0
) -> list[ShardRef]:
    """Like `pack`, but in several frames: small ones that travel inside the message, or objects of `object_bytes`.

    With `object_bytes` = 0 there is one object. A reader on the producer's node maps only its rows of an object; a
    reader on another node fetches the whole object.
    """
    cuts: list[Rows] = []
    if within := store.piece_bytes(batch.nbytes, direct):
        cuts = codec.cut_within(batch, within)
    elif object_bytes and len(batch):
        parts = min(len(batch), -(-batch.nbytes // object_bytes))
        cuts = cut(np.arange(len(batch)), parts, lengths=batch.token_counts)
    if len(cuts) < 2:
        return [pack(store, batch, term, attempt, direct=direct)]
    return [pack(store, take(batch, rows), term, attempt, direct=direct) for rows in cuts if len(rows)]


def unpack(frames: Sequence[Frame], kind: type[B]) -> B:
    """The rows of some frames as one batch. Raises codec.BadFrame."""
    batches = [codec.decode(frame, schemas={kind.schema_id: kind}) for frame in frames]
    return concat([batch for batch in batches if isinstance(batch, kind)])


def parts_of(shards: Sequence[Shard], payloads: Sequence[Payload]) -> list[ShardRef]:
    """Pair shards with their payloads. Raises ValueError if the counts differ."""
    if len(shards) != len(payloads):
        raise ValueError(f"{len(shards)} shards came with {len(payloads)} payloads, want one each")
    return [ShardRef(shard, payload) for shard, payload in zip(shards, payloads, strict=True)]


def row_refs(parts: Iterable[ShardRef]) -> list[tuple[int, RowRef]]:
    """The sample id and the reference of every row, in order."""
    return [(sample, (part, row)) for part in parts for row, sample in enumerate(part.shard.sample_ids)]


def arrivals(parts: Iterable[ShardRef], failures: Iterable[Failure]) -> list[tuple[int, RowRef | Failure]]:
    """Rows in the form a mailbox takes: references and tombstones by sample id."""
    return [*row_refs(parts), *((f.sample_id, f) for f in failures)]


def plan_calls(
    stage: str,
    method: str,
    cut: Partitioning,
    samples: Sequence[int],
    inputs: Sequence[Sequence[RowRef]],
    schemas: Sequence[int],
    topology: Topology,
    *,
    generation: GenerationGrouping | None = None,
    step: int = -1,
    sampling: Sampling | None = None,
    all_ranks: bool = False,
) -> list[RankCallPlan]:
    """Distribute the rows of a firing: each rank reads only its own rows of every input.

    Args:
        samples: the ids of the N rows.
        inputs: per input, the references of its N rows, in the order of `samples`.
        schemas: per input, the message type that the ranks accept.
        sampling: the sampling parameters of a method that generates.
        all_ranks: also call the ranks without rows, because they take part in the others' collectives.

    Returns a call for every rank that has rows, or for all ranks.
    """
    shares = protocol(cut.protocol).distribute(
        rows=len(samples),
        topology=topology,
        generation=generation,
        groups=np.asarray(samples, np.int64) >> INDEX_BITS if cut.whole_groups else None,
        lengths=_tokens(inputs) if cut.by_tokens else None,
    )
    sources, located = _locate(inputs)
    calls = []
    for rank, share in enumerate(shares):
        if not len(share) and not all_ranks:
            continue
        wanted = [where.segments(share) for where in located]
        used = sorted({segment.source for segments in wanted for segment in segments})
        renumbered = {source: number for number, source in enumerate(used)}
        readings = [
            Reading(schema, [Segment(renumbered[s.source], s.start, s.stop) for s in segments])
            for schema, segments in zip(schemas, wanted, strict=True)
        ]
        payloads = [sources[source].payload for source in used]
        nbytes = sum(sources[source].shard.nbytes for source in used)
        ids = [samples[row] for row in share.tolist()]
        calls.append(RankCallPlan(rank, RankCall(stage, method, ids, readings, step, nbytes, sampling), payloads))
    return calls


def _locate(inputs: Sequence[Sequence[RowRef]]) -> tuple[list[ShardRef], list[Located]]:
    """The distinct shards of all inputs, and per input the position of its rows in them."""
    numbers: dict[int, int] = {}
    parts: list[ShardRef] = []
    located = []
    for rows in inputs:
        sources = np.empty(len(rows), np.int64)
        for i, (part, _) in enumerate(rows):
            number = numbers.get(id(part))
            if number is None:
                number = numbers[id(part)] = len(parts)
                parts.append(part)
            sources[i] = number
        located.append(Located(sources, np.fromiter((row for _, row in rows), np.int64, len(rows))))
    return parts, located


def _tokens(inputs: Sequence[Sequence[RowRef]]) -> list[int] | None:
    """The tokens of each row, from the first input whose shards have lengths."""
    for rows in inputs:
        if rows and all(part.shard.lengths for part, _ in rows):
            return [part.shard.lengths[row] for part, row in rows]
    return None
