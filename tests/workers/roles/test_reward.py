"""A row that can't be scored fails with its cause instead of scoring 0, and the other rows keep their scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from protocols.data.columns import empty
from protocols.data.jagged import Jagged
from protocols.data.messages import Rollouts
from tests import tiny
from workers.roles.reward import RewardWorker
from workers.settings import Failures, Model
from workers.training.models import load_reward

RULE = '''
import os, time
from pathlib import Path

def obey(prompt, response, reference):
    """Does what the response says, and notes that it was asked."""
    with open(reference, "a") as asked:
        asked.write(response + "\\n")
    match response:
        case "raise": raise ValueError("no")
        case "none": return None
        case "exit": os._exit(3)
        case "hang": time.sleep(600)
        case "once":  # fails in its first attempt only
            return 1.0 / (Path(reference).read_text().split().count("once") - 1)
    return len(response)
'''


def rollouts(rows: list[tuple[str, str]], reference: str = "", end: bool = False) -> Rollouts:
    """Rows of (prompt, response) from id 50; `end` appends the end-of-sequence token."""
    responses = Jagged.from_rows([[*tiny.encode(r), *([tiny.EOS_ID] if end else [])] for _, r in rows], np.int32)
    tokens = len(responses.values)
    return Rollouts(
        sample_ids=np.arange(50, 50 + len(rows), dtype=np.int64),
        prompts=Jagged.from_rows([tiny.encode(p) for p, _ in rows], np.int32),
        references=Jagged.from_texts([reference] * len(rows)),
        responses=responses,
        log_probs=responses.with_values(np.zeros(tokens, np.float32)),
        versions=responses.with_values(np.zeros(tokens, np.int32)),
        loss_mask=responses.with_values(np.ones(tokens, np.uint8)),
        finishes=np.zeros(len(rows), np.uint8),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_reward(tmp_path_factory.mktemp("reward"))


@pytest.fixture
def user_rule(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardWorker]:
    (tmp_path / "rule_of_a_user.py").write_text(RULE)
    monkeypatch.syspath_prepend(tmp_path)
    failures = Failures(reward_timeout_seconds=0.5, reward_retries=2)
    reward = RewardWorker(Model(rule="rule_of_a_user:obey"), 8192, str(folder), failures)
    yield reward
    reward.close()


# --- rules


@pytest.mark.parametrize(("rule", "scores"), [("exact_match", [1, 0, 0]), ("prefix_match", [1, 1 / 2, 2 / 3])])
def test_a_rule_reads_texts_without_special_tokens(folder: Path, rule: str, scores: list[float]):
    reward = RewardWorker(Model(rule=rule), 8192, str(folder), Failures())
    result = reward.score(rollouts([("6*7=", "42"), ("6*7=", "4"), ("6*7=", "421")], reference="42", end=True))
    reward.close()
    assert result.failures == []
    assert result.batch.sample_ids.tolist() == [50, 51, 52]
    result.batch.check()
    np.testing.assert_allclose(result.batch.scores, scores, rtol=1e-6)


def test_each_bad_row_fails_for_its_own_cause_after_its_retries_and_the_others_are_scored(
    user_rule: RewardWorker, tmp_path: Path
):
    asked = tmp_path / "asked"
    rows = ["fine", "raise", "none", "exit", "ok", "hang", "once", "well"]
    result = user_rule.score(rollouts([("do", row) for row in rows], reference=str(asked)))
    result.batch.check()
    scores = dict(zip(result.batch.sample_ids.tolist(), result.batch.scores.tolist(), strict=True))
    assert scores == {50: 4, 54: 2, 56: 1, 57: 4}
    causes = {failure.sample_id: failure.cause for failure in result.failures}
    assert causes == {
        51: "rule rule_of_a_user:obey raised ValueError: no",
        52: "rule rule_of_a_user:obey returned None, want a number, or a dictionary of numbers",
        53: "rule rule_of_a_user:obey ended its process, exit code 3",
        55: "rule rule_of_a_user:obey gave no answer within 0.5 s",
    }
    attempts = asked.read_text().split()
    assert {row: attempts.count(row) for row in rows} == {
        "fine": 1, "ok": 1, "well": 1, "once": 2, "raise": 3, "none": 1, "exit": 3, "hang": 3
    }  # fmt: skip


def test_a_batch_of_failures_only_has_no_scores(user_rule: RewardWorker, tmp_path: Path):
    result = user_rule.score(rollouts([("do", "raise"), ("do", "none")], reference=str(tmp_path / "asked")))
    assert len(result.batch) == 0
    assert [failure.sample_id for failure in result.failures] == [50, 51]


# --- reward models


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_a_reward_model_scores_what_transformers_scores(folder: Path, budget: int):
    rows = [("6*7=", "42"), ("what is this?", "a question"), ("a", "b")]
    batch = rollouts(rows, end=True)
    result = RewardWorker(Model(path=str(folder)), budget).score(batch)
    assert result.failures == []
    result.batch.check()
    model = load_reward(folder)
    for row, score in enumerate(result.batch.scores):
        tokens = np.concatenate([batch.prompts[row], batch.responses[row]])[None].astype(np.int64)
        assert score == pytest.approx(model(input_ids=torch.from_numpy(tokens)).logits.item(), abs=1e-5)


def test_a_score_that_is_not_a_number_fails_its_row_only(folder: Path, tmp_path: Path):
    model = load_reward(folder)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[tiny.VOCABULARY["z"]] = torch.nan
    model.save_pretrained(tmp_path)
    rows = [("6*7=", "42"), ("6*7=", "4z"), ("a", "b")]
    whole = RewardWorker(Model(path=str(folder)), 10_000).score(rollouts(rows)).batch.scores
    result = RewardWorker(Model(path=str(tmp_path)), 10_000).score(rollouts(rows))
    assert [(failure.sample_id, failure.cause) for failure in result.failures] == [(51, "reward model gave nan")]
    assert result.batch.sample_ids.tolist() == [50, 52]
    np.testing.assert_allclose(result.batch.scores, whole[[0, 2]], atol=1e-6)


def test_no_rows_are_no_scores(folder: Path):
    result = RewardWorker(Model(path=str(folder)), 10_000).score(empty(Rollouts))
    assert (len(result.batch), result.failures) == (0, [])
