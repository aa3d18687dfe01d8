"""Collective calls run on all ranks, one at a time; if one rank fails, the call ends without waiting for the rest."""

from __future__ import annotations

import asyncio

import pytest

from asyncflow.services.channels.endpoint import ServiceError
from asyncflow.services.ranks.collective_calls import CollectiveCalls


def calls_of(collective: bool = True, grace_seconds: float = 0.05) -> CollectiveCalls:
    return CollectiveCalls("policy", collective, grace_seconds)


async def done(value: int) -> int:
    return value


async def failing(why: str, after: float = 0.0) -> int:
    await asyncio.sleep(after)
    raise ValueError(why)


async def waiting() -> int:
    return await asyncio.get_running_loop().create_future()


async def test_the_parts_of_all_ranks_come_back_by_rank():
    assert await calls_of().run("update", {1: done(10), 0: done(20)}) == {0: 20, 1: 10}


async def test_a_fault_that_all_ranks_report_is_raised_and_they_stay_in_step():
    """For example a refused optimizer step: every rank sees the same loss."""
    work = calls_of(grace_seconds=60.0)
    with pytest.raises(ValueError, match="loss is nan"):
        await work.run("update", {0: failing("loss is nan"), 1: failing("loss is nan", after=0.01)})
    assert work.in_step
    assert await work.run("update", {0: done(1)}) == {0: 1}


async def test_a_rank_that_raises_alone_ends_what_the_others_wait_for():
    work = calls_of()
    with pytest.raises(ServiceError, match="ValueError: no room; ranks 1, 2 wait for it"):
        async with asyncio.timeout(60):
            await work.run("update", {0: failing("no room"), 1: waiting(), 2: waiting(), 3: done(1)})
    assert not work.in_step


async def test_nothing_is_asked_of_ranks_that_are_out_of_step():
    work, asked = calls_of(), []

    async def ask() -> None:
        asked.append(True)

    with pytest.raises(ServiceError):
        await work.run("update", {0: failing("no room"), 1: waiting()})
    with pytest.raises(ServiceError, match="policy: log_probs: its ranks are out of step: ValueError: no room"):
        await work.run("log_probs", {0: ask(), 1: ask()})
    assert asked == []


async def test_the_cause_is_what_failed_first_not_what_followed_from_it():
    with pytest.raises(ValueError, match="no room"):
        await calls_of(grace_seconds=60.0).run(
            "update", {0: failing("connection closed by peer", after=0.01), 1: failing("no room")}
        )


async def test_an_exclusive_section_is_entered_by_one_at_a_time():
    work, order = calls_of(), []

    async def take(name: str) -> None:
        async with work.exclusive():
            order.append(f"{name} begins")
            await asyncio.sleep(0)
            order.append(f"{name} ends")

    await asyncio.gather(take("update"), take("snapshot"))
    assert order == ["update begins", "update ends", "snapshot begins", "snapshot ends"]


async def test_ranks_that_are_not_collective_need_no_exclusion():
    work = calls_of(collective=False)
    async with asyncio.timeout(60), work.exclusive(), work.exclusive():
        pass


async def test_a_failing_rank_that_is_not_collective_leaves_the_others_working():
    """The other rank may need longer for its rows than the grace period."""
    work = calls_of(collective=False)
    with pytest.raises(ValueError, match="no such file"):
        await work.run("reload", {0: failing("no such file"), 1: asyncio.sleep(0.2, 1)})
    assert await work.run("reload", {0: done(1), 1: done(2)}) == {0: 1, 1: 2}


async def test_what_is_given_up_is_cancelled_on_every_rank_and_they_are_out_of_step():
    work, cancelled = calls_of(), []

    async def part(rank: int) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled.append(rank)
            raise

    task = asyncio.create_task(work.run("update", {0: part(0), 1: part(1)}))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert cancelled == [0, 1]
    with pytest.raises(ServiceError, match="snapshot: its ranks are out of step: update was cancelled half way"):
        await work.run("snapshot", {0: done(1), 1: done(2)})
