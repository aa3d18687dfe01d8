"""The contracts of the roles: abstract classes whose methods are stages.

Workers implement them and tracing reads them, so neither tracing nor a client needs to import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from protocols.data.messages import Costs, Experience, LogProbs, Metrics, Prompts, Rollouts, Scores, Values
from protocols.stage import Partial, stage


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a response is sampled; workers.training.token_distribution defines the distribution of its tokens."""

    max_tokens: int = 64
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1: all tokens
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0  # a share of the likeliest token's probability; 0: all tokens
    min_tokens: int = 0  # so many tokens come before one that ends the response
    stop: tuple[str, ...] = ()  # texts that end a response; the token that completes one belongs to it
    stop_token_ids: tuple[int, ...] = ()  # ids that end a response, beside the model's own

    @property
    def greedy(self) -> Sampling:
        """The likeliest token at each place, with the same limits and ends."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=0.0,
            min_tokens=self.min_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
        )


class Greedy(msgspec.Struct, frozen=True):
    """Marks a call of `generate` as greedy: one row per prompt, with the recipe's max_tokens."""


GREEDY = Greedy()


class Policy(ABC):
    """The model that is trained: generates responses and learns from them."""

    @stage(protocol="3D_ALL_MICRO_DP")
    @abstractmethod
    def generate(self, prompts: Prompts, *, sampling: Sampling) -> Rollouts | Partial[Rollouts]:
        """Generate one response per row."""

    @stage(protocol="3D_PROTO", balance="tokens")
    @abstractmethod
    def log_probs(self, rollouts: Rollouts) -> LogProbs:
        """Log-probs of the response tokens under the current weights."""

    @stage(protocol="METRIC")
    @abstractmethod
    def update(self, experience: Experience) -> Metrics:
        """Train one step: epochs x mini-batches optimizer steps on one closed batch."""


class Critic(ABC):
    """Predicts the return of a state, and is trained on the returns."""

    @stage(protocol="3D_PROTO", balance="tokens")
    @abstractmethod
    def values(self, rollouts: Rollouts) -> Values:
        """The value of the state before each response token."""

    @stage(protocol="METRIC")
    @abstractmethod
    def update(self, experience: Experience) -> Metrics:
        """Train one step: fit the values to the returns of one closed batch."""


class Reference(ABC):
    """The frozen model of the KL term."""

    @stage(protocol="3D_PROTO", balance="tokens")
    @abstractmethod
    def log_probs(self, rollouts: Rollouts) -> LogProbs:
        """Log-probs of the response tokens under the reference weights."""


class Reward(ABC):
    """Scores finished responses: a rule, a trained model, a remote service or a person."""

    @stage(protocol="DP_PROTO", balance="tokens")
    @abstractmethod
    def score(self, rollouts: Rollouts) -> Scores | Partial[Scores]:
        """A reward per response; a row that can't be scored fails with its cause and never becomes 0."""


class Cost(ABC):
    """Safe-RLHF's cost model: a positive cost is unsafe."""

    @stage(protocol="DP_PROTO", balance="tokens")
    @abstractmethod
    def score(self, rollouts: Rollouts) -> Costs | Partial[Costs]:
        """A cost per response."""


ROLES: dict[str, type] = {
    "policy": Policy,
    "critic": Critic,
    "cost_critic": Critic,
    "reference": Reference,
    "reward": Reward,
    "cost": Cost,
}
