"""The prompts of a recipe: read from one data set or a mix of several, and told apart from rows that are too long."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from asyncflow.recipe.checks import check
from asyncflow.recipe.config import BadInput, load_recipe, recipe_text
from asyncflow.run import run_folder
from protocols.data.ids import place_of
from tests import tiny, tiny_tokenizers
from tests.asyncflow.conftest import MakeRecipe

Write = Callable[..., str]


@pytest.fixture
def refused(make_recipe: MakeRecipe) -> Any:
    """The message that refuses a recipe with these changes."""

    def of(**changes: Any) -> str:
        with pytest.raises(BadInput) as error:
            check(make_recipe(**changes))
        assert "\n" not in str(error.value)
        return str(error.value)

    return of


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows to a file of this name."""

    def rows(name: str, *rows: dict[str, Any]) -> str:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    return rows


@pytest.mark.parametrize("field", ["train", "eval"])
def test_a_data_row_without_its_fields_names_file_and_line(refused: Any, tmp_path: Path, field: str):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1=", "reference": "2"}\n{"question": "2+2="}\n')
    assert refused(data={field: str(file)}).startswith(f"data: {file}:2: no field 'prompt'; the row has 'question'")


def test_a_data_file_that_is_not_there(refused: Any, tmp_path: Path):
    assert refused(data={"train": str(tmp_path / "none")}).startswith(f"data: {tmp_path / 'none'}: can't be read")


def test_a_data_file_without_rows(refused: Any, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert refused(data={"train": str(tmp_path / "empty.jsonl")}).endswith("holds no row")


def test_references_are_needed_where_something_compares_with_them(
    refused: Any, make_recipe: MakeRecipe, tmp_path: Path
):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1="}\n')
    bare = {"train": str(file), "eval": ""}
    check(make_recipe(data=bare))
    message = refused(data=bare, models={"reward": {"rule": "exact_match"}})
    assert message.startswith(f"data: {file}:1: no field 'reference'")


def test_fields_may_have_other_names(make_recipe: MakeRecipe, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "1+1=", "answer": "2"}\n')
    names = {"train": str(file), "eval": str(file), "prompt": "question", "reference": "answer"}
    source = check(make_recipe(data=names)).train
    assert source.requests([source.at(0)], 1, 0).references.text(0) == "2"


def test_an_empty_prompt_names_its_row(refused: Any, tmp_path: Path):
    """An engine would refuse it much later, and its prompt would be refilled forever."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1=", "reference": "2"}\n{"prompt": "", "reference": "2"}\n')
    assert refused(data={"train": str(file)}) == f"data: {file}:2: its prompt is empty"


def models_with(tokenizer: Tokenizer, folder: Path, vocabulary: int, **config: str) -> dict[str, Any]:
    """The models of a recipe, with this tokenizer in their folders."""
    policy = tiny.make_policy(folder / "policy", vocabulary=vocabulary)
    reward = tiny.make_reward(folder / "reward", vocabulary=vocabulary)
    for path in (policy, reward):
        tiny_tokenizers.save(tokenizer, path, **config)
    paths = {"policy": policy, "critic": reward, "reference": policy, "reward": reward}
    return {role: {"path": str(path), "learning_rate": 1e-3} for role, path in paths.items()}


def test_a_token_that_the_policy_has_no_row_for_names_its_place(refused: Any, write: Write, tmp_path: Path):
    """It would fail in every engine, and its prompt would be refilled until the run ends."""
    rows = len(tiny.VOCABULARY)
    models = models_with(tiny_tokenizers.characters("<|x9|>"), tmp_path, rows)
    sets = [write("fine.jsonl", {"prompt": "1+1="}), write("beyond.jsonl", {"prompt": "1"}, {"prompt": "1<|x9|>"})]
    message = refused(models=models, data={"train": [{"path": path} for path in sets], "eval": ""})
    said = f"the token '<|x9|>' has id {rows}, and the model of {tmp_path / 'policy'} has {rows} rows of vocabulary"
    assert message.startswith(f"data: {sets[1]}:2: {said}")


def test_a_text_begins_with_bos_and_a_conversation_is_written_as_the_recipe_says(
    make_recipe: MakeRecipe, write: Write, tmp_path: Path
):
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}.{% endfor %}{{ end }}"
    config = {"bos_token": tiny_tokenizers.BOS, "chat_template": template}
    models = models_with(tiny_tokenizers.with_bos(), tmp_path, tiny_tokenizers.BOS_ID + 1, **config)
    rows = write("rows.jsonl", {"prompt": "1+1=", "reference": "2"})
    prompts: list[list[int]] = []
    for chat in ({}, {"system": "brief", "from_text": True, "arguments": {"end": "a:"}}):
        source = check(make_recipe(models=models, data={"train": rows, "eval": "", "chat": chat})).train
        prompts.append(source.requests([source.at(0)], 1, 0).prompts[0].tolist())
    text, conversation = "1+1=", "s:brief.u:1+1=.a:"
    assert prompts == [[tiny_tokenizers.BOS_ID, *tiny.encode(text)], tiny.encode(conversation).tolist()]


def test_a_missing_field_is_told_with_the_recipes_keys(refused: Any, write: Write):
    path = write("x.jsonl", {"q": {"text": "1+1="}, "a": "2"})
    message = refused(data={"train": path})
    assert message == (
        f"data: {path}:1: no field 'prompt'; the row has 'q.text', 'a'; want prompt, messages or conversations and "
        "reference, or the names that the file has for them: data.prompt and data.reference say which (a.b: b inside "
        "of a)"
    )


# --- the shapes of the Hub

SUMS = [("80+39=", "119"), ("93+32=", "125"), ("19+58=", "77")]


def nested(tmp_path: Path) -> dict[str, Any]:
    """verl's parquet."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"content": prompt, "role": "user"}],
            "reward_model": {"ground_truth": answer, "style": "rule"},
        }
        for prompt, answer in SUMS
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    return {"train": str(tmp_path / "x.parquet"), "reference": "reward_model.ground_truth"}


def lines(of: Callable[[str, str], dict[str, Any]], before: str = "") -> Callable[[Path], dict[str, Any]]:
    def write(tmp_path: Path) -> dict[str, Any]:
        text = before + "".join(json.dumps(of(*row)) + "\n" for row in SUMS)
        (tmp_path / "x.jsonl").write_text(text)
        return {"train": str(tmp_path / "x.jsonl")}

    return write


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


CHATS = {
    "nested": nested,
    "parts": lines(lambda p, r: {"messages": user([{"type": "text", "text": p}]), "reference": r}),
    "sharegpt": lines(lambda p, r: {"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": r}]}),
}
TEXTS = {
    "numbers": lines(lambda p, r: {"prompt": p, "reference": int(r)}),
    "nan": lines(lambda p, r: {"prompt": p, "reference": r, "difficulty": float("nan")}),
    "byte-order mark": lines(lambda p, r: {"prompt": p, "reference": r}, "\ufeff"),
}


@pytest.mark.parametrize("shape", [*CHATS, *TEXTS])
def test_the_shapes_of_the_hub_are_read(make_recipe: MakeRecipe, models: Path, tmp_path: Path, shape: str):
    shutil.copytree(models / "policy", policy := tmp_path / "policy")
    (policy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}?")
    model = {"path": str(policy), "learning_rate": 1e-3}
    data = {"eval": "", **(CHATS | TEXTS)[shape](tmp_path)}
    rules = {"policy": model, "critic": model, "reward": {"rule": "exact_match"}}
    train = check(make_recipe(data=data, models=rules)).train
    rows = train.requests([train.at(cursor) for cursor in range(3)], 1, 0)
    read = {(rows.prompts[i].tobytes(), rows.references.text(i)) for i in range(3)}
    end = "?" if shape in CHATS else ""
    assert read == {(tiny.encode(prompt + end).tobytes(), answer) for prompt, answer in SUMS}


# --- overlong rows

LONG = [{"prompt": "1" * length, "reference": "1"} for length in (4, 30, 4, 40, 50, 60, 5)]
ROOM = {"generation": {"max_tokens": 6, "max_model_tokens": 20}}
FOUND = "4 of 7 rows: {0}:2 has 30 tokens, {0}:4 has 40 tokens, {0}:5 has 50 tokens and 1 more"
WHY = "a context of 20 tokens has room for prompts of 14 beside generation.max_tokens = 6"


@pytest.mark.parametrize("key", ["train", "eval"])
def test_rows_that_are_too_long_are_all_reported(refused: Any, write: Write, key: str):
    path = write("x.jsonl", *LONG)
    assert refused(data={key: path}, **ROOM) == (
        f"data.{key}: {FOUND.format(path)}: {WHY}; want shorter prompts, data.overlong = 'skip', which leaves these "
        "rows out, or generation.max_model_tokens = 66"
    )


def test_the_policys_context_bounds_a_prompt(refused: Any, make_recipe: MakeRecipe):
    check(make_recipe(generation={"max_model_tokens": 4 + 6}))
    assert "a context of 9 tokens has room for prompts of 3 " in refused(generation={"max_model_tokens": 9})
    message = refused(generation={"max_tokens": 1021})
    assert "30 of 30 rows: " in message
    assert message.endswith(
        "want shorter prompts, data.overlong = 'skip', which leaves these rows out, or "
        "generation.max_tokens = 1020 or less"
    )


def test_a_recipe_may_leave_them_out(make_recipe: MakeRecipe, write: Write):
    path = write("x.jsonl", *LONG)
    skip = {"train": path, "eval": path, "overlong": "skip"}
    checked = check(make_recipe(data=skip, **ROOM))
    assert {place_of(checked.train.at(cursor))[1] for cursor in range(30)} == {0, 2, 6}
    ((_, heldout),) = checked.heldout
    assert len(heldout.evaluation(0, 0)) == 3
    assert checked.notes == [f"data.{key}: left out {FOUND.format(path)}: {WHY}" for key in ("train", "eval")]


def test_a_set_of_which_nothing_is_left_is_refused(refused: Any, write: Write):
    path = write("x.jsonl", *LONG[3:6])
    message = refused(data={"train": path, "overlong": "skip"}, **ROOM)
    assert message.startswith(f"data.train: {path}: all of its rows are too long, 3 of 3 rows: {path}:1 has 40 tokens")


def test_rows_of_pretraining_text_that_are_left_out_are_reported_too(
    refused: Any, make_recipe: MakeRecipe, write: Write
):
    path = write("x.jsonl", {"text": "1"}, {"prompt": "1" * 1000, "response": "1" * 100})
    changes = {"data": {"pretrain": path}, "loss": {"ptx_coefficient": 0.1}}
    assert refused(**changes).startswith(f"data.pretrain: 1 of 2 rows: {path}:2 has 1101 tokens")
    changes["data"]["overlong"] = "skip"
    (note,) = check(make_recipe(**changes)).notes
    assert note.startswith(f"data.pretrain: left out 1 of 2 rows: {path}:2 has 1101 tokens: the model's context is 10")


def test_a_resume_with_another_room_for_prompts_would_mean_other_samples(make_recipe: MakeRecipe, write: Write):
    data = {"train": write("x.jsonl", *LONG), "overlong": "skip"}
    one, other = (make_recipe(data=data, generation={"max_tokens": n, "max_model_tokens": 40}) for n in (6, 8))
    assert run_folder.digest_of(one) != run_folder.digest_of(other)


# --- several sets


def test_sets_are_mixed_by_weight_and_the_mix_is_reported(make_recipe: MakeRecipe, write: Write, tmp_path: Path):
    sums = write("sums.jsonl", *({"prompt": f"{i}+1=", "reference": str(i + 1)} for i in range(5)))
    words = write("words.jsonl", *({"question": f"what is {i}?", "answer": {"text": str(i)}} for i in range(3)))
    mixed = {"path": words, "weight": 1, "prompt": "question", "reference": "answer.text"}
    recipe = make_recipe(data={"train": [{"path": sums, "weight": 3}, mixed]})
    checked = check(recipe)
    assert checked.notes == [
        f"data.train: {sums}: 5 rows, 75.0% of the prompts",
        f"data.train: {words}: 3 rows, 25.0% of the prompts",
    ]
    drawn = [place_of(checked.train.at(cursor))[1] for cursor in range(40)]
    assert Counter(row < 5 for row in drawn) == {True: 30, False: 10}
    first = next(cursor for cursor in range(4) if drawn[cursor] >= 5)
    rows = checked.train.requests([checked.train.at(first)], 1, 0)
    assert rows.references.text(0) == str(drawn[first] - 5)
    assert rows.prompts[0].tolist() == tiny.encode(f"what is {drawn[first] - 5}?").tolist()
    (tmp_path / "resolved.toml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "resolved.toml") == recipe


def test_another_mix_would_mean_other_samples(make_recipe: MakeRecipe, write: Write):
    one, other = (write(f"{name}.jsonl", {"prompt": name, "reference": ""}) for name in "ab")
    digests = [
        run_folder.digest_of(make_recipe(data={"train": train}))
        for train in (
            one,
            [{"path": one}, {"path": other}],
            [{"path": one}, {"path": other, "weight": 2}],
            [{"path": other}, {"path": one}],
            [{"path": one}, {"path": other, "prompt": "reference"}],
        )
    ]
    assert len(set(digests)) == len(digests)


def test_overlong_rows_are_left_out_of_their_own_set(make_recipe: MakeRecipe, write: Write):
    short, long = write("short.jsonl", *LONG[:1]), write("long.jsonl", *LONG[1:4])
    data = {"train": [{"path": short}, {"path": long}], "overlong": "skip"}
    checked = check(make_recipe(data=data, **ROOM))
    assert checked.notes[2:] == [
        f"data.train: left out 2 of 3 rows: {long}:1 has 30 tokens, {long}:3 has 40 tokens: {WHY}"
    ]
    assert [place_of(checked.train.at(cursor))[1] for cursor in range(4)] == [0, 2, 0, 2]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "data.train = []: want the path of a data set, or a list of at least one"),
        ([{"path": "x", "weight": 0}], "recipe: data.train.0.weight = 0: want more than 0, and finite"),
        ([{"path": "x", "wieght": 1}], "recipe: unknown key data.train.0.wieght, did you mean 'weight'?"),
        ([{"weight": 1}], "recipe: Object missing required field `path` - at `$.data.train[0]`"),
    ],
)
def test_a_mix_that_is_none(refused: Any, train: list[dict[str, Any]], message: str):
    assert refused(data={"train": train}) == message
