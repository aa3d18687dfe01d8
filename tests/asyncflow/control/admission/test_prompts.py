"""The source of prompts: the seed and the cursor determine the order, and an id encodes the row's place in the data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from asyncflow.control.admission.prompts import DataRow, PromptSource, Share
from protocols.data.ids import EVALUATION_EPOCH, index_of, place_of, prompt_of, purpose_of
from tests import tiny

ROWS = [DataRow(f"{i}+{i}=", str(2 * i)) for i in range(7)]
Make = Callable[[int], PromptSource]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A source of seven rows, with this seed."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(str(folder))
    made: dict[int, PromptSource] = {}
    return lambda seed: made.setdefault(seed, PromptSource(ROWS, str(folder), seed))


def order(source: PromptSource, epoch: int) -> list[tuple[int, int]]:
    return [place_of(source.at(epoch * len(source) + i)) for i in range(len(source))]


def test_epochs_and_seeds_differ_in_their_order(source: Make):
    def rows(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(row for _, row in order(source(seed), epoch))

    assert len({rows(seed, epoch) for seed in range(4) for epoch in range(4)}) > 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixed")
    tiny.tokenizer().save_pretrained(str(folder))
    return str(folder)


def test_rows_may_be_several_sets_by_shares(tokenizer: str):
    mixed = PromptSource(ROWS, tokenizer, 0, [Share(2, 3.0), Share(5, 1.0)])
    drawn = [place_of(mixed.at(cursor))[1] for cursor in range(40)]
    assert sum(row < 2 for row in drawn) == 30
    assert {row for row in drawn if row >= 2} == {2, 3, 4, 5, 6}


def test_rows_that_are_left_out_are_neither_admitted_nor_evaluated(tokenizer: str):
    left = PromptSource([*ROWS, DataRow("a long prompt", "")], tokenizer, 0)
    assert left.longest == len("a long prompt")
    left.leave_out(np.flatnonzero(left.lengths > 4))
    left.leave_out(np.array([0, 3, 7]))
    assert (len(left), left.longest) == (5, 4)
    assert {place_of(left.at(cursor))[1] for cursor in range(20)} == {1, 2, 4, 5, 6}
    evaluated = left.evaluation(min_version=0, limit=3)
    assert [evaluated.references.text(i) for i in range(3)] == ["2", "4", "8"]
    with pytest.raises(ValueError, match="none of the 8 rows is left"):
        left.leave_out(np.arange(8))


def test_requests_have_a_row_a_sample_with_its_prompt_and_reference(source: Make):
    prompts = [source(0).at(0), source(0).at(1)]
    rows = source(0).requests(prompts, samples_per_prompt=3, min_version=4)
    rows.check()
    assert [prompt_of(s) for s in rows.sample_ids.tolist()] == [p for p in prompts for _ in range(3)]
    assert [index_of(s) for s in rows.sample_ids.tolist()] == [0, 1, 2, 0, 1, 2]
    assert {purpose_of(s) for s in rows.sample_ids.tolist()} == {"train"}
    assert rows.min_versions.tolist() == [4] * 6
    for row, sample in enumerate(rows.sample_ids.tolist()):
        data = ROWS[place_of(prompt_of(sample))[1]]
        assert np.array_equal(rows.prompts[row], tiny.encode(data.prompt))
        assert rows.references.text(row) == data.reference


def test_baselines_are_one_row_a_prompt_that_is_not_trained(source: Make):
    prompts = [source(0).at(i) for i in range(2)]
    rows = source(0).baselines(prompts, min_version=1)
    assert [prompt_of(s) for s in rows.sample_ids.tolist()] == prompts
    assert {purpose_of(s) for s in rows.sample_ids.tolist()} == {"baseline"}


@pytest.mark.parametrize(("limit", "count"), [(0, 7), (3, 3), (100, 7)])
def test_evaluation_takes_the_first_rows_of_the_file_in_its_order(source: Make, limit: int, count: int):
    rows = source(0).evaluation(min_version=2, limit=limit)
    assert [place_of(prompt_of(s)) for s in rows.sample_ids.tolist()] == [(EVALUATION_EPOCH, i) for i in range(count)]
    assert {purpose_of(s) for s in rows.sample_ids.tolist()} == {"evaluate"}
    assert [rows.references.text(i) for i in range(count)] == [r.reference for r in ROWS[:count]]


def test_the_longest_prompt_counts_in_tokens(source: Make):
    assert source(0).longest == len("0+0=")
