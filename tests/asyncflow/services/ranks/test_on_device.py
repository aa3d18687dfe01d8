"""Every role's model is on the device of its pool, and can be offloaded."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from asyncflow.services.ranks.spec import ModelSettings, ServiceSpec
from asyncflow.services.ranks.worker_factory import build
from protocols.data.messages import Rollouts
from protocols.layout.topology import Topology
from tests import tiny
from tests.asyncflow.services.specs import service, settings_of, stage
from tests.workers.batches import experience, rollouts
from workers.parallel import process_group
from workers.settings import Lora, Model, RewardPart

CARD = torch.device("meta")  # stands for an accelerator: a device of every machine that computes nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_policy(tmp_path_factory.mktemp("policy")))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_reward(tmp_path_factory.mktemp("reward")))


def spec_of(kind: str, model: Model, *fires: str, **changes: Any) -> ServiceSpec:
    stages = [stage(f"{kind}.method#1", fires=each) for each in fires]
    changes = {"accelerated": True} | changes
    return service(kind, *stages, settings=settings_of(kind, model), **changes)


def scorer(model: Model, tokenizer: str) -> ModelSettings:
    return ModelSettings("reward", model, tokenizer_path=tokenizer)


def rows() -> Rollouts:
    batch = rollouts(experience(5))
    return msgspec.structs.replace(
        batch,
        prompts=batch.prompts.with_values(batch.prompts.values % 20),
        responses=batch.responses.with_values(batch.responses.values % 20),
    )


@pytest.mark.parametrize("kind", ["policy", "critic", "cost_critic", "reference", "reward", "cost", "adapters"])
def test_the_model_of_every_role_is_on_it(kind: str, folder: str, reward_model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process_group, "own_device", lambda rank: CARD)
    path = reward_model if kind in ("reward", "cost") else folder
    model = Model(path=path, learning_rate=1e-3, lora=Lora(rank=2 if kind == "adapters" else 0))
    spec = spec_of("policy" if kind == "adapters" else kind, model, "generate" if kind == "adapters" else "rows")
    for accelerated, device in ((True, CARD), (False, torch.device("cpu"))):
        worker = build(msgspec.structs.replace(spec, accelerated=accelerated)).worker
        models = worker.models if kind in ("reward", "cost") else [worker.model]
        assert {p.device.type for model in models for p in model.parameters.values()} == {device.type}
        assert worker.offloader.moves == accelerated


def test_the_models_of_a_mixed_reward_are_on_it_and_its_rules_need_none(
    reward_model: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(process_group, "own_device", lambda rank: CARD)
    rule = RewardPart(name="exact", rule="exact_match")
    mixed, alone = Model(mix=[rule, RewardPart(name="liked", path=reward_model)]), Model(rule="exact_match")
    with_model, without = (
        build(service("reward", accelerated=True, settings=scorer(model, reward_model))) for model in (mixed, alone)
    )
    assert with_model.offloader is not None
    assert with_model.offloader.moves
    assert without.offloader is None
    with_model.close()
    without.close()


@pytest.mark.parametrize("topology", [Topology(1, 1, 1), Topology(1, 1, 2)], ids=str)
def test_a_replica_answers_alike_with_and_without_it(folder: str, topology: Topology):
    spec = spec_of("reference", Model(path=folder), "rows", topology=topology)
    ours, theirs = build(spec), build(msgspec.structs.replace(spec, accelerated=False))
    given, expected = (worker.method("log_probs")(rows()) for worker in (ours, theirs))
    np.testing.assert_allclose(given.log_probs.values, expected.log_probs.values, atol=1e-5)
    for worker in (ours, theirs):
        worker.close()
