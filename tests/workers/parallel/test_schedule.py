"""Pipeline schedules: every stage computes each micro-batch once, and no order of transfers deadlocks."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from workers.parallel.schedule import Backward, Forward, Message, Operation, Transfer, forward_schedule, train_schedule

stages_and_micros = st.tuples(st.integers(1, 6), st.integers(0, 9))


def computed(operations: list[Operation]) -> list[Operation]:
    return [operation for operation in operations if not isinstance(operation, Transfer)]


def run_together(programs: list[list[Operation]]) -> list[list[Operation]]:
    """Run all stages' programs, and return what is left of each when none can go on.

    A transfer completes only when all of its messages have been matched by their peers: the strictest semantics of a
    collective transport, without buffers and without partial completion.
    """
    left = [list(program) for program in programs]
    met: set[tuple[int, Message]] = set()  # messages of the transfers at the head, by sending stage
    moved = True
    while moved:
        moved = False
        heads = [program[0] if program else None for program in left]
        for stage, head in enumerate(heads):
            if isinstance(head, Transfer):
                for message in head.sends:
                    there = heads[message.peer]
                    if isinstance(there, Transfer) and replace(message, peer=stage) in there.receives:
                        met.add((stage, message))
        for stage, head in enumerate(heads):
            if isinstance(head, Transfer):
                own = {(stage, message) for message in head.sends}
                own |= {(message.peer, replace(message, peer=stage)) for message in head.receives}
                if not own <= met:
                    continue
            if head is not None:
                left[stage].pop(0)
                moved = True
    return left


@given(stages_and_micros)
def test_training_never_deadlocks(sizes: tuple[int, int]):
    stages, micros = sizes
    assert not any(run_together([train_schedule(stage, stages, micros) for stage in range(stages)]))


@given(stages_and_micros)
def test_a_forward_never_deadlocks(sizes: tuple[int, int]):
    stages, micros = sizes
    assert not any(run_together([forward_schedule(stage, stages, micros) for stage in range(stages)]))


@given(stages_and_micros)
def test_each_micro_batch_goes_forward_then_backward_once(sizes: tuple[int, int]):
    stages, micros = sizes
    for stage in range(stages):
        order = computed(train_schedule(stage, stages, micros))
        assert Counter(order) == Counter([*map(Forward, range(micros)), *map(Backward, range(micros))])
        assert all(order.index(Forward(i)) < order.index(Backward(i)) for i in range(micros))


@given(stages_and_micros)
def test_a_stage_holds_at_most_one_activation_for_each_stage_from_it_on(sizes: tuple[int, int]):
    stages, micros = sizes
    for stage in range(stages):
        held = most = 0
        for operation in computed(train_schedule(stage, stages, micros)):
            held += 1 if isinstance(operation, Forward) else -1
            most = max(most, held)
        assert most == min(stages - stage, micros)


def test_one_stage_exchanges_nothing():
    assert train_schedule(0, 1, 2) == [Forward(0), Backward(0), Forward(1), Backward(1)]


def test_neighbours_swap_an_activation_for_a_gradient_in_one_transfer():
    swap = Transfer((Message("activation", 1, 1),), (Message("gradient", 0, 1),))
    assert train_schedule(0, 2, 2)[3] == swap


def test_the_simulation_sees_a_deadlock():
    """Two stages that both send before they receive."""
    down, back = Message("activation", 0, 1), Message("gradient", 0, 0)
    first: list[Operation] = [Transfer((down,), ()), Transfer((), (replace(back, peer=1),))]
    second: list[Operation] = [Transfer((back,), ()), Transfer((), (replace(down, peer=0),))]
    assert any(run_together([first, second]))
