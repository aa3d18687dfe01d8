"""The 1F1B schedule of a pipeline stage, as a list: its forward and backward passes, and the transfers between them.

Stage s of p runs p - 1 - s forward passes ahead, then a forward and a backward pass in turn. So it never holds the
activations of more than p - s micro-batches (Narayanan et al. 2021, PipeDream-Flush). What it sends after one pass and
what it receives for the next are one `Transfer` and are posted together: on NCCL two neighbours that each send first
and receive afterwards would wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec


class Message(msgspec.Struct, frozen=True):
    """The activation of a micro-batch on its way to the next stage, or its gradient on its way to the one before."""

    what: Literal["activation", "gradient"]
    micro: int
    peer: int  # the stage at the other end


class Forward(msgspec.Struct, frozen=True):
    micro: int


class Backward(msgspec.Struct, frozen=True):
    micro: int


class Transfer(msgspec.Struct, frozen=True):
    """Messages that are sent and received at the same time. It ends when all have arrived."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


Compute = Forward | Backward
Operation = Compute | Transfer


def train_schedule(stage: int, stages: int, micros: int) -> list[Operation]:
    """1F1B over `micros` micro-batches, with the transfers. There may be fewer micro-batches than stages."""
    ahead = min(stages - 1 - stage, micros)
    order: list[Compute] = [Forward(i) for i in range(ahead)]
    for i in range(micros - ahead):
        order += [Forward(ahead + i), Backward(i)]
    order += [Backward(i) for i in range(micros - ahead, micros)]
    return with_transfers(order, stage, stages)


def forward_schedule(stage: int, stages: int, micros: int) -> list[Operation]:
    """Forward passes only, in order, with the transfers."""
    return with_transfers([Forward(i) for i in range(micros)], stage, stages)


def with_transfers(order: Sequence[Compute], stage: int, stages: int) -> list[Operation]:
    """Insert between any two computations the transfer of the first one's result and of the second one's input."""
    operations: list[Operation] = []
    for before, after in zip([None, *order], [*order, None], strict=True):
        transfer = Transfer(_message(before, stage, stages, sent=True), _message(after, stage, stages, sent=False))
        if transfer.sends or transfer.receives:
            operations.append(transfer)
        if after is not None:
            operations.append(after)
    return operations


def _message(computation: Compute | None, stage: int, stages: int, *, sent: bool) -> tuple[Message, ...]:
    """The message that carries a computation's result (`sent`) or its input; none at the ends of the pipeline."""
    match computation:
        case Forward(micro):
            message = Message("activation", micro, stage + 1 if sent else stage - 1)
        case Backward(micro):
            message = Message("gradient", micro, stage - 1 if sent else stage + 1)
        case None:
            return ()
    return (message,) if 0 <= message.peer < stages else ()
