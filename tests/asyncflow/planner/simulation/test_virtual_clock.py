"""Virtual time: the order of wake-ups, and the slow-down of work on shared cores."""

from __future__ import annotations

import pytest

from asyncflow.planner.simulation.virtual_clock import Clock, Cores, Signal


def test_sleepers_wake_in_the_order_of_their_times_and_ties_in_the_order_of_asking():
    clock, woken = Clock(), list[tuple[str, float]]()

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.now))

    for name, seconds in (("late", 3.0), ("first", 1.0), ("second", 1.0), ("now", 0.0)):
        clock.start(sleeper(name, seconds))
    clock.run()
    assert woken == [("now", 0.0), ("first", 1.0), ("second", 1.0), ("late", 3.0)]


def test_a_signal_wakes_those_that_wait_and_nobody_later():
    clock = Clock()
    signal = Signal(clock)
    woken: list[str] = []

    async def waiter(name: str, before: float) -> None:
        await clock.sleep(before)
        await signal.wait()
        woken.append(name)

    async def sender() -> None:
        await clock.sleep(1.0)
        signal.send()

    clock.start(waiter("in time", 0))
    clock.start(waiter("too late", 2))
    clock.start(sender())
    clock.run()
    assert woken == ["in time"]


def test_all_waits_for_the_last():
    clock, ended = Clock(), list[float]()

    async def parent() -> None:
        await clock.all([clock.sleep(1.0), clock.sleep(4.0), clock.sleep(2.0)])
        await clock.all([])
        ended.append(clock.now)

    clock.start(parent())
    clock.run()
    assert ended == [4.0]


@pytest.mark.parametrize(
    ("cores", "crowded", "works", "ends"),
    [
        (0.0, 0.0, [(0, 3), (0, 3), (0, 3)], [3, 3, 3]),  # everybody has a core
        (1.0, 0.0, [(0, 3), (0, 3)], [6, 6]),
        (2.0, 0.0, [(0, 3), (0, 3)], [3, 3]),
        (1.0, 0.0, [(0, 1), (0, 3)], [2, 4]),  # the second is alone from 2 on
        (1.0, 0.0, [(0, 2), (1, 2)], [3, 4]),  # alone for 1, shared for 2, alone for 1
        (1.5, 0.0, [(0, 3), (0, 3)], [4, 4]),  # threads of one interpreter get less than two cores
        (2.0, 0.0, [(0, 2), (0, 2), (0, 2), (5, 1)], [3, 3, 3, 6]),
        (2.0, 1.5, [(0, 3), (0, 3)], [3, 3]),  # as many as cores
        (2.0, 1.5, [(0, 2), (0, 2), (0, 2)], [4, 4, 4]),  # they take turns, and find their caches cold
        (2.0, 1.5, [(0, 1), (0, 2), (0, 2)], [2, 3, 3]),  # until the first is done
    ],
)
def test_work_that_shares_cores_is_as_slow_as_its_share(
    cores: float, crowded: float, works: list[tuple[float, float]], ends: list[float]
):
    clock, ended = Clock(), dict[int, float]()
    shared = Cores(clock, cores, crowded)

    async def worker(number: int, at: float, seconds: float) -> None:
        await clock.sleep(at)
        await shared.work(seconds)
        ended[number] = clock.now

    for number, (at, seconds) in enumerate(works):
        clock.start(worker(number, at, seconds))
    clock.run()
    assert [ended[number] for number in range(len(works))] == pytest.approx(ends)


def test_an_error_reaches_whoever_runs_the_clock():
    clock = Clock()

    async def broken() -> None:
        await clock.sleep(1.0)
        raise ValueError("boom")

    clock.start(broken())
    with pytest.raises(ValueError, match="boom"):
        clock.run()
