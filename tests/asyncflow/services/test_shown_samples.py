"""A few samples of a closed batch as text: which ones, with which facts, and how long."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from asyncflow.observe.settings import SampleTable
from asyncflow.services.shown_samples import SampleShow, chosen, shortened
from protocols.control.samples import ShownSample
from protocols.data.columns import take
from protocols.data.jagged import Jagged
from protocols.data.messages import Costs, Finish, Rollouts, Scores
from tests import tiny
from workers.advantages.experience import experience_of

RESPONSES = ["12<eos>", "9<eos>", "777"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer alone: no model is read."""
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(str(path))
    return path


def rollouts() -> Rollouts:
    """Three samples of three prompts; the last was cut, and its tokens come from versions 3 to 5."""
    encoded = [tiny.encode(text.removesuffix("<eos>")).tolist() for text in RESPONSES]
    ended = [ids + [tiny.EOS_ID] * text.endswith("<eos>") for ids, text in zip(encoded, RESPONSES, strict=True)]
    responses = Jagged.from_rows(ended, np.int32)
    return Rollouts(
        sample_ids=np.array([10, 20, 30]),
        prompts=Jagged.from_rows([tiny.encode(text) for text in ("5+7=", "4+5=", "1+1=")], np.int32),
        references=Jagged.from_texts(["12", "8", ""]),
        responses=responses,
        log_probs=responses.with_values(np.zeros(8, np.float32)),
        versions=responses.with_values(np.array([4, 4, 4, 4, 4, 3, 4, 5], np.int32)),
        loss_mask=responses.with_values(np.array([1, 1, 1, 1, 0, 1, 1, 1], np.uint8)),
        finishes=np.array([Finish.STOP, Finish.STOP, Finish.LENGTH], np.uint8),
    )


def shown(folder: Path, **settings: int) -> list[ShownSample]:
    advantages = np.array([1.0, 1.0, 1.0, 2.0, 9.0, -3.0, -3.0, -6.0])
    scores = Scores(
        sample_ids=np.array([10, 20, 30]),
        scores=np.array([1.0, 0.5, -1.0], np.float32),
        parts=Jagged.from_rows([[1.0, 0.0], [0.5, 0.0], []], np.float32),
        names=Jagged.from_texts(["right\nshort", "right\nshort", ""]),
    )
    baseline = msgspec.structs.replace(scores, scores=np.zeros(3, np.float32))
    experience = take(experience_of(rollouts(), advantages), [2, 0, 1])  # an algorithm may order its rows anew
    show = SampleShow(SampleTable(**settings), str(folder))
    return show.of([scores, baseline, rollouts()], experience)


def test_samples_come_from_the_lowest_reward_to_the_highest_with_all_that_is_known_of_them(folder: Path):
    worst, middle, best = shown(folder)
    assert worst == ShownSample(
        sample=30,
        prompt="1+1=",
        response="777",
        reference="",
        reward=-1.0,
        advantage=-4.0,
        versions=(3, 5),
        tokens=3,
        cut=True,
    )
    assert (middle.sample, middle.advantage, middle.parts) == (20, 2.0, {"right": 0.5, "short": 0.0})
    assert (best.response, best.reference, best.cut, best.versions) == ("12<eos>", "12", False, (4, 4))


def test_a_cost_is_shown_where_the_algorithm_has_one(folder: Path):
    scores = Scores(sample_ids=np.array([10, 20, 30]), scores=np.zeros(3, np.float32))
    costs = Costs(sample_ids=np.array([10, 20, 30]), costs=np.array([0.5, -0.5, 2.0], np.float32))
    experience = experience_of(rollouts(), np.zeros(8))
    table = SampleShow(SampleTable(), str(folder)).of([rollouts(), scores, costs], experience)
    assert [row.cost for row in table] == [0.5, -0.5, 2.0]


def test_fewer_rows_keep_the_worst_and_the_best(folder: Path):
    assert [row.sample for row in shown(folder, rows=2)] == [30, 10]
    ids, rewards = np.arange(100), np.arange(100.0)[::-1]
    assert chosen(ids, rewards, 5).tolist() == [99, 74, 49, 25, 0]
    assert chosen(ids, rewards, 200).tolist() == ids[::-1].tolist()


def test_a_long_text_keeps_its_beginning_and_its_end():
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 4) == "ab[... 7 characters ...]jk"


def test_the_first_step_and_every_kth_have_a_table():
    assert [step for step in range(1, 31) if SampleTable(every=10).due(step)] == [1, 10, 20, 30]
    assert not any(SampleTable(every=0).due(step) for step in range(1, 31))
    assert not SampleShow(SampleTable(), "").due(1), "a service without a tokenizer"
