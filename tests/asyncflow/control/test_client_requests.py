"""What clients ask for outlasts a term: each gets one answer, from whichever term has one, or the end of the run."""

from __future__ import annotations

import asyncio

import pytest

from asyncflow.control.client_requests import ClientRequests
from asyncflow.control.supervision.outcome import RunFailed
from protocols.control.events import CodeReloaded
from workers.user_code import BadCode

RELOADED = CodeReloaded(step=3, digests={})


async def begun() -> None:
    """Let the requests reach the point at which they wait."""
    await asyncio.sleep(0)


async def test_all_that_wait_for_a_checkpoint_get_the_next_one():
    requests = ClientRequests()
    asked = [asyncio.create_task(requests.checkpoint("over")) for _ in range(2)]
    await begun()
    assert requests.wants_checkpoint
    requests.answer_checkpoints("step_000003")
    assert await asyncio.gather(*asked) == ["step_000003"] * 2
    assert not requests.pending


async def test_a_reload_answers_those_that_came_before_it_began():
    """A file that changed after it was read is the concern of the next reload."""
    requests = ClientRequests()
    first = asyncio.create_task(requests.reload())
    await begun()
    count = requests.reloads
    second = asyncio.create_task(requests.reload())
    await begun()
    requests.answer_reloads(count, RELOADED)
    assert await first == RELOADED
    assert (second.done(), requests.reloads) == (False, 1)
    requests.answer_reloads(1, BadCode("line 3"))
    with pytest.raises(BadCode, match="line 3"):
        await second


async def test_a_client_that_has_left_is_passed_over():
    requests = ClientRequests()
    gone, asked = [asyncio.create_task(requests.checkpoint("over")) for _ in range(2)]
    await begun()
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    requests.answer_checkpoints("step_000003")
    assert await asked == "step_000003"


async def test_the_end_of_the_run_answers_all_and_refuses_later_ones():
    requests = ClientRequests()
    asked = asyncio.create_task(requests.checkpoint("its last checkpoint: none"))
    await begun()
    requests.end("a disk is full")
    with pytest.raises(RunFailed, match="the run ended before it: a disk is full"):
        await asked
    with pytest.raises(RunFailed, match="its last checkpoint: none"):
        await requests.checkpoint("its last checkpoint: none")


async def test_a_request_wakes_those_that_wait_for_a_change():
    requests = ClientRequests()
    woken = asyncio.create_task(requests.changed.changed())
    await begun()
    asked = asyncio.create_task(requests.checkpoint("over"))
    await asyncio.wait_for(woken, 60)
    asked.cancel()
