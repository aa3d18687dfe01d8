"""Reference, reward and cost models on many ranks give the answers of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from protocols.data.columns import take
from protocols.data.messages import Costs, LogProbs, Rollouts, Scores
from protocols.layout.topology import Topology
from protocols.layout.transfer import protocol
from protocols.stage import Failure, Partial
from tests import tiny
from tests.workers.batches import VOCABULARY, experience, rollouts
from workers.parallel.sharding import Sharding
from workers.roles.cost import CostWorker
from workers.roles.reference import ReferenceWorker
from workers.roles.reward import RewardWorker
from workers.settings import Generation, Loss, Model

ROWS = 7
LOSS, GENERATION = Loss(tokens_per_micro_batch=40), Generation(temperature=0.8)


def batch(rows: int = ROWS) -> Rollouts:
    return rollouts(experience(rows))


def sharding(ranks: str) -> Sharding:
    """Of "topology" or "topology backend"."""
    topology, _, backend = ranks.partition(" ")
    return Sharding(Topology.parse(topology), "fsdp" if backend == "fsdp" else "3d")


def own_rows(topology: Topology, rank: int, rows: int) -> Rollouts:
    """The rows that a service would send to this rank, perhaps none."""
    return take(batch(rows), protocol("3D_PROTO").distribute(rows, topology)[rank])


# --- what every rank runs


def log_probs(at: Sharding, folder: str, rows: int) -> LogProbs | None:
    worker = ReferenceWorker(Model(path=folder), LOSS, GENERATION, sharding=at)
    return worker.log_probs(own_rows(at.topology, worker.model.rank, rows))


def scores(at: Sharding, folder: str, rows: int) -> Partial[Scores] | None:
    worker = RewardWorker(Model(path=folder), LOSS.tokens_per_micro_batch, sharding=at)
    return worker.score(own_rows(at.topology, worker.models[0].rank, rows))


def costs(at: Sharding, folder: str, rows: int) -> Partial[Costs] | None:
    worker = CostWorker(Model(path=folder), LOSS.tokens_per_micro_batch, sharding=at)
    return worker.score(own_rows(at.topology, worker.models[0].rank, rows))


# --- the ranks


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Policies, reward models, and a reward model whose head is not finite."""
    root = tmp_path_factory.mktemp("answers")
    tiny.make_policy(root / "policy", vocabulary=VOCABULARY)
    tiny.make_gpt2(root / "gpt2", vocabulary=VOCABULARY)
    tiny.make_gpt2(root / "gpt2-reward", reward=True, vocabulary=VOCABULARY)
    reward = tiny.make_reward(root / "reward", vocabulary=VOCABULARY)
    tensors = load_file(reward / "model.safetensors")
    tensors["score.weight"].fill_(float("nan"))
    save_file(tensors, shutil.copytree(reward, root / "broken") / "model.safetensors", {"format": "pt"})
    return {name: str(root / name) for name in ("policy", "gpt2", "reward", "gpt2-reward", "broken")}


def collected(answers: list[Any], topology: Topology) -> list[Any]:
    """The answers that the protocol collects, in its order; the other ranks must have none."""
    counting = protocol("3D_PROTO").collect(topology)
    assert [rank for rank, answer in enumerate(answers) if answer is not None] == counting
    return [answers[rank] for rank in counting]


def over(model: str, *more: str) -> list[tuple[str, str]]:
    """A model of a family that can be cut, on ranks of each kind."""
    return [(model, ranks) for ranks in ("1-2-1", "2-1-1", "1-2-2", "1-1-2 fsdp", "1-2-2 fsdp", *more)]


@pytest.mark.parametrize("rows", [ROWS, 1], ids=["uneven", "a replica without rows"])
@pytest.mark.parametrize(("model", "ranks"), [*over("policy", "2-2-1"), ("gpt2", "1-1-2 fsdp")])
def test_a_reference_on_ranks_gives_the_log_probs_of_one_process(worlds, folders, model: str, ranks: str, rows: int):
    at = sharding(ranks)
    answers = collected(worlds[at.topology.world_size].call(log_probs, at, folders[model], rows), at.topology)
    alone = ReferenceWorker(Model(path=folders[model]), LOSS, GENERATION).log_probs(batch(rows))
    np.testing.assert_array_equal(np.concatenate([a.sample_ids for a in answers]), alone.sample_ids)
    values = np.concatenate([a.log_probs.values for a in answers])
    np.testing.assert_allclose(values, alone.log_probs.values, atol=1e-5)


@pytest.mark.parametrize(("model", "ranks"), [*over("reward"), ("gpt2-reward", "1-1-2 fsdp")])
def test_a_reward_and_a_cost_model_on_ranks_give_the_scores_of_one_process(worlds, folders, model: str, ranks: str):
    at, budget = sharding(ranks), LOSS.tokens_per_micro_batch
    world = worlds[at.topology.world_size]
    given = collected(world.call(scores, at, folders[model], ROWS), at.topology)
    alone = RewardWorker(Model(path=folders[model]), budget).score(batch())
    np.testing.assert_array_equal(np.concatenate([g.batch.sample_ids for g in given]), alone.batch.sample_ids)
    np.testing.assert_allclose(np.concatenate([g.batch.scores for g in given]), alone.batch.scores, atol=1e-5)
    on_ranks = collected(world.call(costs, at, folders[model], ROWS), at.topology)
    in_one = CostWorker(Model(path=folders[model]), budget).score(batch())
    np.testing.assert_allclose(np.concatenate([a.batch.costs for a in on_ranks]), in_one.batch.costs, atol=1e-5)


def test_a_number_that_is_not_finite_fails_its_row_under_the_roles_name(worlds, folders):
    at = sharding("1-2-1")
    (given,) = collected(worlds[2].call(scores, at, folders["broken"], ROWS), at.topology)
    assert len(given.batch) == 0
    assert given.failures == [Failure(sample, "reward model gave nan") for sample in batch().sample_ids.tolist()]
    (failed,) = collected(worlds[2].call(costs, at, folders["broken"], ROWS), at.topology)
    assert {failure.cause for failure in failed.failures} == {"cost model gave nan"}


def test_a_frozen_model_has_no_gradients(folders: dict[str, str]):
    worker = ReferenceWorker(Model(path=folders["policy"]), LOSS, GENERATION)
    assert not any(parameter.requires_grad for parameter in worker.model.parameters.values())


def test_a_model_without_a_score_head_is_refused(folders: dict[str, str]):
    path = Path(folders["policy"])
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors: \['score\.weight'\]"):
        RewardWorker(Model(path=str(path)), 40)
