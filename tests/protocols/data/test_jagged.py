"""A jagged column keeps rows of different length intact, read-only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.data.jagged import Jagged
from tests.protocols.strategies import jagged


def rows_in(column: Jagged) -> list[list[float]]:
    return [row.tolist() for row in column]


def test_jagged_keeps_rows_of_different_length():
    column = Jagged.from_rows([[1, 2], [], [3]], dtype=np.int32)
    assert rows_in(column) == [[1, 2], [], [3]]
    assert column.offsets.tolist() == [0, 2, 2, 3]
    assert column.lengths.tolist() == [2, 0, 1]
    assert column[-1].tolist() == [3]


def test_a_column_of_no_rows_still_has_a_type():
    assert Jagged.from_rows([]).dtype == np.float32
    assert Jagged.from_rows([], dtype=np.int32).dtype == np.int32


@given(st.lists(st.text(max_size=5), max_size=4))
def test_texts_come_back(texts: list[str]):
    column = Jagged.from_texts(texts)
    assert [column.text(row) for row in range(len(column))] == texts


def test_columns_are_read_only():
    column = Jagged.from_rows([[1.0]])
    with pytest.raises(ValueError, match="read-only"):
        column[0][0] = 2
    with pytest.raises(ValueError, match="read-only"):
        column.offsets[0] = 1


@pytest.mark.parametrize(
    "offsets", [[0, 2, 1, 3], [1, 3], [0, 2], [0, 4]], ids=["falling", "late start", "short", "long"]
)
def test_offsets_that_do_not_cut_the_values_are_refused(offsets: list[int]):
    with pytest.raises(ValueError, match="offsets must rise from 0 to 3"):
        Jagged(np.zeros(3), np.array(offsets))


def test_offsets_and_values_have_one_form():
    for values, offsets in [(np.zeros((1, 1)), np.array([0, 1])), (np.zeros(1), np.array([0, 1], np.int32))]:
        with pytest.raises(ValueError, match="flat values and int64 offsets"):
            Jagged(values, offsets)
    with pytest.raises(ValueError, match="flat values and int64 offsets"):
        Jagged(np.zeros(0), np.zeros(0, np.int64))


@given(jagged(), st.data())
def test_take_is_indexing(column: Jagged, data: st.DataObject):
    n = len(column)
    index = data.draw(st.lists(st.integers(-n, n - 1), max_size=8)) if n else []
    assert rows_in(column.take(index)) == [column[i].tolist() for i in index]


def test_taking_a_range_shares_memory():
    column = Jagged.from_rows([[1, 2], [3], [4, 5]])
    assert np.shares_memory(column.take([1, 2]).values, column.values)
    assert not np.shares_memory(column.take([2, 1]).values, column.values)


def test_a_row_that_is_not_there_is_an_error():
    column = Jagged.from_rows([[1]])
    with pytest.raises(IndexError):
        column.take([1])
    with pytest.raises(IndexError, match="row 1 of a jagged column of 1 rows"):
        column[1]


@given(jagged(), jagged())
def test_concat_is_all_rows_in_order(a: Jagged, b: Jagged):
    assert rows_in(Jagged.concat([a, b])) == rows_in(a) + rows_in(b)


def test_equality_is_of_type_rows_and_values():
    column = Jagged.from_rows([[1, 2], [3]], dtype=np.int32)
    assert column == Jagged.from_rows([[1, 2], [3]], dtype=np.int32)
    assert column != Jagged.from_rows([[1], [2, 3]], dtype=np.int32)
    assert column != Jagged.from_rows([[1, 2], [4]], dtype=np.int32)
    assert column != Jagged.from_rows([[1, 2], [3]], dtype=np.int64)
    assert column.with_values(np.array([5, 6, 7])) == Jagged.from_rows([[5, 6], [7]])
