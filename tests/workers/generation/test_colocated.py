"""vLLM that takes turns with training on the same device: a switch transfers new weights, and each version once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from protocols.data.messages import Rollouts
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.roles import Sampling
from protocols.weights import BadWeights, Probe
from tests import tiny
from tests.workers.batches import VOCABULARY, experience
from workers.roles.policy import PolicyWorker
from workers.settings import Generation, Loss, Model, Optimizer

pytestmark = pytest.mark.vllm

GENERATION = Generation(slots=16, kv_cache_bytes=2 * 1024 * 1024)
SAMPLING = Sampling(max_tokens=12)
TEXTS = ["3+4*5=" * 30, "sort: dcba " * 20, "12+34="]


@pytest.fixture
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyWorker]:
    path = str(tiny.make_policy(tmp_path_factory.mktemp("policy"), vocabulary=VOCABULARY))
    model = Model(path=path, learning_rate=0.3)
    grouping = GenerationGrouping(Topology())
    made = PolicyWorker(model, Loss(), Optimizer(epsilon=1.0), GENERATION, 3, grouping=grouping, sleeps=True)
    with closing(made):
        yield made


def generated_by(policy: PolicyWorker) -> Rollouts:
    generated = policy.generate(tiny.make_prompts(TEXTS, samples=2), sampling=SAMPLING)
    assert generated is not None
    assert not generated.failures
    return generated.batch


def assert_own(policy: PolicyWorker, rows: Rollouts) -> None:
    """The rows were generated with the policy's weights: it computes the same log-probs."""
    again = policy.log_probs(rows)
    assert again is not None
    np.testing.assert_allclose(rows.log_probs.values, again.log_probs.values, atol=1e-4)


def test_it_draws_with_what_was_trained_last(policy: PolicyWorker, tmp_path_factory: pytest.TempPathFactory):
    folder = str(tmp_path_factory.mktemp("state"))
    policy.save(folder)
    first = generated_by(policy)
    assert_own(policy, first)
    policy.update(experience(5))
    second = generated_by(policy)
    assert_own(policy, second)
    assert set(second.versions.values) == {1}
    assert first.responses != second.responses

    policy.load(folder)  # an older version number, which still is the newest publication
    assert generated_by(policy).responses == first.responses


def test_a_version_is_brought_once_whoever_asks_for_it_again(policy: PolicyWorker):
    took = policy.to_generation()
    assert took
    assert took.received_bytes == 0
    assert took.copied_bytes == sum(tensor.nbytes for tensor in policy.trained.collect().values())
    policy.to_training()
    assert policy.to_generation() is None
    assert_own(policy, generated_by(policy))
    policy.to_training()


def test_weights_that_are_refused_draw_nothing_until_others_are_proven(policy: PolicyWorker):
    assert policy.colocated
    right = policy.probe()
    wrong = Probe(right.tokens, [[value - 1.0 for value in row] for row in right.log_probs], right.tolerance)
    with pytest.raises(BadWeights, match="log-probs differ by 1"):
        policy.colocated.publish(0, lambda: wrong)
    with pytest.raises(BadWeights, match="weights of step 0: this replica's engine refused them"):
        policy.to_generation()
    policy.to_training()
    policy.update(experience(5))
    assert_own(policy, generated_by(policy))
