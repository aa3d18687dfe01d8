"""The rules of a simulated world: the real pure code, and the behaviour of the real services around it.

The defaults are the real rules. A test removes a rule by replacing its field with a variant (see `broken`).
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


def seed_of_the_sample(sample: int, generation: int) -> int:
    """The seed of a row: a row that is generated again after a crash gets the same seed."""
    return sampling_seed(0, sample)


class Rules(msgspec.Struct, frozen=True):
    """The numbers in brackets are those of the scheduling rules in `test_rules` and `test_rules_of_runs`."""

    row_table: type[RowTable[Any]] = RowTable
    prompt_join: type[PromptJoin] = PromptJoin
    outbox: type[Outbox[Any]] = Outbox
    admission: type[Admission] = Admission
    inflight_prompts: type[InFlightPrompts] = InFlightPrompts
    leases: Callable[[Mapping[str, str]], dict[str, PoolLease]] = shared_leases
    has_room: Callable[[int, int, int], bool] = has_room
    join_room: Callable[[PromptJoin, int, list[int]], bool] = joins_never_refuse  # [1]
    kept_while_sending: Literal["nothing", "lease", "thread"] = (
        "nothing"  # [3] what a stage holds while it waits for credit
    )
    fires_on: int = 1  # [4] the number of rows that a stage waits for
    tombstones: bool = True  # [5] a failed row is passed on as a tombstone
    join_hears_first: bool = True  # [7] a dropped prompt leaves the join before the budget
    rises_after: Literal["all", "policy"] = (
        "all"  # [11] which trainers must have finished a step before the version rises
    )
    one_batch: bool = True  # [11] all trainers share a batch; else each chooses one when it begins
    update_keeps_lease: bool = False  # [12] an update keeps the devices until its weights are loaded
    publishes_first: bool = True  # [12] weights are published before the commit
    min_version: Literal["before the slot", "in the slot", "nowhere"] = "before the slot"  # [13] where a row waits
    loads: Literal["in order", "in any order", "when idle"] = "in order"  # [13]
    prox: Literal["of the update", "of the generation"] = "of the update"  # [16] weights that the ratio divides by
    seed: Callable[[int, int], int] = seed_of_the_sample  # [17] the seed of a sample's n-th generation
    in_id_order: bool = False  # [18] a firing takes its rows in ascending order of id
    # Delivery; these have no number.
    new_attempts: bool = True  # regenerated rows carry a higher attempt
    asks_again: bool = True  # a stage with unreadable rows requests them from their senders again
    tells_ended: bool = True  # a successor is told which prompts have ended
    trains_once: bool = True  # a trainer refuses a step that it has trained
