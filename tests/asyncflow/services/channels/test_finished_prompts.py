"""The set of finished prompts stores one entry per run of consecutive ids."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncflow.services.channels.finished_prompts import FinishedPrompts

PROMPTS = st.integers(0, 40)


def finished(*prompts: int) -> FinishedPrompts:
    made = FinishedPrompts()
    for prompt in prompts:
        made.add(prompt)
    return made


@given(st.lists(PROMPTS))
def test_it_holds_what_was_added_in_any_order_and_nothing_else(prompts: list[int]):
    made = finished(*prompts)
    assert [p for p in range(42) if p in made] == sorted(set(prompts))


@given(st.lists(PROMPTS))
def test_it_costs_a_run_of_ids_however_the_run_came_about(prompts: list[int]):
    starts = {p for p in prompts if p - 1 not in prompts}
    assert len(finished(*prompts)) == len(starts)


def test_prompts_that_end_in_order_cost_one_number_for_ever():
    assert len(finished(*range(10_000))) == 1


def test_the_missing_prompt_joins_its_neighbours():
    assert len(finished(1, 3)) == 2
    assert len(finished(1, 3, 2)) == 1
