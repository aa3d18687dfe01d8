"""A mixed reward: the weighted sum, each part as a metric, and rows that a part could not score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from asyncflow.services.stages import breakdown
from protocols.data import codec
from protocols.data.columns import concat, take
from protocols.data.jagged import Jagged
from protocols.data.messages import Scores
from tests import tiny
from tests.workers.roles.test_reward import rollouts
from workers.roles.reward import RewardWorker
from workers.settings import Failures, Model, RewardPart

ROWS = rollouts([("6*7=", "42"), ("6*7=", "4"), ("6*7=", "421")], reference="42", end=True)
RIGHT = RewardPart("right", rule="exact_match", weight=2.0)
BEGUN = RewardPart("begun", rule="prefix_match", weight=-0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_reward(tmp_path_factory.mktemp("reward")))


@pytest.fixture
def mixed(folder: str) -> Iterator[RewardWorker]:
    parts = [RIGHT, BEGUN, RewardPart("liked", path=folder, weight=0.25)]
    reward = RewardWorker(Model(mix=parts), 8192, folder, Failures())
    yield reward
    reward.close()


def alone(folder: str, part: RewardPart) -> np.ndarray:
    """The scores of a single part."""
    if part.path:
        return RewardWorker(Model(path=part.path), 8192).score(ROWS).batch.scores
    reward = RewardWorker(Model(rule=part.rule), 8192, folder, Failures())
    scores = reward.score(ROWS).batch.scores
    reward.close()
    return scores


def test_a_score_is_the_weighted_sum_and_its_parts_stand_beside_it(mixed: RewardWorker, folder: str):
    result = mixed.score(ROWS)
    result.batch.check()
    assert result.failures == []
    parts = np.stack([alone(folder, RIGHT), alone(folder, BEGUN), alone(folder, RewardPart("x", folder))], axis=1)
    np.testing.assert_array_equal(np.stack(list(result.batch.parts)), parts)
    np.testing.assert_allclose(result.batch.scores, parts @ [2.0, -0.5, 0.25], rtol=1e-6)


def test_a_row_that_one_part_fails_is_failed_by_its_name_and_the_others_are_scored(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a_part.py").write_text(
        "def picky(prompt, response, reference):\n    if response == '4': raise ValueError('no')\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = RewardWorker(Model(mix=[RIGHT, RewardPart("picky", rule="a_part:picky")]), 8192, folder, Failures())
    result = reward.score(ROWS)
    reward.close()
    (failure,) = result.failures
    assert failure.sample_id == ROWS.sample_ids[1]
    assert failure.cause.startswith("picky: rule a_part:picky raised ValueError: no")
    assert result.batch.sample_ids.tolist() == ROWS.sample_ids[[0, 2]].tolist()
    assert [row.tolist() for row in result.batch.parts] == [[1.0, 1.0], [0.0, 1.0]]
    assert result.batch.scores.tolist() == [3.0, 1.0]


# --- the parts in the pipeline


def scores(parts: Sequence[Sequence[float]]) -> Scores:
    ids = np.arange(len(parts), dtype=np.int64)
    return Scores(sample_ids=ids, scores=ids.astype(np.float32), parts=Jagged.from_rows(parts, np.float32))


def test_scores_without_parts_have_empty_rows_on_every_way():
    plain = Scores(sample_ids=np.array([4, 5]), scores=np.ones(2, np.float32))
    plain.check()
    assert plain.parts.lengths.tolist() == [0, 0]
    assert codec.decode(codec.encode(plain)) == plain == concat([take(plain, [0]), take(plain, [1])])


def test_the_breakdown_is_each_parts_mean_by_name():
    assert breakdown([scores([[1, 4], [0, 8]])], ["right", "liked"]) == {"reward.right": 0.5, "reward.liked": 6.0}


def test_of_two_scores_the_samples_own_come_first():
    samples, baselines = scores([[1.0], [0.0]]), scores([[9.0], [9.0]])
    assert breakdown([samples, baselines], ["right"]) == {"reward.right": 0.5}


@pytest.mark.parametrize(
    ("parts", "names"), [([], ["right"]), ([[], []], ["right"]), ([[1.0]], []), ([[1.0]], ["a", "b"])]
)
def test_there_is_none_of_other_scores(parts: list[list[float]], names: list[str]):
    assert breakdown([scores(parts)], names) == {}


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"name": "a b", "rule": "exact_match"}, r"name = 'a b': want a word"),
        ({"name": "a"}, "mix a: give a path or a rule"),
        ({"name": "a", "rule": "x", "path": "y"}, "mix a: give a path or a rule"),
        ({"name": "a", "rule": "x", "weight": 0.0}, r"mix a: weight = 0.0: want a finite number, not 0"),
        ({"name": "a", "rule": "x", "weight": float("nan")}, "weight = nan"),
    ],
)
def test_a_part_that_means_nothing_is_refused(part: dict, said: str):
    with pytest.raises(ValueError, match=said):
        RewardPart(**part)
