"""Ranks that share a model agree on the readable rows: before each collective call they exchange the unreadable ones.

Each rank reads the same rows by itself. If one dropped a row alone, the others would wait for it in a collective, or
train on another batch. The exchanged lists are normally empty; all ranks drop their union and report the same causes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from asyncflow.services.ranks.row_reader import RowReader
from protocols.control.delivery import Damaged, RankCall
from protocols.data.columns import empty, rows_of, take
from protocols.data.messages import SCHEMAS

Exchange = Callable[[bytes], list[bytes]]  # this rank's message -> the messages of all, by rank


class Unreadable(msgspec.Struct, frozen=True, array_like=True):
    """A row that a rank could not read."""

    sample_id: int
    input: int = 0
    cause: str = ""  # why its frame was refused; "": its bytes are gone


_DECODER = msgspec.msgpack.Decoder(list[Unreadable])


def exchange_unreadable_rows(call: RankCall, read: RowReader, exchange: Exchange) -> None:
    """Reduce the inputs to the rows that all ranks can read; `read.inputs` exist even if no row is left."""
    own = unreadable(call, read)
    everyones = [row for message in exchange(msgspec.msgpack.encode(own)) for row in _DECODER.decode(message)]
    leave_out(call, read, everyones)


def unreadable(call: RankCall, read: RowReader) -> list[Unreadable]:
    """The rows of a call that this rank could not read."""
    ids = call.sample_ids
    refused = [Unreadable(ids[row], damage.input, damage.cause) for damage in read.damaged for row in damage.rows]
    return refused + [Unreadable(ids[row]) for row in read.lost]


def leave_out(call: RankCall, read: RowReader, others: Sequence[Unreadable]) -> None:
    """Drop the rows that other ranks could not read, and account for them; rows of other calls are ignored."""
    readable = set(read.inputs[0].sample_ids.tolist()) if read.inputs else set()
    missing = {row.sample_id: row for row in others if row.sample_id in readable}
    refused: dict[tuple[int, str], list[int]] = {}
    for sample, row in missing.items():
        where = refused.setdefault((row.input, row.cause), []) if row.cause else read.lost
        where.append(call.sample_ids.index(sample))
    read.damaged += [Damaged(input, positions, cause) for (input, cause), positions in refused.items()]
    left = [sample for sample in call.sample_ids if sample in readable - missing.keys()]
    if missing:
        read.inputs = [take(batch, rows_of(batch, np.array(left, np.int64))) for batch in read.inputs]
    read.rows = len(left)
    if not read.inputs:
        read.inputs = [empty(SCHEMAS[reading.schema]) for reading in call.readings]
