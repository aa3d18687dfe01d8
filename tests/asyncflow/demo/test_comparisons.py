"""Simulated labellers prefer the answer nearer to the right one, and never compare equal answers."""

from __future__ import annotations

from pathlib import Path

from asyncflow.demo.comparisons import PolicyAnswer, write_comparisons
from asyncflow.demo.model import model_config, write_base_model
from asyncflow.demo.task import DataSizes, write_sorting
from workers.data.datasets import Preference, Problem, read_rows

SIZES = DataSizes(sft=1, comparisons=120, heldout_comparisons=1, train=1, heldout=1)


def test_quality_counts_letters_in_place_and_takes_off_what_is_wrong_with_the_length():
    assert PolicyAnswer("abcd", False).quality("abcd") == 4
    assert PolicyAnswer("abdc", False).quality("abcd") == 2
    assert PolicyAnswer("abc", False).quality("abcd") == 2
    assert PolicyAnswer("abcdd", True).quality("abcd") == 2


def test_every_pair_prefers_the_better_answer_to_its_own_prompt(tmp_path: Path):
    write_sorting(tmp_path, 0, SIZES)
    write_base_model(tmp_path / "policy", 0, model_config(layers=1))
    write_comparisons(tmp_path / "policy", tmp_path, "comparisons", seed=0)
    references = {p.prompt: p.reference for p in read_rows(tmp_path / "comparisons.jsonl", Problem)}
    pairs = read_rows(tmp_path / "comparisons_pairs.jsonl", Preference)
    assert 80 < len(pairs) <= SIZES.comparisons, "only pairs of equals are left out"
    graded = 0
    for pair in pairs:
        right = references[pair.prompt]
        better, worse = (
            PolicyAnswer(pair.chosen, pair.chosen_truncated),
            PolicyAnswer(pair.rejected, pair.rejected_truncated),
        )
        if pair.chosen == right:
            assert pair.rejected != right or pair.rejected_truncated
        else:
            graded += 1
            assert better.quality(right) > worse.quality(right)
    assert graded > 5, "some pairs compare two wrong answers"


def test_a_seed_gives_the_same_pairs(tmp_path: Path):
    write_sorting(tmp_path, 0, SIZES)
    write_base_model(tmp_path / "policy", 0, model_config(layers=1))
    files = []
    for _ in range(2):
        write_comparisons(tmp_path / "policy", tmp_path, "comparisons", seed=3)
        files.append((tmp_path / "comparisons_pairs.jsonl").read_bytes())
    assert files[0] == files[1]
