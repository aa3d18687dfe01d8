"""What a rule returns becomes a score with parts or one sentence; what it raises says whether another attempt helps."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
import torch

from workers.rewards.answers import RuleAnswer, answer_of, refusal_of


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (True, 1.0),
        (3, 3.0),
        (0.5, 0.5),
        (np.bool_(True), 1.0),
        (np.float32(0.25), 0.25),
        (np.int64(-2), -2.0),
        (np.array(0.5), 0.5),
        (np.array([0.5]), 0.5),
        (torch.tensor(1.0), 1.0),
        (torch.tensor([True]), 1.0),
        (torch.tensor(0.5, requires_grad=True), 0.5),
    ],
)
def test_a_number_of_any_kind_is_a_score(value: object, score: float):
    assert answer_of(value) == RuleAnswer(score)


@pytest.mark.parametrize(
    ("value", "score", "parts"),
    [
        ({"score": 2, "right": True, "length": np.int64(3)}, 2.0, {"right": 1.0, "length": 3.0}),
        ({"score": 0.5, "answer": "42", "seen": None, "ids": [1, 2]}, 0.5, {}),
        ({"right": 1, "short": torch.tensor(0.5)}, 1.5, {"right": 1.0, "short": 0.5}),
    ],
)
def test_a_dictionary_has_a_score_or_its_parts_are_summed(value: object, score: float, parts: dict[str, float]):
    assert answer_of(value) == RuleAnswer(score, parts)


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (None, "returned None, want a number, or a dictionary of numbers"),
        ("1.0", "returned '1.0', want a number, or a dictionary of numbers"),
        ([1.0], "returned [1.0], want a number, or a dictionary of numbers"),
        (np.zeros(2), "returned array([0., 0.]), want a number, or a dictionary of numbers"),
        (torch.zeros(2), "returned tensor([0., 0.]), want a number, or a dictionary of numbers"),
        (1j, "returned 1j, want a number, or a dictionary of numbers"),
        (float("nan"), "returned nan, want a finite number that float32 holds"),
        (1e300, "returned 1e+300, want a finite number that float32 holds"),
        ({}, "returned an empty dictionary, want a number, or a dictionary of numbers"),
        ({"right": "yes"}, "returned right = 'yes', want a number"),
        ({"score": None, "right": 1}, "returned score = None, want a number"),
        ({"score": 1.0, "right": float("inf")}, "returned right = inf, want a finite number that float32 holds"),
        ({3: 1.0}, "returned a dictionary with the key 3, want names of one line"),
    ],
)
def test_any_other_value_is_told_and_not_tried_again(value: object, cause: str):
    assert answer_of(value) == RuleAnswer(error=cause, retry="never")


def http(status: int, **headers: str) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://judge")
    return httpx.HTTPStatusError("refused", request=request, response=httpx.Response(status, headers=headers))


def wrapped(error: BaseException) -> Exception:
    outer = RuntimeError("the judge gave no answer")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "retry", "wait"),
    [
        (http(429, **{"Retry-After": "7"}), "later", 7.0),
        (http(503, **{"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), "later", 0.0),
        (http(401), "never", 0.0),
        (httpx.ConnectError("refused"), "later", 0.0),
        (wrapped(httpx.ReadTimeout("slow")), "later", 0.0),
        (ConnectionResetError("peer"), "later", 0.0),
        (TimeoutError(), "later", 0.0),
        (FileNotFoundError("tests.json"), "now", 0.0),
        (ValueError("no JSON"), "now", 0.0),
        (NameError("name 'np' is not defined"), "never", 0.0),
        (TypeError("can only concatenate str"), "never", 0.0),
    ],
)
def test_a_busy_server_is_asked_again_later_and_a_mistake_in_the_rule_never(error: Any, retry: str, wait: float):
    answer = refusal_of(error)
    assert answer.error.startswith(f"raised {type(error).__name__}")
    assert (answer.score, answer.retry, answer.wait_seconds) == (None, retry, wait)
