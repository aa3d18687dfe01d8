"""The demonstration's data: right answers, wrong rejected answers, and files without common prompts."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest

from asyncflow.demo.model import character_tokenizer, model_config, write_base_model
from asyncflow.demo.task import (
    LENGTH,
    LETTERS,
    MAX_TOKENS,
    MISTAKES,
    DataSizes,
    addition,
    distinct,
    preference,
    sorting,
    spoil,
    too_much,
    write_addition,
    write_sorting,
)
from workers.data.datasets import Demonstration, Problem, read_rows
from workers.training.models import load_causal

SIZES = DataSizes(sft=50, comparisons=400, train=100, heldout=40, heldout_comparisons=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task")
    write_sorting(path, 0, SIZES)
    return path


def test_the_reference_is_the_right_answer(folder: Path):
    for row in read_rows(folder / "heldout.jsonl", Problem):
        assert row.prompt.startswith("S:") and row.prompt.endswith("=") and len(row.prompt) == LENGTH + 3
        assert row.reference == "".join(sorted(row.prompt[2:-1]))
    problem = addition(random.Random(0))
    left, right = problem.prompt[2:-1].split("+")
    assert int(problem.reference) == int(left) + int(right)


def test_no_prompt_stands_in_two_places(folder: Path):
    files = {
        name: read_rows(folder / f"{name}.jsonl", Demonstration if name == "sft" else Problem)
        for name in SIZES.__struct_fields__
    }
    assert {name: len(rows) for name, rows in files.items()} == {
        name: getattr(SIZES, name) for name in SIZES.__struct_fields__
    }
    prompts = [row.prompt for row in itertools.chain(*files.values())]
    assert len(set(prompts)) == len(prompts)


def test_a_seed_gives_the_same_files(folder: Path, tmp_path: Path):
    write_sorting(tmp_path / "same", 0, SIZES)
    write_sorting(tmp_path / "other", 1, SIZES)
    for path in folder.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()


def test_chosen_is_right_and_rejected_is_wrong():
    rng = random.Random(0)
    for problem in itertools.islice(distinct(sorting, 0), 400):
        pair = preference(problem, rng)
        assert pair.chosen == problem.reference
        assert pair.rejected != pair.chosen
        assert set(pair.rejected) <= set(LETTERS)
        assert len(pair.rejected) + (not pair.rejected_truncated) <= MAX_TOKENS  # what the policy can generate


def test_rejected_answers_are_of_many_kinds():
    """The reward model must see every kind of mistake that the policy may make."""
    rng = random.Random(0)
    pairs = [preference(problem, rng) for problem in itertools.islice(distinct(sorting, 0), 2000)]
    kinds = Counter[str]()
    for pair in pairs:
        ordered = list(pair.rejected) == sorted(pair.rejected)
        kinds["in order, wrong letters"] += ordered and len(pair.rejected) == LENGTH
        kinds["right letters, wrong order"] += sorted(pair.rejected) == sorted(pair.chosen)
        kinds["short"] += len(pair.rejected) < LENGTH
        kinds["long"] += len(pair.rejected) > LENGTH
        kinds["cut off"] += pair.rejected_truncated
        kinds["one letter off"] += sum((Counter(pair.rejected) - Counter(pair.chosen)).values()) == 1
    assert all(kinds[kind] > 0.02 * len(pairs) for kind in kinds), kinds
    assert len(kinds) == 6


@pytest.mark.parametrize("mistakes", [1, 2, 6])
def test_a_spoiled_answer_is_never_the_answer(mistakes: int):
    rng = random.Random(0)
    for answer in ("aabcdefh", "aaaaaaaa", "abcdefgh"):
        for _ in range(300):
            spoiled = spoil(answer, rng, mistakes)
            assert spoiled != answer
            assert len(spoiled) >= 2


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_changes_some_answer(mistake):
    rng = random.Random(0)
    assert any(mistake("aabcdefh", rng) != "aabcdefh" for _ in range(20))


def test_a_task_that_runs_out_of_problems_says_so():
    def coin(rng: random.Random) -> Problem:
        return Problem(f"C:{rng.randrange(2)}=", "")

    with pytest.raises(ValueError, match="coin: no new problem in 10,000 tries after 2"):
        list(distinct(coin, 0))


def test_addition_files_share_no_prompt_either(tmp_path: Path):
    write_addition(tmp_path, 0, sft=300, train=100, heldout=50)
    parts = [read_rows(tmp_path / f"{name}.jsonl", Problem) for name in ("sft", "train", "heldout")]
    assert [len(part) for part in parts] == [300, 100, 50]
    assert len({row.prompt for part in parts for row in part}) == 450


def test_careless_demonstrators_tell_one_too_many_half_of_the_time(tmp_path: Path):
    write_addition(tmp_path, 0, sft=400, train=1, heldout=1)
    off = []
    for row in read_rows(tmp_path / "sft.jsonl", Demonstration):
        left, _, right = row.prompt.removeprefix("A:").removesuffix("=").partition("+")
        off.append(int(row.response) - int(left) - int(right))
    assert set(off) == {0, 1}
    assert 160 < sum(off) < 240


@pytest.mark.parametrize(("response", "cost"), [("122", 0.0), ("123", 1.0), ("99", 0.0), ("", 0.0), ("12a", 0.0)])
def test_a_sum_that_is_too_much_costs(response: str, cost: float):
    assert too_much("A:37+85=", response, "122") == cost


def test_a_token_is_a_character():
    tokenizer = character_tokenizer()
    text = "S:dbca=abcdA:37+85=122"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_the_base_model_follows_its_seed_and_holds_a_million_parameters(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_base_model(tmp_path / name, seed, model_config(layers=1, width=128))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    write_base_model(tmp_path / "full", 0)
    model = load_causal(tmp_path / "full")
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_059_456
    assert model.config.eos_token_id == 1
