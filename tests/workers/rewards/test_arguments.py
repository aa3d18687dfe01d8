"""A rule gets what its signature asks for, by name: texts, ids, messages, columns, one row or a batch."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest

from workers.rewards.arguments import RuleArguments, RuleNeeds, RuleRow

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}]


def row(response: str = "2", **columns: Any) -> RuleRow:
    return RuleRow(
        prompt="1+1",
        response=response,
        reference="two",
        raw_prompt="<user>1+1",
        raw_response=f"{response}<eos>",
        prompt_ids=[4, 5],
        response_ids=[6, 1],
        columns=json.dumps(columns) if columns else "",
    )


def call(rule: Callable[..., Any], *rows: RuleRow) -> Any:
    positional, named = RuleArguments(rule).of(rows)
    return rule(*positional, **named)


def needs(rule: Callable[..., Any]) -> RuleNeeds:
    return RuleArguments(rule).needs


def test_texts_come_by_name_in_any_order():
    assert call(lambda response, prompt: (prompt, response), row()) == ("1+1", "2")
    assert call(lambda *texts: texts, row()) == ("1+1", "2", "two")


def test_special_tokens_and_ids_come_where_they_are_asked_for():
    def rule(raw_prompt: str, raw_response: str, prompt_ids: list[int], response_ids: list[int]) -> object:
        return raw_prompt, raw_response, prompt_ids, response_ids

    assert call(rule, row()) == ("<user>1+1", "2<eos>", [4, 5], [6, 1])
    assert needs(rule) == RuleNeeds(raw=True, ids=True)


def test_messages_are_the_conversation_or_the_plain_prompt_as_one():
    assert call(lambda messages: messages, row(messages=CHAT)) == CHAT
    assert call(lambda messages: messages, row()) == [{"role": "user", "content": "1+1"}]


def test_other_names_are_columns_and_a_default_stands_where_a_row_has_none():
    def rule(response: str, level: int, *, tests: tuple[str, ...] = ("none",)) -> object:
        return level, tests

    assert needs(rule) == RuleNeeds(columns=["level"], optional=["tests"])
    assert call(rule, row(level=3)) == (3, ("none",))
    assert call(rule, row(level=3, tests=["a"])) == (3, ["a"])
    with pytest.raises(LookupError, match="it asks for 'level', which the row lacks; the row has source"):
        call(rule, row(source="web"))


def test_a_rule_with_keywords_gets_all_columns():
    def rule(response: str, **columns: Any) -> object:
        return columns

    assert needs(rule).all_columns
    assert call(rule, row(level=3, source="web")) == {"level": 3, "source": "web"}


def test_a_rule_of_responses_takes_a_batch():
    def rule(prompts: list[str], responses: list[str], references: list[str], raw_responses: list[str], level: Any):
        return list(zip(prompts, responses, references, raw_responses, level, strict=True))

    assert needs(rule) == RuleNeeds(reference=True, raw=True, columns=["level"], batch=True)
    assert call(rule, row("2", level=1), row("3", level=None)) == [
        ("1+1", "2", "two", "2<eos>", 1),
        ("1+1", "3", "two", "3<eos>", None),
    ]


def test_a_rule_written_for_trl_gets_texts_or_messages_as_there():
    def rule(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], answer: Any, **columns: Any):
        return prompts, completions, completion_ids, answer, columns

    plain = call(rule, row("2", answer="7", level=1), row("3", answer="8"))
    assert plain == (["1+1", "1+1"], ["2", "3"], [[6, 1], [6, 1]], ["7", "8"], {"level": [1, None]})
    chat = call(rule, row("2", answer="7", messages=CHAT))
    assert chat == ([CHAT], [[{"role": "assistant", "content": "2"}]], [[6, 1]], ["7"], {})
    assert needs(rule) == RuleNeeds(ids=True, columns=["answer"], optional=["messages"], all_columns=True, batch=True)


def test_a_rule_written_for_verl_gets_its_names():
    def rule(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> object:
        return data_source, solution_str, ground_truth, extra_info

    assert call(rule, row(data_source="gsm8k", extra_info={"index": 3})) == ("gsm8k", "2", "two", {"index": 3})
    assert call(rule, row()) == ("", "2", "two", {})
    assert needs(rule) == RuleNeeds(reference=True, optional=["data_source", "extra_info"])

    def batch(data_sources: Any, solution_strs: Any, ground_truths: Any, extra_infos: Any) -> object:
        return data_sources, solution_strs, ground_truths, extra_infos

    assert call(batch, row("2"), row("3")) == (["", ""], ["2", "3"], ["two", "two"], [{}, {}])


class Judge:
    """A rule that is an object."""

    async def __call__(self, response: str) -> float:
        return 1.0


async def judge(response: str, scale: float) -> float:
    return scale


@pytest.mark.parametrize("rule", [Judge(), judge, functools.partial(judge, scale=2.0)])
def test_an_async_rule_is_known_in_any_form(rule: Callable[..., Any]):
    assert needs(rule).concurrent
    assert not needs(len).concurrent
