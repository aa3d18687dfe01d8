"""The distribution that tokens are sampled from, against its definition computed token by token."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from protocols.roles import Sampling
from tests import tiny
from workers.data.vocabulary import Vocabulary
from workers.training.token_distribution import TokenDistribution

ROWS, TOKENS = 300, 40  # more rows than are sorted at once
ENDS = frozenset({3, 7})

SAMPLINGS = {
    "plain": Sampling(),
    "temperature": Sampling(temperature=0.7),
    "top_p": Sampling(top_p=0.8),
    "top_k": Sampling(top_k=5),
    "min_p": Sampling(min_p=0.2),
    "all": Sampling(temperature=1.5, top_p=0.9, top_k=12, min_p=0.05),
    "one": Sampling(top_k=1),
    "more than all": Sampling(top_k=10_000),
}


@pytest.fixture(scope="module")
def logits() -> Tensor:
    return torch.randn(ROWS, TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def defined(row: list[float], sampling: Sampling) -> list[float]:
    """The definition, one token at a time, for logits that are all different."""
    scaled = [logit / sampling.temperature for logit in row]
    kept = {token: math.exp(value) for token, value in enumerate(scaled)}
    kept = {token: mass for token, mass in kept.items() if mass >= sampling.min_p * max(kept.values())}
    ordered = sorted(kept, key=lambda token: -kept[token])[: sampling.top_k or None]
    total, before, nucleus = sum(kept[token] for token in ordered), 0.0, list[int]()
    for token in ordered:
        if before < sampling.top_p * total or not nucleus:
            nucleus.append(token)
        before += kept[token]
    mass = sum(kept[token] for token in nucleus)
    return [kept[token] / mass if token in nucleus else 0.0 for token in range(len(row))]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_distribution_is_the_renormalised_truncated_one(logits: Tensor, name: str):
    want = torch.tensor([defined(row, SAMPLINGS[name]) for row in logits.tolist()], dtype=torch.float64)
    got = TokenDistribution(SAMPLINGS[name]).processed(logits, 0).softmax(-1)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_token_s_log_prob_is_the_distribution_s(logits: Tensor, name: str):
    distribution = TokenDistribution(SAMPLINGS[name])
    processed = distribution.processed(logits, 0).log_softmax(-1)
    tokens = processed.exp().multinomial(1, generator=torch.Generator().manual_seed(1)).squeeze(-1)
    want = processed.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(distribution.log_probs(logits, tokens, 0), want, atol=1e-12, rtol=0)


def test_a_sampled_token_that_these_logits_remove_is_kept_beside_the_others():
    logits = torch.tensor([[0.0, -1.0, -5.0]], dtype=torch.float64, requires_grad=True)
    got = TokenDistribution(Sampling(top_k=1)).log_probs(logits, torch.tensor([2]), 0)
    torch.testing.assert_close(got, torch.tensor([-5.0 - math.log1p(math.exp(-5.0))], dtype=torch.float64))
    got.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0.0
    assert logits.grad[0, 2] > 0.9


@pytest.mark.parametrize("name", ["top_p", "all"])
def test_the_gradient_is_that_of_the_truncated_distribution(name: str):
    start = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    distribution, tokens = TokenDistribution(SAMPLINGS[name]), start.detach().argmax(-1)
    assert torch.autograd.gradcheck(lambda logits: distribution.log_probs(logits, tokens, 0), (start,))


def test_equal_logits_are_kept_or_removed_together():
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0, -9.0]])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.6)):
        kept = TokenDistribution(sampling).processed(logits, 0).isfinite()
        assert kept.tolist() == [[True, True, True, True, False]]


def test_end_tokens_have_no_probability_among_the_first_min_tokens(logits: Tensor):
    sampling = Sampling(min_tokens=2, stop_token_ids=(11,), top_p=0.95)
    distribution = TokenDistribution(sampling, Vocabulary(ENDS))
    positions = torch.arange(ROWS) % 4
    probabilities = distribution.processed(logits, positions).softmax(-1)
    ends = [*ENDS, 11]
    assert probabilities[positions < 2][:, ends].max() == 0.0
    assert (probabilities[positions >= 2][:, ends].amax(0) > 0.0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(ROWS, dtype=torch.float64))
    assert distribution.ends(torch.tensor([3, 4, 7, 11])).tolist() == [True, False, True, True]


def test_ids_that_stand_for_no_token_have_no_probability(tmp_path_factory: pytest.TempPathFactory):
    folder = tiny.make_policy(tmp_path_factory.mktemp("padded"), vocabulary=64)
    known = len(tiny.VOCABULARY)
    assert Vocabulary.of(folder).unknown(64) == list(range(known, 64))
    assert Vocabulary(frozenset({60}), folder).unknown(64) == [i for i in range(known, 64) if i != 60]
    distribution = TokenDistribution(Sampling(), Vocabulary.of(folder))
    probabilities = distribution.processed(torch.zeros(2, 64), 0).softmax(-1)
    torch.testing.assert_close(probabilities[:, :known], torch.full((2, known), 1 / known))
    assert probabilities[:, known:].max() == 0.0
    got = distribution.log_probs(torch.zeros(2, 64), torch.tensor([0, 46]), 0)
    torch.testing.assert_close(got, torch.full((2,), -math.log(known)))


@pytest.mark.parametrize("name", ["plain", "all"])
def test_samples_invert_the_cumulative_distribution(logits: Tensor, name: str):
    distribution, few = TokenDistribution(SAMPLINGS[name]), logits[:4].float()
    probabilities = distribution.processed(few, 0).softmax(-1).double()
    for row, uniform in itertools.product(range(4), (0.0, 0.3, 0.999, 1 - 2**-53)):
        tokens, log_probs = distribution.sample(few, torch.full((4,), uniform, dtype=torch.float64), 0)
        below = probabilities[row, : tokens[row]].sum()
        assert below <= uniform + 1e-6
        assert below + probabilities[row, tokens[row]] > uniform - 1e-6
        assert probabilities[row, tokens[row]] > 0.0
        assert log_probs[row].item() == pytest.approx(math.log(probabilities[row, tokens[row]]), abs=1e-5)


def test_a_greedy_token_s_log_prob_is_at_temperature_1_and_not_truncated(logits: Tensor):
    greedy = TokenDistribution(Sampling(temperature=0.0, top_p=0.1, top_k=1, min_p=0.9))
    tokens, log_probs = greedy.sample(logits.float(), torch.zeros(ROWS, dtype=torch.float64), 0)
    assert torch.equal(tokens, logits.float().argmax(-1))
    torch.testing.assert_close(log_probs, logits.float().log_softmax(-1).amax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_and_the_trainer_give_the_token_of_a_large_vocabulary_the_same_log_prob(temperature: float):
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(8, 49_152, generator=generator) * 2
    large[:, 0] += 14  # a confident model: many small terms beside a large one
    distribution = TokenDistribution(Sampling(temperature=temperature))
    tokens, sampled = distribution.sample(large, torch.full((8,), 0.5, dtype=torch.float64), 0)
    assert torch.equal(sampled, distribution.log_probs(large, tokens, 0))
    exact = large.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(sampled.double(), exact, rtol=0, atol=1e-6)
