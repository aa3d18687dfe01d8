"""The order of prompts: a pure function of (seed, cursor), each set in epochs of its own, mixed exactly by weights."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.control.admission.prompt_order import PromptOrder
from protocols.data.ids import EVALUATION_EPOCH, place_of, purpose_of

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5)
WEIGHTS = st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 100.0, 0.333333])


def order(sizes: list[int], weights: list[float], seed: int = 0) -> PromptOrder:
    """Sets of these sizes, whose rows count through."""
    sets = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return PromptOrder(seed, sets, weights, sum(sizes))


def rows(mixed: PromptOrder, count: int) -> list[int]:
    return [mixed.row_of(mixed.prompt_at(cursor)) for cursor in range(count)]


@given(sizes=SIZES, data=st.data(), seed=st.integers(0, 3))
def test_each_set_gives_every_row_once_in_each_of_its_epochs(sizes: list[int], data: st.DataObject, seed: int):
    weights = data.draw(st.lists(WEIGHTS, min_size=len(sizes), max_size=len(sizes)))
    drawn, ends = rows(order(sizes, weights, seed), 200), np.cumsum(sizes).tolist()
    for end, size in zip(ends, sizes, strict=True):
        own = [row for row in drawn if end - size <= row < end]
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(end - size, end))


@given(sizes=SIZES, data=st.data())
def test_a_set_has_its_share_of_any_number_of_prompts(sizes: list[int], data: st.DataObject):
    weights = data.draw(st.lists(WEIGHTS, min_size=len(sizes), max_size=len(sizes)))
    set_of = np.repeat(np.arange(len(sizes)), sizes)
    drawn = set_of[rows(order(sizes, weights), 300)]
    shares = np.array(weights) / sum(weights)
    for count in range(1, 301):
        owed = np.bincount(drawn[:count], minlength=len(sizes)) - count * shares
        assert (np.abs(owed) <= len(sizes) / 2 + 1e-9).all()


def test_proportions_are_exact_where_they_can_be():
    mixed = order([3, 5, 7], [0.7, 0.2, 0.1])
    set_of = np.repeat([0, 1, 2], [3, 5, 7])
    for start in (0, 10, 990, 10**12):  # every ten, also far into a long run
        drawn = [set_of[mixed.row_of(mixed.prompt_at(start + i))] for i in range(10)]
        assert Counter(drawn) == {0: 7, 1: 2, 2: 1}


@given(sizes=SIZES, seed=st.integers(0, 3), cursors=st.lists(st.integers(0, 10**9), min_size=1, max_size=20))
def test_the_order_depends_on_the_cursor_alone(sizes: list[int], seed: int, cursors: list[int]):
    """A cursor gives the same prompt whatever was requested before, as in a resumed run."""
    weights = [1.0 + number for number in range(len(sizes))]
    used = order(sizes, weights, seed)
    assert [used.prompt_at(c) for c in cursors] == [order(sizes, weights, seed).prompt_at(c) for c in cursors]


@pytest.mark.parametrize("sizes", [[1], [2, 1]])
def test_a_short_file_lasts_for_any_number_of_steps(sizes: list[int]):
    """Epochs have 15 bits of an id; one row has as many epochs as there are prompts."""
    mixed = order(sizes, [1.0] * len(sizes))
    around = [n * EVALUATION_EPOCH * 2 + i for n in (0, 1, 2, 1_000, 1_000_000) for i in range(-3, 3) if n or i >= 0]
    prompts = [mixed.prompt_at(cursor) for cursor in around]
    assert len(set(prompts)) == len(prompts)
    assert {purpose_of(prompt << 16) for prompt in prompts} == {"train"}
    assert {mixed.row_of(prompt) for prompt in prompts} == set(range(sum(sizes)))


def test_the_first_epochs_have_their_number_in_the_id():
    mixed = order([4], [1.0])
    assert [place_of(mixed.prompt_at(cursor))[0] for cursor in range(12)] == [0] * 4 + [1] * 4 + [2] * 4


def test_ids_end_after_more_prompts_than_any_run_has():
    mixed = order([1], [1.0])
    with pytest.raises(ValueError, match="does not fit"):
        mixed.prompt_at(10**15)


def test_rows_of_no_set_are_never_prompts():
    mixed = PromptOrder(3, [np.array([0, 2, 5]), np.array([7])], [2.0, 1.0], 9)
    assert set(rows(mixed, 60)) == {0, 2, 5, 7}


def test_sets_of_one_size_are_permuted_differently():
    mixed = order([20, 20], [1.0, 1.0])
    drawn = rows(mixed, 40)
    assert [row for row in drawn if row < 20] != [row - 20 for row in drawn if row >= 20]
    assert all(one < 20 <= other for one, other in pairwise(drawn[:2])), "equal weights take turns"
