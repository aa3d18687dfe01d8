"""vLLM samples from the distribution that the torch engine samples from and the trainer computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from protocols.data.messages import Finish, Prompts, Rollouts
from protocols.roles import Sampling
from protocols.weights import Version
from tests import tiny
from tests.workers.generation.test_sampling import PROMPTS, ROWS, SEED, SETTINGS, rollouts_of
from workers.generation.engine import generate_all
from workers.generation.packed import PackedWeights
from workers.generation.vllm import VllmEngine
from workers.roles.policy import PolicyWorker
from workers.settings import Generation, Loss, Model, Optimizer
from workers.training.models import load_causal

pytestmark = pytest.mark.vllm


class Pair:
    """An engine, and the policy whose weights it has."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.version = folder, 0
        self.engine = VllmEngine(str(folder), Generation(slots=256, kv_cache_bytes=2 * 1024 * 1024), SEED)
        self.probe_difference = self.publish()

    def publish(self) -> float:
        self.version += 1
        policy = PolicyWorker(Model(str(self.folder), learning_rate=1e-3), Loss(), Optimizer(), Generation(), SEED)
        return self.engine.load(PackedWeights(*policy.snapshot(Version(0, self.version)))).probe_difference

    def rollouts(self, sampling: Sampling, prompts: Prompts = PROMPTS) -> Rollouts:
        done = generate_all(self.engine, prompts, sampling)
        assert not done.failures
        return done.batch


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tiny.make_policy(tmp_path_factory.mktemp("model"), vocabulary=ROWS))
    yield made
    made.engine.close()


def test_a_publication_of_a_padded_vocabulary_is_verified(pair: Pair):
    assert pair.probe_difference < 1e-4


@pytest.mark.parametrize("name", SETTINGS)
def test_the_trainer_s_log_probs_are_those_that_were_sampled_with(pair: Pair, name: str):
    settings = SETTINGS[name]
    rollouts = pair.rollouts(settings.sampling)
    policy = PolicyWorker(Model(str(pair.folder), learning_rate=1e-3), Loss(), Optimizer(), settings, SEED)
    got = policy.log_probs(rollouts).log_probs.values
    np.testing.assert_allclose(got, rollouts.log_probs.values, atol=1e-4)
    assert rollouts.responses.values.max() < len(tiny.VOCABULARY)


def test_first_tokens_follow_the_torch_engine_s_distribution(pair: Pair):
    samples, sampling = 2000, Sampling(max_tokens=1, temperature=1.3, top_p=0.8, top_k=12, min_p=0.02)
    prompts = tiny.make_prompts(["7+8="], samples=samples)
    ours, theirs = (
        np.bincount(rollouts.responses.values, minlength=ROWS)
        for rollouts in (
            rollouts_of(load_causal(pair.folder), pair.folder, sampling, prompts),
            pair.rollouts(sampling, prompts),
        )
    )
    drawn = ours + theirs > 0
    assert drawn.sum() <= 12
    chi_square = float(((ours - theirs)[drawn] ** 2 / (ours + theirs)[drawn]).sum())
    freedom = drawn.sum() - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("ending", ["limit", "ids", "texts"])
def test_greedy_responses_are_the_torch_engine_s(pair: Pair, ending: str):
    model, free = load_causal(pair.folder), Sampling(max_tokens=24, temperature=0.0)
    late = {int(response[-4]) for response in rollouts_of(model, pair.folder, free).responses}
    sampling = {
        "limit": free,
        "ids": replace(free, min_tokens=10, stop_token_ids=tuple(late)),
        "texts": replace(free, min_tokens=2, stop=("7", "a", "pq", ":")),
    }[ending]
    ours, theirs = rollouts_of(model, pair.folder, sampling), pair.rollouts(sampling)
    np.testing.assert_array_equal(theirs.responses.values, ours.responses.values)
    np.testing.assert_array_equal(theirs.responses.offsets, ours.responses.offsets)
    np.testing.assert_array_equal(theirs.finishes, ours.finishes)
    np.testing.assert_allclose(theirs.log_probs.values, ours.log_probs.values, atol=1e-4)
    assert (ours.finishes == Finish.STOP).any() == (ending != "limit")


def test_min_tokens_and_stop_texts_go_on_over_a_load(pair: Pair):
    sampling = Sampling(max_tokens=24, temperature=0.0, min_tokens=6, stop=("7", "a", "pq", ":"))
    want = rollouts_of(load_causal(pair.folder), pair.folder, sampling)
    pair.engine.submit(PROMPTS, sampling)
    rows = [row for _ in range(4) for row in pair.engine.step()]
    pair.publish()
    while pair.engine.unfinished:
        rows += pair.engine.step()
    responses = {row.sample_id: row.tokens.tolist() for row in rows}
    assert [responses[i] for i in want.sample_ids.tolist()] == [response.tolist() for response in want.responses]


def test_a_temperature_that_vllm_would_change_is_refused(pair: Pair):
    with pytest.raises(ValueError, match=r"temperature = 0\.005: vLLM samples at 0\.01 to 2"):
        pair.engine.submit(PROMPTS, Sampling(temperature=0.005))
    assert pair.engine.unfinished == 0
