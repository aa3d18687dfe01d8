"""An update that one rank's rows make not finite is refused by all ranks, and leaves no trace in any of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from protocols.data.columns import take
from protocols.data.messages import Experience
from protocols.layout.topology import Backend, Topology
from protocols.layout.transfer import protocol
from tests import tiny
from tests.workers.batches import VOCABULARY, experience
from workers.losses.policy import ppo
from workers.losses.tokens import Surrogate, Tokens
from workers.parallel.sharding import Sharding
from workers.roles.policy import PolicyWorker
from workers.settings import Dtype, Generation, Lora, Loss, Model, Optimizer
from workers.training.checkpoint import MOMENTS

ROWS = 7  # four and three on two replicas
SPOILED = (4, 5, 6)  # all rows of the last replica; not all are in the first mini-batch
NO_GRADIENT = 77.0  # an advantage whose token has a finite loss and a gradient of NaN
LORA = Lora(rank=4)


def loss_without_gradient(tokens: Tokens, loss: Loss) -> Surrogate:
    """PPO's loss, but for the tokens with a certain advantage."""
    surrogate, flagged = ppo(tokens, loss), tokens.advantages == NO_GRADIENT
    root = torch.sqrt(torch.where(flagged, tokens.log_probs * 0.0, 1.0))  # its derivative is infinity times 0
    return surrogate._replace(loss=torch.where(flagged, root, surrogate.loss))


class Refusal(NamedTuple):
    """A refused update, on one rank."""

    said: str
    optimizer_steps: int  # taken before it was refused
    unchanged: bool


def state_of(policy: PolicyWorker) -> list[Tensor]:
    """Copies of all that an update changes on this rank: weights, masters, moments and AdamW's counters."""
    trained, model = policy.trained, policy.model
    kept = [state for p in model.optimized.values() if (state := trained._optimizer.state.get(p))]
    moments = [state[key] for state in kept for key in (*MOMENTS, "step")]
    counters = torch.tensor([trained.version, trained._updates])
    weights = [*model.parameters.values(), *model.optimized.values()]
    return [tensor.detach().clone() for tensor in (*weights, *moments, counters)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def refused(policy: PolicyWorker, data: Experience) -> Refusal:
    before, steps = state_of(policy), list[int]()
    counted = policy.trained._optimizer.register_step_post_hook(lambda *_: steps.append(1))
    try:
        policy.update(data)
        said = ""
    except Exception as error:  # noqa: BLE001 - the test checks it
        said = f"{type(error).__name__}: {error}"
    counted.remove()
    return Refusal(said, len(steps), same(before, state_of(policy)))


def refused_between_two(sharding: Sharding, model: Model, advantage: float) -> tuple[list[Refusal], bool]:
    """The refusals of updates with one spoiled row each, and whether the others are as if there had been none."""
    loss = Loss(
        policy=f"{__name__}:{loss_without_gradient.__name__}", epochs=2, mini_batches=2, tokens_per_micro_batch=40
    )
    policy, other = (
        PolicyWorker(model, loss, Optimizer(warmup_steps=9), Generation(engine="torch"), 3, sharding=sharding)
        for _ in range(2)
    )
    whole = experience(ROWS)
    own = protocol("METRIC").distribute(rows=ROWS, topology=sharding.topology)[policy.model.rank]

    def spoiled(row: int) -> Experience:
        advantages = [np.full_like(a, advantage) if i == row else a for i, a in enumerate(whole.advantages)]
        given = whole.advantages.with_values(np.concatenate(advantages))
        return take(msgspec.structs.replace(whole, advantages=given), own)

    refusals = [refused(policy, spoiled(row)) for row in SPOILED]  # without moments to go back to
    policy.update(take(whole, own))
    refusals += [refused(policy, spoiled(row)) for row in SPOILED[:2]]
    policy.update(take(whole, own))
    for _ in range(2):
        other.update(take(whole, own))
    return refusals, same(state_of(policy), state_of(other))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("policy"), vocabulary=VOCABULARY)


LOSS, GRADIENT = (np.nan, "loss is nan"), (NO_GRADIENT, "gradient norm is nan")
PLACES: list[tuple[Backend, str, Dtype, Lora, tuple[float, str]]] = [
    ("3d", "1-2-2", "float32", Lora(), LOSS),
    ("3d", "2-1-2", "bfloat16", Lora(), GRADIENT),
    ("zero1", "1-1-2", "bfloat16", Lora(), LOSS),
    ("zero2", "1-2-2", "float32", Lora(), GRADIENT),
    ("fsdp", "1-2-2", "float32", Lora(), GRADIENT),
    ("fsdp", "1-1-2", "bfloat16", Lora(), LOSS),
    ("fsdp", "1-1-2", "float32", LORA, GRADIENT),
]
IDS = [f"{backend}-{at}-{dtype}{'-lora' * bool(lora.rank)}-{why[1]}" for backend, at, dtype, lora, why in PLACES]


@pytest.mark.parametrize(("backend", "topology", "dtype", "lora", "spoiled"), PLACES, ids=IDS)
def test_weights_moments_and_counters_of_all_ranks_stay(
    worlds, folder: Path, backend: Backend, topology: str, dtype: Dtype, lora: Lora, spoiled: tuple[float, str]
):
    at, (advantage, why) = Topology.parse(topology), spoiled
    model = Model(str(folder), learning_rate=1e-2, dtype=dtype, lora=lora)
    by_rank = worlds[at.world_size].call(refused_between_two, Sharding(at, backend), model, advantage)
    for refusals, as_if_there_had_been_none in by_rank:
        for refusal in refusals:
            assert refusal.said.startswith("StepRefused: policy.update of batch of ")
            assert why in refusal.said
            assert refusal.unchanged
        assert as_if_there_had_been_none
    steps = [[refusal.optimizer_steps for refusal in refusals] for refusals, _ in by_rank]
    assert all(taken == steps[0] for taken in steps)
    assert {0, 1} == set(steps[0]), "some were refused at their first optimizer step, some had to be taken back"
