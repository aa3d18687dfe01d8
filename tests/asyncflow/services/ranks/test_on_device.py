"""A model that works alone computes on its pool's accelerator where there is one, and leaves it like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from asyncflow.services.ranks.parallel_workplace import on_device
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.ranks.worker_factory import build
from protocols.layout.topology import Topology
from tests import tiny
from tests.asyncflow.services.specs import service, settings_of, stage
from tests.workers.batches import experience, rollouts
from workers.settings import Lora, Model, RewardPart


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_policy(tmp_path_factory.mktemp("policy")))


def spec_of(kind: str, model: Model, *fires: str, **changes: Any) -> ServiceSpec:
    stages = [stage(f"{kind}.method#1", fires=each) for each in fires]
    return service(kind, *stages, accelerated=True, settings=settings_of(kind, model), **changes)


@pytest.mark.parametrize("kind", ["policy", "critic", "cost_critic", "reference", "reward", "cost"])
def test_a_model_of_every_role_does(kind: str, folder: str):
    spec = spec_of(kind, Model(path=folder), "rows")
    assert on_device(spec)
    assert not on_device(msgspec.structs.replace(spec, accelerated=False)), "its pool has none"


def test_what_no_other_class_can_do_keeps_to_the_cpu(folder: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for kind, model, fires in [
        ("reward", Model(rule="exact_match"), "rows"),
        ("reward", Model(mix=[RewardPart(name="exact", rule="exact_match")]), "rows"),
        ("policy", Model(path=folder, lora=Lora(rank=2)), "rows"),
        ("policy", Model(path=folder), "generate"),
        ("generator", Model(path=folder), "generate"),
        ("critic", Model(path=str(tmp_path)), "rows"),
        ("advantage", Model(), "closed"),
    ]:
        assert not on_device(spec_of(kind, model, fires)), (kind, model, fires)


@pytest.mark.parametrize("topology", [Topology(1, 1, 1), Topology(1, 1, 2)], ids=str)
def test_it_answers_as_the_class_for_one_process_and_can_leave(folder: str, topology: Topology):
    spec = spec_of("reference", Model(path=folder), "rows", topology=topology)
    rows = rollouts(experience(5))
    rows = msgspec.structs.replace(
        rows,
        prompts=rows.prompts.with_values(rows.prompts.values % 20),
        responses=rows.responses.with_values(rows.responses.values % 20),
    )
    ours, theirs = build(spec), build(msgspec.structs.replace(spec, accelerated=False))
    assert ours.residence is not None
    assert theirs.residence is None
    given, expected = (place.method("log_probs")(rows) for place in (ours, theirs))
    np.testing.assert_allclose(given.log_probs.values, expected.log_probs.values, atol=1e-5)
    for place in (ours, theirs):
        place.close()
