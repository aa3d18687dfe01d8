"""Ranks that share a model read the same rows, each for itself: a row that one of them can't read is left out by all.

Otherwise one would wait in a collective for the others' larger batch, or train on another one. So every call of such
ranks begins with an exchange of what could not be read, which is nothing but for a fault; and each accounts for its
rows as the rank that could not read them does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from protocols.control.delivery import Damaged, RankCall
from protocols.data.columns import empty, rows_of, take
from protocols.data.messages import SCHEMAS

if TYPE_CHECKING:
    from asyncflow.services.ranks.rank import RowReader

Exchange = Callable[[bytes], list[bytes]]  # what this rank says -> what all say, in their order


class Unreadable(msgspec.Struct, frozen=True, array_like=True):
    """A row that a rank could not read."""

    sample_id: int
    input: int = 0
    cause: str = ""  # why its frame was refused; "": its bytes are gone


_DECODER = msgspec.msgpack.Decoder(list[Unreadable])


def exchange_unreadable_rows(call: RankCall, read: RowReader, exchange: Exchange) -> None:
    """Reduce what was read to the rows that all ranks can read; `read.inputs` are there even if no row is left."""
    own = unreadable(call, read)
    said = [row for message in exchange(msgspec.msgpack.encode(own)) for row in _DECODER.decode(message)]
    leave_out(call, read, said)


def unreadable(call: RankCall, read: RowReader) -> list[Unreadable]:
    """The rows of a call that this rank could not read."""
    ids = call.sample_ids
    refused = [Unreadable(ids[row], damage.input, damage.cause) for damage in read.damaged for row in damage.rows]
    return refused + [Unreadable(ids[row]) for row in read.lost]


def leave_out(call: RankCall, read: RowReader, said: Sequence[Unreadable]) -> None:
    """Take rows that other ranks could not read from the inputs, and account for them; rows of others are nothing."""
    readable = set(read.inputs[0].sample_ids.tolist()) if read.inputs else set()
    missing = {row.sample_id: row for row in said if row.sample_id in readable}
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
