"""Events are read by cursor: late, returning and concurrent followers see the same events, and all see the end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from asyncflow.control import events
from asyncflow.control.events import EventLog, Notifier
from asyncflow.observe.event_file import EventFile
from protocols.control.errors import BadInput
from protocols.control.events import Event, RunEnded, RunStarted, StateChanged, WaitsChanged

ENDED = RunEnded(outcome="finished", step=1)
PAUSED, RUNNING = StateChanged(state="paused"), StateChanged(state="running")
AGAIN = RunStarted(run="run", folder="run", steps=2, first_step=1, term=1)


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(EventFile(tmp_path))


def waits(prompts: int) -> WaitsChanged:
    return WaitsChanged(waits={}, live_prompts=prompts, step_progress=0.0)


async def follow(log: EventLog, cursor: int = 0) -> list[tuple[int, Event]]:
    async with asyncio.timeout(60):  # for the events up to RunEnded
        return [item async for item in log.follow(cursor)]


async def collect(log: EventLog, cursor: int = 0) -> list[Event]:
    return [event for _, event in await follow(log, cursor)]


async def test_a_late_follower_sees_everything(log: EventLog):
    for event in (PAUSED, RUNNING, ENDED):
        log.add(event)
    assert await collect(log) == [PAUSED, RUNNING, ENDED]


async def test_the_cursor_of_an_event_is_where_to_go_on_after_it(log: EventLog):
    for event in (PAUSED, RUNNING, ENDED):
        log.add(event)
    first, second, last = [cursor for cursor, _ in await follow(log)]
    assert last == log.end
    assert await follow(log, first) == [(second, RUNNING), (last, ENDED)]
    assert await follow(log, last) == []


async def test_nothing_is_added_after_the_end(log: EventLog):
    """Otherwise a follower with the cursor of the end would wait forever."""
    log.add(ENDED)
    end = log.end
    log.add(PAUSED)
    assert await follow(log) == [(end, ENDED)]


async def test_a_follower_in_waiting_is_woken_by_each_event(log: EventLog):
    first, second = asyncio.create_task(collect(log)), asyncio.create_task(collect(log))
    for event in (PAUSED, RUNNING, ENDED):
        await asyncio.sleep(0)
        log.add(event)
    assert await first == await second == [PAUSED, RUNNING, ENDED]


async def test_a_slow_follower_misses_nothing(log: EventLog):
    log.add(PAUSED)
    seen = []
    async with asyncio.timeout(60):
        async for _, event in log.follow(0):
            seen.append(event)
            if len(seen) == 1:
                log.add(RUNNING)
                log.add(ENDED)
    assert seen == [PAUSED, RUNNING, ENDED]


async def test_a_follower_that_leaves_does_not_disturb_another(log: EventLog):
    left = asyncio.create_task(collect(log))
    stays = asyncio.create_task(collect(log))
    await asyncio.sleep(0)
    left.cancel()
    log.add(ENDED)
    assert await stays == [ENDED]


async def test_events_that_memory_no_longer_holds_are_read_from_the_file(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(events, "RECENT_EVENTS", 2)
    for event in (PAUSED, RUNNING, PAUSED, RUNNING, ENDED):
        log.add(event)
    assert await collect(log) == [PAUSED, RUNNING, PAUSED, RUNNING, ENDED]
    assert log.end == (await follow(log))[-1][0]


async def test_a_resumed_runs_past_is_there_for_who_asks(log: EventLog, tmp_path: Path):
    log.add(PAUSED)
    log.add(ENDED)
    resumed = EventLog(EventFile(tmp_path))
    resumed.add(AGAIN)
    resumed.add(ENDED)
    assert await collect(resumed, 0) == [PAUSED, ENDED, AGAIN, ENDED]
    assert await collect(resumed, resumed.start) == [AGAIN, ENDED]


async def test_a_cursor_inside_an_event_or_beyond_the_end_is_refused(log: EventLog, tmp_path: Path):
    log.add(PAUSED)
    log.add(ENDED)
    for cursor in (1, log.end - 1, log.end + 1, -1):
        with pytest.raises(BadInput, match=f"cursor {cursor} is none of this run"):
            await collect(log, cursor)
    resumed = EventLog(EventFile(tmp_path))
    resumed.add(ENDED)
    with pytest.raises(BadInput, match="cursor 1 is none of this run"):
        await collect(resumed, 1)


async def test_a_follower_gets_the_last_waits_only_and_they_have_no_cursor(log: EventLog):
    log.add(PAUSED)
    cursor = log.end
    for prompts in range(3):
        log.add(waits(prompts))
    items = log.follow(0)
    assert [await anext(items) for _ in range(2)] == [(cursor, PAUSED), (cursor, waits(2))]
    log.add(ENDED)
    assert [item async for item in items] == [(log.end, ENDED)]


async def test_events_that_the_disk_refuses_reach_the_followers_all_the_same(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
):
    def refuse(self: EventFile, event: Event) -> int:
        raise OSError("No space left on device")

    log.add(PAUSED)
    monkeypatch.setattr(EventFile, "append", refuse)
    log.add(RUNNING)
    monkeypatch.undo()
    log.add(ENDED)  # after one that is not in the file, it would have the wrong place there
    assert await collect(log) == [PAUSED, RUNNING, ENDED]


async def test_a_pulse_wakes_everybody_and_only_once():
    pulse = Notifier()
    waiting = [asyncio.create_task(pulse.changed()) for _ in range(3)]
    await asyncio.sleep(0)
    pulse.notify()
    async with asyncio.timeout(60):  # for the three waiters
        await asyncio.gather(*waiting)
    again = asyncio.create_task(pulse.changed())
    await asyncio.sleep(0)
    assert not again.done(), "the next beat is another one"
    again.cancel()
