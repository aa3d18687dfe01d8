"""Sampling settings in the torch engine, and the trainer's log-probs of what it samples: on policy the ratio is 1."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from protocols.data.messages import Finish, Prompts, Rollouts
from protocols.roles import Sampling
from protocols.weights import Version
from tests import tiny
from workers.data.vocabulary import Vocabulary
from workers.generation.engine import generate_all
from workers.generation.torch import TorchEngine
from workers.roles.policy import PolicyWorker
from workers.roles.reference import ReferenceWorker
from workers.settings import Generation, Loss, Model, Optimizer
from workers.training.models import load_causal

ROWS = 64  # of the model's vocabulary, of which the tokenizer knows 47
SEED = 7

SETTINGS = {
    "temperature": Generation(engine="torch", max_tokens=16, temperature=0.7),
    "top_p": Generation(engine="torch", max_tokens=16, top_p=0.7),
    "top_k": Generation(engine="torch", max_tokens=16, top_k=5),
    "min_p": Generation(engine="torch", max_tokens=16, min_p=0.3),
    "min_tokens": Generation(engine="torch", max_tokens=16, min_tokens=12, stop_token_ids=[5, 6, 7, 8]),
    "all": Generation(
        engine="torch", max_tokens=16, temperature=1.4, top_p=0.9, top_k=20, min_p=0.02, min_tokens=6, stop=["7", "ab"]
    ),
}
PROMPTS = tiny.make_prompts(["1", "12+3=", "the longest prompt of them all: ", "ab"], samples=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("model"), vocabulary=ROWS)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load_causal(folder)


def rollouts_of(model: PreTrainedModel, folder: Path, sampling: Sampling, prompts: Prompts = PROMPTS) -> Rollouts:
    engine = TorchEngine(model, Generation(slots=256), SEED, Vocabulary.of(folder), version=Version(0, 0))
    done = generate_all(engine, prompts, sampling)
    assert not done.failures
    return done.batch


@pytest.mark.parametrize("name", SETTINGS)
def test_the_trainer_s_log_probs_are_those_that_were_sampled_with(folder: Path, model: PreTrainedModel, name: str):
    settings = SETTINGS[name]
    rollouts = rollouts_of(model, folder, settings.sampling)
    policy = PolicyWorker(Model(str(folder), learning_rate=1e-3), Loss(), Optimizer(), settings, SEED)
    reference = ReferenceWorker(Model(str(folder)), Loss(), settings)
    for worker in (policy, reference):
        got = worker.log_probs(rollouts).log_probs.values
        np.testing.assert_allclose(got, rollouts.log_probs.values, atol=1e-5)
    assert np.isfinite(rollouts.log_probs.values).all()


@pytest.mark.parametrize("name", ["top_p", "top_k", "all"])
def test_untruncated_log_probs_would_be_lower(folder: Path, model: PreTrainedModel, name: str):
    """Else the test above would show nothing."""
    rollouts = rollouts_of(model, folder, SETTINGS[name].sampling)
    plain = PolicyWorker(Model(str(folder), learning_rate=1e-3), Loss(), Optimizer(), Generation(), SEED)
    assert (rollouts.log_probs.values - plain.log_probs(rollouts).log_probs.values).mean() > 0.1


def test_first_tokens_follow_the_truncated_distribution(folder: Path, model: PreTrainedModel):
    samples, sampling = 4000, Sampling(max_tokens=1, temperature=1.3, top_p=0.8, top_k=12)
    prompts = tiny.make_prompts(["7+8="], samples=samples)
    rollouts = rollouts_of(model, folder, sampling, prompts)
    counts = np.bincount(rollouts.responses.values, minlength=ROWS)
    expected = np.zeros(ROWS)
    for token, log_prob in zip(rollouts.responses.values, rollouts.log_probs.values, strict=True):
        expected[token] = samples * math.exp(log_prob)
    drawn = expected > 0
    assert expected.sum() == pytest.approx(samples, rel=1e-4)
    assert drawn.sum() <= 12
    chi_square = float(((counts - expected)[drawn] ** 2 / expected[drawn]).sum())
    freedom = drawn.sum() - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_ids_that_stand_for_no_token_are_never_sampled(folder: Path, model: PreTrainedModel):
    known = len(tiny.VOCABULARY)
    everything = TorchEngine(model, Generation(slots=256), SEED, tiny.TOKENS, version=Version(0, 0))
    hot = Sampling(max_tokens=12, temperature=5.0)
    assert generate_all(everything, PROMPTS, hot).batch.responses.values.max() >= known
    assert rollouts_of(model, folder, hot).responses.values.max() < known
    assert rollouts_of(model, folder, hot.greedy).responses.values.max() < known


def test_a_row_is_the_same_beside_rows_that_are_sampled_otherwise(folder: Path, model: PreTrainedModel):
    engine = TorchEngine(model, Generation(slots=256), SEED, Vocabulary.of(folder), version=Version(0, 0))
    mixed = [SETTINGS["all"].sampling, SETTINGS["top_k"].sampling, Sampling(max_tokens=9, temperature=0.0)]
    prompts = [tiny.make_prompts(["12+3=", "ab"], samples=2, first=2 * i) for i in range(len(mixed))]
    for part, sampling in zip(prompts, mixed, strict=True):
        engine.submit(part, sampling)
    together = {row.sample_id: row for row in engine.step()}
    for part, sampling in zip(prompts, mixed, strict=True):
        alone = rollouts_of(model, folder, sampling, part)
        for i, sample_id in enumerate(alone.sample_ids.tolist()):
            assert together[sample_id].tokens.tolist() == alone.responses[i].tolist()
            np.testing.assert_allclose(together[sample_id].log_probs, alone.log_probs[i], atol=1e-5)


def test_a_response_has_min_tokens_before_one_that_ends_it(folder: Path, model: PreTrainedModel):
    ends = {tiny.EOS_ID, *SETTINGS["min_tokens"].stop_token_ids}
    rollouts = rollouts_of(model, folder, SETTINGS["min_tokens"].sampling)
    for i in range(len(rollouts)):
        response = rollouts.responses[i].tolist()
        places = [place for place, token in enumerate(response) if token in ends]
        stopped = rollouts.finishes[i] == Finish.STOP
        assert places == ([len(response) - 1] if stopped else [])
        assert len(response) > 12
    assert (rollouts.finishes == Finish.STOP).any()


def test_a_response_ends_with_the_token_that_completes_a_stop_text(folder: Path, model: PreTrainedModel):
    free = rollouts_of(model, folder, Sampling(max_tokens=16))
    stopped = rollouts_of(model, folder, Sampling(max_tokens=16, stop=("7", "ab"), min_tokens=0))
    letters = {token: text if len(text) == 1 else "_" for text, token in tiny.VOCABULARY.items()}
    for i in range(len(free)):
        text = "".join(letters[token] for token in free.responses[i].tolist())
        found = [text.find(stop) + len(stop) for stop in ("7", "ab") if stop in text]
        end = min([*found, len(text)])
        assert stopped.responses[i].tolist() == free.responses[i][:end].tolist()
        assert stopped.finishes[i] == (Finish.STOP if found else free.finishes[i])
    assert (stopped.responses.lengths < free.responses.lengths).any()


@pytest.mark.parametrize(
    ("sampling", "complaint"),
    [
        (Sampling(top_p=0.0), "top_p above 0"),
        (Sampling(top_p=1.5), "top_p above 0"),
        (Sampling(top_k=-1), "top_k of 0 or more"),
        (Sampling(min_p=2.0), "min_p of 0 to 1"),
        (Sampling(max_tokens=4, min_tokens=4), "min_tokens of 0 or more, less than max_tokens"),
        (Sampling(stop=("",)), "stop texts that are not empty"),
    ],
)
def test_what_can_not_be_sampled_with_is_refused(
    folder: Path, model: PreTrainedModel, sampling: Sampling, complaint: str
):
    engine = TorchEngine(model, Generation(), SEED, Vocabulary.of(folder), version=Version(0, 0))
    with pytest.raises(ValueError, match=f"sampling needs {complaint}"):
        engine.submit(PROMPTS, sampling)
    assert engine.unfinished == 0


def test_the_probe_has_known_tokens_only_and_both_sides_answer_alike(folder: Path, model: PreTrainedModel):
    policy = PolicyWorker(Model(str(folder), learning_rate=1e-3), Loss(), Optimizer(), Generation(), SEED)
    probe = policy.probe()
    assert max(max(tokens) for tokens in probe.tokens) < len(tiny.VOCABULARY)
    engine = TorchEngine(load_causal(folder), Generation(), SEED, Vocabulary.of(folder))
    manifest, buffer = policy.snapshot(Version(0, 1))
    from workers.generation.packed import PackedWeights

    assert engine.load(PackedWeights(manifest, buffer)).probe_difference < 1e-5
