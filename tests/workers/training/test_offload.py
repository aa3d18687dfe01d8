"""Offloading moves a model's complete state to the host; after reloading, training continues as without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from tests import tiny
from tests.workers.batches import VOCABULARY, experience, rollouts
from workers.roles.cost import CostWorker
from workers.roles.critic import CriticWorker
from workers.roles.reference import ReferenceWorker
from workers.roles.reward import RewardWorker
from workers.settings import Generation, Loss, Model, Optimizer
from workers.training.offload import HOST, Copy, Offloader, relocated

DEVICE = torch.device("cuda", 0)  # makes the offloader move state; no tensor is really on it


def elsewhere(tensor: Tensor) -> Tensor:
    """The same values in another storage. The old storage is freed, so that its further use fails."""
    copy = tensor.clone()
    storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
    if storage.resizable():  # a tensor that safetensors has read is not
        storage.resize_(0)
    return copy


# --- when state moves


def counted() -> tuple[Offloader, list[Copy]]:
    """The offloader of a model of 12 bytes, and a record of its copies."""
    asked: list[Copy] = []
    return Offloader(DEVICE, lambda copy: asked.append(copy) or 12), asked


def test_who_is_there_or_gone_already_moves_nothing():
    offloader, asked = counted()
    assert offloader.onload() == 0
    assert [offloader.offload(), offloader.offload()] == [12, 0]
    assert [offloader.onload(), offloader.onload()] == [12, 0]
    assert len(asked) == 2


def test_on_a_cpu_nothing_moves():
    def refuse(copy: Copy) -> int:
        raise AssertionError("it moves")

    offloader = Offloader(HOST, refuse)
    assert (offloader.moves, offloader.offload(), offloader.onload()) == (False, 0, 0)


# --- which state moves


def test_tensors_keep_their_identity_and_change_their_storage():
    torch.manual_seed(0)
    stayed, moved = nn.Linear(3, 2), nn.Linear(3, 2)
    moved.load_state_dict(stayed.state_dict())
    before = [parameter.data_ptr() for parameter in moved.parameters()]
    kept = list(moved.parameters())
    assert relocated(moved.parameters(), elsewhere) == 4 * (2 * 3 + 2)
    assert all(now is then for now, then in zip(moved.parameters(), kept, strict=True))
    assert not {*before} & {parameter.data_ptr() for parameter in moved.parameters()}
    assert torch.equal(moved(torch.ones(1, 3)), stayed(torch.ones(1, 3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a reward model."""
    return saved(Qwen2ForSequenceClassification, tmp_path_factory.mktemp("reward"))


def saved(kind: type[PreTrainedModel], path: Path) -> str:
    config = tiny.config()
    config.vocab_size, config.num_labels, config.pad_token_id = VOCABULARY, 1, 0
    torch.manual_seed(0)
    kind(config).save_pretrained(path)
    return str(path)


def test_a_critic_takes_its_weights_and_moments_along(folder: str):
    loss, optimizer, model = Loss(), Optimizer(), Model(path=folder, learning_rate=0.1)
    stayed, moved = (CriticWorker(model, loss, optimizer, seed=3) for _ in range(2))
    weights = sum(tensor.nbytes for tensor in moved.model.parameters.values())
    assert moved.trained.relocate(elsewhere) == weights, "no moments yet"
    for _ in range(2):
        stayed.update(experience(5))
        moved.update(experience(5))
        assert moved.trained.relocate(elsewhere) == 3 * weights
    for name, tensor in stayed.model.parameters.items():
        assert torch.equal(tensor, moved.model.parameters[name]), name


@pytest.mark.parametrize("role", [RewardWorker, CostWorker])
def test_a_reward_or_cost_model_scores_as_before(folder: str, role: type[RewardWorker | CostWorker]):
    worker, rows = role(Model(path=folder), 200), rollouts(experience(5))
    before = worker.score(rows)
    assert before
    assert worker.models[0].relocate(elsewhere) == sum(tensor.nbytes for tensor in worker.models[0].parameters.values())
    after = worker.score(rows)
    assert after
    for column in ("scores", "costs"):
        np.testing.assert_array_equal(getattr(after.batch, column, 0), getattr(before.batch, column, 0))


def test_a_reference_answers_as_before(tmp_path: Path):
    model = Model(path=saved(Qwen2ForCausalLM, tmp_path))
    worker = ReferenceWorker(model, Loss(), Generation())
    rows = rollouts(experience(5))
    before = worker.log_probs(rows)
    worker.model.relocate(elsewhere)
    after = worker.log_probs(rows)
    assert before and after
    assert before.log_probs == after.log_probs
