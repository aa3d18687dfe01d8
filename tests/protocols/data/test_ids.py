"""Ids: a sample id encodes its prompt and index, and fits an int64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.data import ids

epochs = st.integers(0, ids.EVALUATION_EPOCH)
ordinals = st.integers(0, 2**32 - 1)
indices = st.integers(0, ids.BASELINE_INDEX)


@given(epochs, ordinals, indices)
def test_a_sample_id_gives_back_its_parts(epoch: int, ordinal: int, index: int):
    prompt = ids.prompt_id(epoch, ordinal)
    sample = ids.sample_id(prompt, index)
    assert ids.place_of(prompt) == (epoch, ordinal)
    assert ids.prompt_of(sample) == prompt
    assert ids.index_of(sample) == index
    assert ids.prompts_of(np.array([sample])).tolist() == [prompt]


def test_the_highest_id_fits_63_bits():
    assert ids.sample_id(ids.prompt_id(ids.EVALUATION_EPOCH, 2**32 - 1), ids.BASELINE_INDEX) == 2**63 - 1


@given(epochs, ordinals, indices)
def test_a_row_has_one_purpose(epoch: int, ordinal: int, index: int):
    purpose = ids.purpose_of(ids.sample_id(ids.prompt_id(epoch, ordinal), index))
    if epoch == ids.EVALUATION_EPOCH:
        assert purpose == "evaluate"
    else:
        assert purpose == ("baseline" if index == ids.BASELINE_INDEX else "train")


@pytest.mark.parametrize(("epoch", "ordinal"), [(-1, 0), (2**15, 0), (0, -1), (0, 2**32)])
def test_a_prompt_that_does_not_fit_is_refused(epoch: int, ordinal: int):
    with pytest.raises(ValueError, match=f"epoch {epoch}, ordinal {ordinal}"):
        ids.prompt_id(epoch, ordinal)


@pytest.mark.parametrize("index", [-1, 2**16])
def test_an_index_that_does_not_fit_is_refused(index: int):
    with pytest.raises(ValueError, match=f"sample index {index}"):
        ids.sample_id(0, index)


def test_seeds_are_reproducible_across_processes_and_differ_in_every_argument():
    seeds = [ids.sampling_seed(*arguments) for arguments in [(1, 2), (2, 2), (1, 3), (1, 2, 1), (1, 2, 0, 1)]]
    assert seeds[0] == 8166664911730324346
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
