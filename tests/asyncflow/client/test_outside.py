"""An outside worker in the hands of a program: what it puts is told apart into taken, refused and not asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence

import pytest

from asyncflow.client.outside import NotAsked, Outside
from asyncflow.services.channels.endpoint import Payload, Requestable, Store
from asyncflow.services.channels.shard_refs import unpack
from asyncflow.services.runtime.local_store import LocalStore
from protocols.control.requests import PutRows, Reply, Request, RowsPut
from protocols.data.columns import Batch
from protocols.data.messages import Scores
from protocols.stage import Failure
from tests.asyncflow.services import rows


class Service:
    """A service that gives every put the same answer. Implements `Requestable`."""

    name = "reward"

    def __init__(self, answer: RowsPut) -> None:
        self.answer = answer
        self.put_so_far: list[tuple[list[Scores], list[Failure], float]] = []

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        assert isinstance(request, PutRows)
        answers = [unpack([payload], Scores) for payload in payloads]
        self.put_so_far.append((answers, request.failures, request.seconds))
        return self.answer, []


def outside_of(service: Service) -> Outside:
    return Outside("reward", service, LocalStore(), lambda: False)


async def test_rows_come_as_rollouts_as_many_as_are_wanted(monkeypatch: pytest.MonkeyPatch):
    async def take_rows(
        endpoint: Requestable, store: Store, most: int, over: Callable[[], bool]
    ) -> AsyncGenerator[Batch]:
        yield rows.rollouts(range(most))

    monkeypatch.setattr("asyncflow.client.outside.take_rows", take_rows)
    outside = outside_of(Service(RowsPut()))
    assert [batch async for batch in outside.rows(most=3)] == [rows.rollouts([0, 1, 2])]


async def test_answers_and_failures_go_to_the_role():
    service = Service(RowsPut())
    outside = outside_of(service)
    assert await outside.put(rows.scores([1]), seconds=5.0) == {}
    assert await outside.fail([2, 3], "unclear") == {}
    assert service.put_so_far == [
        ([rows.scores([1])], [], 5.0),
        ([], [Failure(2, "unclear"), Failure(3, "unclear")], 60.0),
    ]


async def test_late_rows_are_returned_with_the_reason():
    outside = outside_of(Service(RowsPut({1: "it was answered already"})))
    assert await outside.put(rows.scores([1, 2])) == {1: "it was answered already"}


async def test_rows_that_nobody_asked_for_are_named():
    outside = outside_of(Service(RowsPut({}, list(range(9)))))
    with pytest.raises(NotAsked, match=r"9 rows .* within 2 s: samples 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.") as error:
        await outside.put(rows.scores(range(9)), seconds=2.0)
    assert error.value.sample_ids == list(range(9))
