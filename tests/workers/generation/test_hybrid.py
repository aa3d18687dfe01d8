"""Ranks that switch from training to generation sample the same rows as one process, in every pair of layouts."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from msgspec.structs import replace

from protocols.data.columns import take
from protocols.data.messages import Prompts, Rollouts
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.layout.transfer import protocol
from protocols.roles import Sampling
from protocols.stage import Failure
from protocols.weights import Probe, Version
from tests import tiny
from tests.workers.batches import VOCABULARY, experience
from workers.data.vocabulary import Vocabulary
from workers.generation.engine import generate_all
from workers.generation.hybrid import ColocatedTorch
from workers.generation.torch import TorchEngine
from workers.parallel.model import ParallelModel
from workers.parallel.sharding import Sharding
from workers.resharding.hybrid_engine import HybridEngine
from workers.roles.policy import PolicyWorker
from workers.settings import Generation, Loss, Model, Optimizer
from workers.training.models import load_causal

SWITCHES = ["1-2-1 -> 1-1", "2-1-1 -> 1-1", "2-1-1 -> 2-1", "1-2-2 -> 1-1", "2-2-1 -> 2-2", "2-2-1 -> 1-2"]
SAMPLED, GREEDY = Sampling(max_tokens=12, temperature=0.8), Sampling(max_tokens=12, temperature=0.0)
GENERATION = Generation(engine="torch", slots=3)  # several rounds: a row's tokens must not depend on other rows
TEXTS = ["12+34=", "7*", "what?", "a", "9-9=", "2+2=", "one, two"]
SEED = 5
RATE, OPTIMIZER = 0.3, Optimizer(epsilon=1.0)  # near SGD: Adam amplifies the rounding of small gradients


def grouping_of(text: str) -> GenerationGrouping:
    train, generate = (Topology.parse(layout) for layout in text.split(" -> "))
    return GenerationGrouping(train, generate.pp, generate.tp)


@cache
def alone(folder: str, sampling: Sampling) -> Rollouts:
    engine = TorchEngine(
        load_causal(folder), GENERATION, SEED, Vocabulary.of(folder), owns_model=False, version=Version(0, 0)
    )
    return generate_all(engine, tiny.make_prompts(TEXTS), sampling).batch


# --- what every rank runs


class Generated(NamedTuple):
    """The rows that one rank returns."""

    sampled: Rollouts | None
    greedy: Rollouts | None


def own_rows(grouping: GenerationGrouping, rank: int, texts: list[str]) -> Prompts:
    rows = tiny.make_prompts(texts)
    shares = protocol("3D_ALL_MICRO_DP").distribute(len(rows), grouping.topology, generation=grouping)
    return take(rows, shares[rank])


def policy_of(folder: str, grouping: GenerationGrouping | None) -> PolicyWorker:
    at = grouping.topology if grouping else Topology()
    model = Model(path=folder, learning_rate=RATE)
    return PolicyWorker(model, Loss(), OPTIMIZER, GENERATION, SEED, sharding=Sharding(at), grouping=grouping)


def rows_of(policy: PolicyWorker, prompts: Prompts, sampling: Sampling) -> Rollouts | None:
    """The rows that this rank returns; none may fail."""
    given = policy.generate(prompts, sampling=sampling)
    assert given is None or not given.failures
    return given.batch if given else None


def generated(folder: str, grouping: GenerationGrouping, texts: list[str]) -> Generated:
    policy = policy_of(folder, grouping)
    prompts = own_rows(grouping, policy.model.rank, texts)
    return Generated(rows_of(policy, prompts, SAMPLED), rows_of(policy, prompts, GREEDY))


def loop(folder: str, grouping: GenerationGrouping) -> tuple[Rollouts | None, Rollouts | None, float]:
    """The rows that this rank generates before and after a step, and the gradient norm of the following step."""
    policy = policy_of(folder, grouping)
    prompts = own_rows(grouping, policy.model.rank, TEXTS)
    shares = protocol("METRIC").distribute(rows=7, topology=grouping.topology)
    data = take(experience(7), shares[policy.model.rank])
    before = rows_of(policy, prompts, SAMPLED)
    policy.update(data)
    after = rows_of(policy, prompts, SAMPLED)
    metrics = policy.update(data)
    return before, after, metrics.values["gradient_norm"] if metrics else 0.0


def all_ranks_rows(folder: str, grouping: GenerationGrouping) -> Rollouts:
    """The rows of this rank's own engine, whether the protocol collects them or not."""
    hybrid = HybridEngine(ParallelModel(folder, grouping.topology), grouping)
    colocated = ColocatedTorch(hybrid, GENERATION, SEED, Vocabulary.of(folder))
    colocated.publish(0, no_probe)
    return generate_all(colocated.engine, tiny.make_prompts(TEXTS), SAMPLED).batch


def no_probe() -> Probe:
    raise AssertionError("a module that was gathered in place is not probed")


# --- the ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_policy(tmp_path_factory.mktemp("policy"), vocabulary=VOCABULARY))


def assert_same(ours: list[Rollouts | None], theirs: Rollouts, grouping: GenerationGrouping) -> None:
    collected = protocol("3D_ALL_MICRO_DP").collect(grouping.topology, generation=grouping)
    assert [rank for rank, rows in enumerate(ours) if rows is not None] == sorted(collected)
    answers = [rows for rank in collected if (rows := ours[rank]) is not None]
    for name in ("sample_ids", "finishes"):
        np.testing.assert_array_equal(np.concatenate([getattr(a, name) for a in answers]), getattr(theirs, name))
    np.testing.assert_array_equal(np.concatenate([a.responses.values for a in answers]), theirs.responses.values)
    log_probs = np.concatenate([a.log_probs.values for a in answers])
    np.testing.assert_allclose(log_probs, theirs.log_probs.values, atol=1e-5)


@pytest.mark.parametrize("switch", SWITCHES)
def test_greedy_and_seeded_rows_are_those_of_one_process(worlds, folder: str, switch: str):
    grouping = grouping_of(switch)
    ranks = worlds[grouping.topology.world_size].call(generated, folder, grouping, TEXTS)
    assert_same([rank.sampled for rank in ranks], alone(folder, SAMPLED), grouping)
    assert_same([rank.greedy for rank in ranks], alone(folder, GREEDY), grouping)


def test_one_rank_needs_no_process_group(folder: str):
    grouping = grouping_of("1-1-1 -> 1-1")
    one = generated(folder, grouping, TEXTS)
    assert_same([one.sampled], alone(folder, SAMPLED), grouping)
    assert_same([one.greedy], alone(folder, GREEDY), grouping)


def test_training_and_generation_take_turns_as_in_one_process(worlds, folder: str):
    grouping, prompts, data = grouping_of("1-2-2 -> 1-1"), tiny.make_prompts(TEXTS), experience(7)
    ranks = worlds[4].call(loop, folder, grouping)
    worker = PolicyWorker(Model(path=folder, learning_rate=RATE), Loss(), OPTIMIZER, GENERATION, SEED)
    before = worker.generate(prompts, sampling=SAMPLED).batch
    worker.update(data)
    after = worker.generate(prompts, sampling=SAMPLED).batch
    norm = worker.update(data).values["gradient_norm"]
    assert before.responses != after.responses
    assert_same([rank[0] for rank in ranks], before, grouping)
    assert_same([rank[1] for rank in ranks], after, grouping)
    assert {versions for rank in ranks if rank[1] for versions in rank[1].versions.values.tolist()} == {1}
    assert [rank[2] for rank in ranks if rank[2]] == pytest.approx([norm, norm], rel=1e-5)


def test_a_replica_without_rows_takes_part(worlds, folder: str):
    grouping = grouping_of("1-2-2 -> 1-1")
    ranks = worlds[4].call(generated, folder, grouping, TEXTS[:1])
    assert [len(rank.sampled) for rank in ranks] == [1, 0, 0, 0]


def test_all_ranks_of_a_replica_generate_the_same_bits(worlds, folder: str):
    grouping = grouping_of("2-2-1 -> 2-2")
    first, *others = worlds[4].call(all_ranks_rows, folder, grouping)
    for other in others:
        assert other == first


def test_an_engine_of_ranks_that_train_does_not_step(folder: str):
    grouping = grouping_of("1-1-1 -> 1-1")
    hybrid = HybridEngine(ParallelModel(folder, Topology()), grouping)
    colocated = ColocatedTorch(hybrid, GENERATION, SEED, Vocabulary.of(folder))
    colocated.publish(0, no_probe)
    colocated.release()
    with pytest.raises(RuntimeError, match="switch to generation before an engine steps"):
        colocated.generate(tiny.make_prompts(TEXTS), SAMPLED)


def test_a_row_that_does_not_fit_fails_alone(folder: str):
    prompts = tiny.make_prompts(["1+1=", "", "2+2="])
    given = policy_of(folder, grouping_of("1-1-1 -> 1-1")).generate(prompts, sampling=SAMPLED)
    assert given is not None
    _, empty, _ = prompts.sample_ids.tolist()
    assert given.failures == [Failure(empty, f"sample {empty}: the prompt is empty")]
    assert given.batch.sample_ids.tolist() == [s for s in prompts.sample_ids.tolist() if s != empty]


def test_a_prompt_is_not_generated_by_weights_older_than_its_admission(folder: str):
    prompts = replace(tiny.make_prompts(TEXTS[:1]), min_versions=np.array([3], np.int64))
    with pytest.raises(ValueError, match="prompt of version 3 can't be generated by weights of version 0"):
        policy_of(folder, grouping_of("1-1-1 -> 1-1")).generate(prompts, sampling=SAMPLED)


def test_a_policy_may_generate_several_times_before_it_switches_back(folder: str):
    policy = policy_of(folder, grouping_of("1-1-1 -> 1-1"))
    took = policy.to_generation()
    assert took and took.received_bytes == 0
    prompts = tiny.make_prompts(TEXTS)
    assert rows_of(policy, prompts, SAMPLED) == rows_of(policy, prompts, SAMPLED)
    policy.to_training()
    with pytest.raises(RuntimeError, match="training already"):
        policy.to_training()


def test_a_policy_without_a_generation_layout_says_so(folder: str):
    with pytest.raises(RuntimeError, match="no generation layout"):
        policy_of(folder, None).to_generation()
