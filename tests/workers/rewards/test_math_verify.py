"""The ready rule `math_verify` compares answers as mathematics, inside a rule's process, where its time limits work."""

from __future__ import annotations

import pytest

from workers.rewards.arguments import RuleRow
from workers.rewards.sandbox_pool import SandboxPool

pytest.importorskip("math_verify")

ROWS = [  # response, reference, score
    (r"so it is \boxed{0.5}", r"\frac{1}{2}", 1.0),
    ("The answer is 1,000.", "1000", 1.0),
    (r"we get $x = 4$", "4", 1.0),
    (r"\boxed{(1, 2)}", "(1,2)", 1.0),
    ("7", "8", 0.0),
    ("", "8", 0.0),
]


def test_answers_are_equal_as_mathematics_and_a_reference_without_an_answer_fails_its_row():
    pool = SandboxPool("math_verify", timeout_seconds=60)
    rows = [RuleRow("", response, reference) for response, reference, _ in ROWS]
    answers = pool.score([*rows, RuleRow("", "8", "")])
    pool.close()
    assert [answer.score for answer in answers[:-1]] == [score for _, _, score in ROWS]
    assert answers[-1].error == "raised ValueError: the reference '' holds no answer that Math-Verify reads"
