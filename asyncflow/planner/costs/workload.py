"""The workload of one step: the number and lengths of samples, and the calls of each model on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import NormalDist

import msgspec

from asyncflow.dataflow.graph import Dataflow
from asyncflow.planner.costs.devices import Refused
from asyncflow.planner.costs.shapes import Shape

QUANTILES = 64  # points that represent a continuous distribution


class Lengths(msgspec.Struct, frozen=True):
    """A distribution of lengths in tokens, as equally likely values in rising order."""

    tokens: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tokens or self.tokens[0] < 1 or any(a > b for a, b in pairwise(self.tokens)):
            raise ValueError("lengths must be one value or more, rising, of at least 1 token")

    @classmethod
    def fixed(cls, tokens: float) -> Lengths:
        """All lengths equal."""
        return cls((float(tokens),))

    @classmethod
    def measured(cls, lengths: Sequence[float]) -> Lengths:
        """Measured lengths; more than QUANTILES are reduced to that many, evenly spaced in rank, with the longest."""
        tokens = sorted(map(float, lengths))
        if len(tokens) > QUANTILES:
            tokens = [tokens[i * (len(tokens) - 1) // (QUANTILES - 1)] for i in range(QUANTILES)]
        return cls(tuple(tokens))

    @classmethod
    def long_tailed(cls, median: float, sigma: float, limit: float) -> Lengths:
        """A log-normal distribution, cut at the token limit, sampled at the midpoints of equal quantiles."""
        normal = NormalDist()
        quantiles = (normal.inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES))
        return cls(tuple(min(limit, max(1.0, median * 2.718281828459045 ** (sigma * z))) for z in quantiles))

    def under(self, limit: float, before: float) -> Lengths:
        """Predict the lengths under another token limit, from lengths that were measured under the limit `before`.

        Truncated samples continue with a constant hazard: each further token ends the sample with the probability
        measured so far (ended samples / tokens).
        """
        ended = [length for length in self.tokens if length < before]
        hazard, cut = len(ended) / sum(self.tokens), len(self.tokens) - len(ended)
        middles = ((i + 0.5) / cut for i in range(cut))
        further = (math.log(1 - share) / math.log(1 - hazard) if hazard else math.inf for share in middles)
        return Lengths(tuple(min(float(limit), length) for length in (*ended, *(before + f for f in further))))

    @property
    def mean(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    @property
    def maximum(self) -> float:
        return self.tokens[-1]

    def expected_maximum(self, samples: float) -> float:
        """The expected maximum of independent samples: the straggler that a batch waits for."""
        count = len(self.tokens)
        return sum(
            value * (((i + 1) / count) ** samples - (i / count) ** samples) for i, value in enumerate(self.tokens)
        )


class Workload(msgspec.Struct, frozen=True):
    """The data of one step, and its division for training and generation."""

    prompts_per_step: int
    prompt: Lengths
    response: Lengths
    samples_per_prompt: int = 1
    mini_batches: int = 1  # optimizer steps in each pass over the batch
    epochs: int = 1
    staleness: int = 0  # maximum age of a sample in versions; 0 is synchronous
    micro_batch_tokens: int = 8192
    running_sequences: int = 256  # maximum that one engine decodes together, if memory allows

    def __post_init__(self) -> None:
        for field in ("prompts_per_step", "samples_per_prompt", "mini_batches", "epochs", "running_sequences"):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"workload.{field} is {value}, but must be at least 1")
        if self.staleness < 0:
            raise ValueError(f"workload.staleness is {self.staleness} versions, but must be at least 0")

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def sample_tokens(self) -> float:
        """Mean tokens of a sample, prompt and response."""
        return self.prompt.mean + self.response.mean

    @property
    def longest_sample(self) -> float:
        """Tokens of the longest sample that can occur."""
        return self.prompt.maximum + self.response.maximum


class ModelWork(msgspec.Struct, frozen=True):
    """A model, and the calls on the whole batch that a step makes of it."""

    role: str
    shape: Shape
    generates: int = 0
    forwards: int = 0
    trains: bool = False
    receives_from: str = ""  # role that publishes its weights to it: set for a separate generator
    rereads: bool = False  # an extra forward pass over the batch before several optimizer steps

    @property
    def hybrid(self) -> bool:
        """Whether its ranks both train and generate."""
        return self.trains and self.generates > 0

    @property
    def label(self) -> str:
        return f"{self.role} ({self.shape.name})"


def work_of(dataflow: Dataflow, shapes: Mapping[str, Shape]) -> list[ModelWork]:
    """The models of an algorithm and their calls. Services without a shape run no model (rules, advantages).

    Raises Refused if the policy has no shape.
    """
    if "policy" not in shapes:
        raise Refused(f"no shape for the policy; shapes are given for {', '.join(shapes) or 'no role'}")
    works = []
    for role in (service for service in dataflow.services if service in shapes):
        stages = dataflow.stages_of(role)
        generates, trains = sum(s.generates for s in stages), sum(s.is_sink for s in stages)
        forwards = len(stages) - generates - trains
        works.append(ModelWork(role, shapes[role], generates, forwards, trains > 0, rereads=role == "policy"))
    return works


def with_separate_generator(models: Sequence[ModelWork]) -> list[ModelWork]:
    """The same work with generation moved to a separate model, which loads the policy's weights."""
    split = []
    for model in models:
        if model.hybrid:
            split.append(ModelWork("generator", model.shape, generates=model.generates, receives_from=model.role))
            model = msgspec.structs.replace(model, generates=0)  # noqa: PLW2901
        split.append(model)
    return split


def ppo(policy: Shape, critic: Shape | None = None) -> list[ModelWork]:
    """The four models of PPO as in the HybridFlow paper: one shape for policy and reference, one for critic and reward.

    The loss uses the log-probs of generation, so the policy makes no extra forward pass.
    """
    scorer = (critic or policy).scoring()
    return [
        ModelWork("policy", policy, generates=1, trains=True),
        ModelWork("critic", scorer, forwards=1, trains=True),
        ModelWork("reference", policy, forwards=1),
        ModelWork("reward", scorer, forwards=1),
    ]
