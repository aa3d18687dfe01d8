"""The order in which a pipeline stage computes and exchanges: one forward, one backward (1F1B), as a pure list.

Stage s of p runs p - 1 - s forwards ahead, then forward and backward in turn, so that it never holds the activations
of more than p - s micro-batches (Narayanan et al. 2021, PipeDream-Flush). What it sends after one computation and
what it awaits for the next are one `Transfer`: posted together, since two neighbours that each send first and
receive afterwards would wait for each other on NCCL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec


class Message(msgspec.Struct, frozen=True):
    """The activation of a micro-batch going to the next stage, or its gradient going to the one before."""

    what: Literal["activation", "gradient"]
    micro: int
    peer: int  # the stage at the other end


class Forward(msgspec.Struct, frozen=True):
    micro: int


class Backward(msgspec.Struct, frozen=True):
    micro: int


class Transfer(msgspec.Struct, frozen=True):
    """Messages that leave and arrive at the same time; it ends when all of them are through."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


Compute = Forward | Backward
Operation = Compute | Transfer


def train_schedule(stage: int, stages: int, micros: int) -> list[Operation]:
    """1F1B over `micros` micro-batches, transfers included. Fewer micro-batches than stages are fine."""
    ahead = min(stages - 1 - stage, micros)
    order: list[Compute] = [Forward(i) for i in range(ahead)]
    for i in range(micros - ahead):
        order += [Forward(ahead + i), Backward(i)]
    order += [Backward(i) for i in range(micros - ahead, micros)]
    return with_transfers(order, stage, stages)


def forward_schedule(stage: int, stages: int, micros: int) -> list[Operation]:
    """Forwards only, in order."""
    return with_transfers([Forward(i) for i in range(micros)], stage, stages)


def with_transfers(order: Sequence[Compute], stage: int, stages: int) -> list[Operation]:
    """Put between each two computations what the first one's result and the second one's input need."""
    operations: list[Operation] = []
    for before, after in zip([None, *order], [*order, None], strict=True):
        transfer = Transfer(_sent(before, stage, stages), _awaited(after, stage, stages))
        if transfer.sends or transfer.receives:
            operations.append(transfer)
        if after is not None:
            operations.append(after)
    return operations


def _sent(done: Compute | None, stage: int, stages: int) -> tuple[Message, ...]:
    match done:
        case Forward(micro) if stage < stages - 1:
            return (Message("activation", micro, stage + 1),)
        case Backward(micro) if stage > 0:
            return (Message("gradient", micro, stage - 1),)
    return ()


def _awaited(next_: Compute | None, stage: int, stages: int) -> tuple[Message, ...]:
    match next_:
        case Forward(micro) if stage > 0:
            return (Message("activation", micro, stage - 1),)
        case Backward(micro) if stage < stages - 1:
            return (Message("gradient", micro, stage + 1),)
    return ()
