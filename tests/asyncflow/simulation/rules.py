"""The rules of a simulated world: the real pure code, and the behaviour of the real services around it.

The defaults are the rules. A test removes a rule by putting a small variant in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from asyncflow.control.admission.inflight_prompts import InFlightPrompts
from asyncflow.control.admission.staleness import Admission
from asyncflow.control.device_lease import PoolLease, shared_leases
from asyncflow.services.channels.mailbox import has_room
from asyncflow.services.channels.outbox import Outbox
from asyncflow.services.channels.prompt_join import PromptJoin
from asyncflow.services.channels.row_table import RowTable
from protocols.data.ids import sampling_seed


def joins_never_refuse(join: PromptJoin, position: int, samples: list[int]) -> bool:
    """Whether a join accepts rows of one input now."""
    return True


def seed_of_the_sample(sample: int, drawing: int) -> int:
    """The seed of a row: a row that is generated again after a crash gets the same seed."""
    return sampling_seed(0, sample)


class Rules(msgspec.Struct, frozen=True):
    """The numbers in brackets are those of the rules of time."""

    row_table: type[RowTable[Any]] = RowTable
    prompt_join: type[PromptJoin] = PromptJoin
    outbox: type[Outbox[Any]] = Outbox
    admission: type[Admission] = Admission
    inflight_prompts: type[InFlightPrompts] = InFlightPrompts
    leases: Callable[[Mapping[str, str]], dict[str, PoolLease]] = shared_leases
    has_room: Callable[[int, int, int], bool] = has_room
    join_room: Callable[[PromptJoin, int, list[int]], bool] = joins_never_refuse  # [1]
    kept_while_sending: Literal["nothing", "lease", "thread"] = "nothing"  # [3] by a stage that waits for credit
    fires_on: int = 1  # [4] rows that a stage waits for
    tombstones: bool = True  # [5] a failed row travels on
    join_hears_first: bool = True  # [7] that a prompt was dropped, before the budget has its place
    rises_after: Literal["all", "policy"] = "all"  # [11] who must be done with a step
    one_batch: bool = True  # [11] formed once, for all trainers; else each takes what is best when it begins
    update_keeps_lease: bool = False  # [12] until its weights are loaded
    publishes_first: bool = True  # [12] before the commit
    min_version: Literal["before the slot", "in the slot", "nowhere"] = "before the slot"  # [13]
    loads: Literal["in order", "in any order", "when idle"] = "in order"  # [13]
    prox: Literal["of the update", "of the drawing"] = "of the update"  # [16] whose log-probs the ratio divides by
    seed: Callable[[int, int], int] = seed_of_the_sample  # [17] of a sample's n-th drawing after a crash
    in_id_order: bool = False  # [18] a firing takes its rows in the order of their ids
    # What the first sketch of the rules did not cover: delivery.
    new_attempts: bool = True  # rows that are drawn again carry a higher attempt
    asks_again: bool = True  # who finds rows unreadable asks their senders for what they keep
    tells_ended: bool = True  # a successor is told which prompts are over
    trains_once: bool = True  # a trainer refuses a step that it had
