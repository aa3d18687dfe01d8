"""The client of an external worker: each answer is accepted, refused with a reason, or was never requested."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import pytest

from asyncflow.client.outside import NotAsked, Outside
from protocols.control.replies import RowsPut
from protocols.data.columns import Batch
from protocols.stage import Failure
from tests.asyncflow.services import rows


class Link:
    """A fake link that gives the same reply to every put."""

    def __init__(self, answer: RowsPut) -> None:
        self.answer = answer
        self.put_so_far: list[tuple[str, Batch | None, list[Failure], float]] = []

    async def take(self, role: str, most: int) -> AsyncGenerator[Batch]:
        yield rows.rollouts(range(most))

    async def put(self, role: str, answers: Batch | None, failures: Sequence[Failure], seconds: float) -> RowsPut:
        self.put_so_far.append((role, answers, list(failures), seconds))
        return self.answer


async def test_rows_come_as_rollouts_as_many_as_are_wanted():
    outside = Outside(Link(RowsPut()), "reward")
    assert [batch async for batch in outside.rows(most=3)] == [rows.rollouts([0, 1, 2])]


async def test_answers_and_failures_go_to_the_role():
    link = Link(RowsPut())
    outside = Outside(link, "reward")
    assert await outside.put(rows.scores([1]), seconds=5.0) == {}
    assert await outside.fail([2, 3], "unclear") == {}
    assert link.put_so_far == [
        ("reward", rows.scores([1]), [], 5.0),
        ("reward", None, [Failure(2, "unclear"), Failure(3, "unclear")], 60.0),
    ]


async def test_late_rows_are_returned_with_the_reason():
    outside = Outside(Link(RowsPut({1: "it was answered already"})), "reward")
    assert await outside.put(rows.scores([1, 2])) == {1: "it was answered already"}


async def test_rows_that_nobody_asked_for_are_named():
    outside = Outside(Link(RowsPut({}, list(range(9)))), "reward")
    with pytest.raises(NotAsked, match=r"9 rows .* within 2 s: samples 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.") as error:
        await outside.put(rows.scores(range(9)), seconds=2.0)
    assert error.value.sample_ids == list(range(9))
