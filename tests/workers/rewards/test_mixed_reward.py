"""A mixed reward: the weighted sum, each part as a metric, and rows that a part could not score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from asyncflow.services.batch_metrics import batch_metrics
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


def breakdown(inputs: Sequence[Scores]) -> dict[str, float]:
    """The metrics of the parts alone."""
    return {name: value for name, value in batch_metrics(inputs).items() if name.startswith("reward.")}


def scores(*rows: Mapping[str, float]) -> Scores:
    """Scores with these parts, by row."""
    ids = np.arange(len(rows), dtype=np.int64)
    return Scores(
        sample_ids=ids,
        scores=ids.astype(np.float32),
        parts=Jagged.from_rows([list(row.values()) for row in rows], np.float32),
        names=Jagged.from_texts("\n".join(row) for row in rows),
    )


def test_scores_without_parts_have_empty_rows_on_every_way():
    plain = Scores(sample_ids=np.array([4, 5]), scores=np.ones(2, np.float32))
    plain.check()
    assert plain.parts.lengths.tolist() == [0, 0]
    assert codec.decode(codec.encode(plain)) == plain == concat([take(plain, [0]), take(plain, [1])])


def test_the_breakdown_is_each_parts_mean_by_name():
    both = scores({"right": 1, "liked": 4}, {"right": 0, "liked": 8})
    assert breakdown([both]) == {"reward.right": 0.5, "reward.liked": 6.0}


def test_a_part_that_some_samples_have_is_the_mean_of_those():
    assert breakdown([scores({"right": 1, "long": 3}, {}, {"right": 0})]) == {"reward.right": 0.5, "reward.long": 3.0}


def test_of_two_scores_the_samples_own_come_first():
    samples, baselines = scores({"right": 1}, {"right": 0}), scores({"right": 9}, {"right": 9})
    assert breakdown([samples, baselines]) == {"reward.right": 0.5}


def test_there_is_none_without_names():
    without = Scores(sample_ids=np.arange(2), scores=np.ones(2, np.float32), parts=Jagged.from_rows([[1], [2]], "f4"))
    without.check()
    assert breakdown([without]) == breakdown([]) == {}


def test_each_part_has_a_name_or_none_has():
    wrong = Scores(
        sample_ids=np.arange(1),
        scores=np.ones(1, np.float32),
        parts=Jagged.from_rows([[1, 2]], "f4"),
        names=Jagged.from_texts(["right"]),
    )
    with pytest.raises(ValueError, match="names: row 0 has 1 names for 2 parts"):
        wrong.check()


def test_the_parts_of_a_rule_are_reported_and_those_in_a_mix_below_its_part(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a_rule_with_parts.py").write_text(
        "def total(response):\n    return {'score': 2.0, 'short': len(response) < 2, 'said': response}\n"
        "def summed(response):\n    return {'short': len(response) < 2, 'long': 0.5}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mix = Model(mix=[RewardPart("a", rule="a_rule_with_parts:total"), RIGHT])
    for model, totals, means in (
        (Model(rule="a_rule_with_parts:total"), [2, 2, 2], {"reward.short": 1 / 3}),
        (Model(rule="a_rule_with_parts:summed"), [0.5, 1.5, 0.5], {"reward.short": 1 / 3, "reward.long": 0.5}),
        (mix, [4, 2, 2], {"reward.a": 2, "reward.a.short": 1 / 3, "reward.right": 1 / 3}),
    ):
        reward = RewardWorker(model, 8192, folder, Failures())
        result = reward.score(ROWS)
        reward.close()
        result.batch.check()
        assert result.batch.scores.tolist() == totals
        assert breakdown([result.batch]) == pytest.approx(means)


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
