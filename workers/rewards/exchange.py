"""What a rule's process and the service say to each other: a u32 length and a msgpack body, in both directions.

service ──Setup──> process          once
service <──Ready── process          once: what the rule asks for, or why it can't be used
service ──Call───> process          rows to score
service <─Answers─ process          one answer a row; calls of an async rule are answered in any order
"""

from __future__ import annotations

import struct

import msgspec

from protocols.control.code import CodeSource
from workers.rewards.answers import RuleAnswer
from workers.rewards.arguments import RuleNeeds, RuleRow

LENGTH = struct.Struct("<I")
OUT_OF_MEMORY = 251  # exit code of a rule's process that was refused memory: what it leaked goes with it


class RuleLimits(msgspec.Struct, frozen=True):
    """What a rule may take."""

    timeout_seconds: float  # of one call
    memory_bytes: int = 0  # data of its process, and of each that this starts; 0: no limit
    output_bytes: int = 0  # printed in one call, as far as its pipe does not hide it (64 kB); 0: no limit


class Setup(msgspec.Struct, frozen=True):
    """The rule's module, whole, and its limits."""

    source: CodeSource | None  # None: a registered rule, or a module without a file
    limits: RuleLimits


class Ready(msgspec.Struct, frozen=True):
    """The rule is loaded, or `error` says why it can't be used."""

    needs: RuleNeeds = RuleNeeds()
    error: str = ""


class Call(msgspec.Struct, frozen=True):
    """Score these rows in one call of the rule: one row, or a batch."""

    number: int
    rows: list[RuleRow]


class Answers(msgspec.Struct, frozen=True):
    """The answers to a call, in the order of its rows."""

    number: int
    answers: list[RuleAnswer]
    raised: bool = False  # the call itself failed, so all have the same cause, whichever row is to blame


def framed(body: Setup | Ready | Call | Answers) -> bytes:
    """A message as it is written into a pipe."""
    packed = msgspec.msgpack.encode(body)
    return LENGTH.pack(len(packed)) + packed


def take_frame(buffer: bytearray) -> bytes | None:
    """Take the first whole message's body out of what was read so far; None if it is not whole yet."""
    if len(buffer) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack_from(buffer)
    if len(buffer) < LENGTH.size + length:
        return None
    body = bytes(buffer[LENGTH.size : LENGTH.size + length])
    del buffer[: LENGTH.size + length]
    return body
