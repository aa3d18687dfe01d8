"""Rows of any message can be selected, split and concatenated, and keep their columns together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.data.columns import Batch, JaggedInt32, columns_of, concat, empty, rows_of, select, take
from protocols.data.jagged import Jagged
from protocols.data.messages import SCHEMAS, LogProbs, Rollouts, Scores
from tests.protocols.strategies import batches, messages


def scores(*ids: int) -> Scores:
    return Scores(sample_ids=np.array(ids, np.int64), scores=np.array(ids, np.float32) / 2)


@given(messages(), st.integers(1, 4))
def test_the_parts_of_a_batch_make_it_up(message: Batch, parts: int):
    cuts = [take(message, rows) for rows in np.array_split(np.arange(len(message)), parts)]
    sizes = [len(cut) for cut in cuts]
    assert len(cuts) == parts
    assert max(sizes) - min(sizes) <= 1
    assert concat(cuts) == message


@given(messages(min_rows=1), st.randoms(use_true_random=False))
def test_select_undoes_a_shuffle(message: Batch, random):
    order = random.sample(range(len(message)), len(message))
    shuffled = take(message, order)
    assert shuffled.sample_ids.tolist() == message.sample_ids[order].tolist()
    assert select(shuffled, message.sample_ids) == message


@given(batches(Rollouts, min_rows=1))
def test_rows_keep_their_columns_together(rollouts: Rollouts):
    last = take(rollouts, [len(rollouts) - 1])
    assert last.responses[0].tolist() == rollouts.responses[-1].tolist()
    assert last.finishes[0] == rollouts.finishes[-1]
    last.check()


@pytest.mark.parametrize("kind", SCHEMAS.values(), ids=lambda kind: kind.__name__)
def test_an_empty_batch_is_valid_and_neutral(kind: type[Batch]):
    nothing = empty(kind)
    nothing.check()
    assert len(nothing) == 0
    assert concat([nothing, nothing]) == nothing


def test_rows_are_found_by_id():
    assert rows_of(scores(30, 10, 20), [10, 30, 10]).tolist() == [1, 0, 1]
    assert rows_of(scores(), []).tolist() == []


@pytest.mark.parametrize("ids", [(), (1, 3), (5, 6)])
def test_an_id_that_is_not_there_is_named(ids: tuple[int, ...]):
    with pytest.raises(KeyError, match=f"sample 4 is not among the {len(ids)} rows of Scores"):
        rows_of(scores(*ids), [4])


def test_concat_needs_one_type():
    with pytest.raises(TypeError, match=r"LogProbs.*Scores"):
        concat([scores(1), empty(LogProbs)])
    with pytest.raises(ValueError, match="at least one"):
        concat([])


def test_batches_of_different_type_or_values_differ():
    assert scores(1, 2) == scores(1, 2)
    assert scores(1, 2) != scores(2, 1)
    assert empty(Scores) != empty(LogProbs)


# --- refusals of `check`


def test_check_names_the_column():
    ids, good = np.array([1, 2], np.int64), np.zeros(2, np.float32)
    cases: list[tuple[Scores, str]] = [
        (Scores(sample_ids=ids, scores=good.astype(np.float64)), "scores is float64, want float32"),
        (Scores(sample_ids=ids, scores=good[:1]), "scores: 1 rows, sample_ids has 2"),
        (Scores(sample_ids=ids, scores=good[:, None]), r"scores: shape \[2, 1\], want one value a row"),
        (Scores(sample_ids=ids, scores=np.array([0, np.nan], np.float32)), "scores: 1 of 2 values are not finite"),
        (Scores(sample_ids=-ids, scores=good), "negative id -2"),
        (Scores(sample_ids=ids * 0, scores=good), "an id occurs twice"),
    ]
    for batch, reason in cases:
        with pytest.raises(ValueError, match=reason):
            batch.check()


class Pair(Batch, frozen=True, kw_only=True, eq=False):
    aligned = ("left", "right")

    left: JaggedInt32
    right: JaggedInt32


class Odd(Batch, frozen=True, kw_only=True, eq=False):
    note: str


def test_check_holds_aligned_columns_together():
    one, other = (Jagged.from_rows([[0] * n], dtype=np.int32) for n in (1, 2))
    Pair(sample_ids=np.array([1]), left=one, right=one).check()
    with pytest.raises(ValueError, match="right: row lengths differ from those of left"):
        Pair(sample_ids=np.array([1]), left=one, right=other).check()


def test_columns_come_in_the_order_of_declaration():
    assert [column.name for column in columns_of(LogProbs)] == ["sample_ids", "log_probs"]
    assert [column.jagged for column in columns_of(LogProbs)] == [False, True]


def test_a_field_that_is_no_column_is_refused():
    with pytest.raises(TypeError, match="note is no column type"):
        columns_of(Odd)
