"""The critic on many ranks: its values, step and checkpoint are those of one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForTokenClassification

from protocols.data.columns import take
from protocols.data.messages import Experience, Metrics, Values
from protocols.layout.topology import Topology
from protocols.layout.transfer import protocol
from tests import tiny
from tests.workers.batches import VOCABULARY, experience, rollouts
from workers.parallel.sharding import Sharding
from workers.roles.critic import CriticWorker
from workers.settings import Loss, Model, Optimizer
from workers.training.models import load_critic

ROWS = 7
OPTIMIZER = Optimizer(epsilon=1.0, gradient_clip=0.1)  # near SGD: Adam amplifies the rounding of small gradients
LOSS = Loss(epochs=2, mini_batches=2, tokens_per_micro_batch=40)


class Outcome(NamedTuple):
    """One rank's results: values before a step, its metrics, and values after it."""

    before: Values | None
    metrics: Metrics | None
    after: Values | None


@cache
def alone(folder: str, rows: int) -> Outcome:
    worker, data = CriticWorker(Model(path=folder, learning_rate=0.1), LOSS, OPTIMIZER, seed=3), experience(rows)
    return Outcome(worker.values(rollouts(data)), worker.update(data), worker.values(rollouts(data)))


# --- what every rank runs


def parallel(topology: Topology, folder: str) -> CriticWorker:
    return CriticWorker(Model(path=folder, learning_rate=0.1), LOSS, OPTIMIZER, seed=3, sharding=Sharding(topology))


def own_rows(critic: CriticWorker, rows: int) -> Experience:
    """The rows that a service would send to this rank, perhaps none."""
    shares = protocol("METRIC").distribute(rows=rows, topology=critic.model.topology)
    return take(experience(rows), shares[critic.model.rank])


def step(topology: Topology, folder: str, rows: int) -> Outcome:
    critic = parallel(topology, folder)
    data = own_rows(critic, rows)
    return Outcome(critic.values(rollouts(data)), critic.update(data), critic.values(rollouts(data)))


def save_and_export(topology: Topology, folder: str, checkpoint: str, exported: str) -> None:
    critic = parallel(topology, folder)
    critic.update(own_rows(critic, ROWS))
    critic.save(checkpoint)
    critic.export(exported)


# --- the ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = tiny.config()
    config.vocab_size, config.num_labels = VOCABULARY, 1
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("critic"))
    Qwen2ForTokenClassification(config).save_pretrained(path)
    return path


def assert_same_values(ours: list[Values | None], theirs: Values | None, topology: Topology) -> None:
    collected = protocol("3D_PROTO").collect(topology)
    assert [rank for rank, values in enumerate(ours) if values is not None] == sorted(collected)
    answers = [v for rank in collected if (v := ours[rank])]
    assert theirs
    np.testing.assert_array_equal(np.concatenate([a.sample_ids for a in answers]), theirs.sample_ids)
    np.testing.assert_array_equal(np.concatenate([a.versions for a in answers]), theirs.versions)
    values = np.concatenate([a.values.values for a in answers])
    np.testing.assert_allclose(values, theirs.values.values, atol=1e-5)


@pytest.mark.parametrize(("topology", "rows"), [("1-1-2", ROWS), ("2-1-1", ROWS), ("1-2-2", ROWS), ("1-2-2", 1)])
def test_values_and_step_are_those_of_one_process(worlds, folder: str, topology: str, rows: int):
    at = Topology.parse(topology)
    ours, theirs = worlds[at.world_size].call(step, at, folder, rows), alone(folder, rows)
    assert_same_values([outcome.before for outcome in ours], theirs.before, at)
    assert_same_values([outcome.after for outcome in ours], theirs.after, at)
    metrics = protocol("METRIC").combine([m for outcome in ours if (m := outcome.metrics)])
    assert theirs.metrics
    assert metrics.values == pytest.approx(theirs.metrics.values, rel=1e-4)


def test_a_checkpoint_and_an_export_hold_what_was_trained(worlds, folder: str, tmp_path: Path):
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    checkpoint.mkdir()
    worlds[4].call(save_and_export, Topology(2, 2, 1), folder, str(checkpoint), str(exported))
    critic = CriticWorker(Model(path=folder, learning_rate=0.1), LOSS, OPTIMIZER, seed=3)
    critic.load(str(checkpoint))
    values, theirs = critic.values(rollouts(experience(ROWS))), alone(folder, ROWS).after
    assert values and theirs
    assert values.versions.tolist() == [1] * ROWS
    np.testing.assert_allclose(values.values.values, theirs.values.values, atol=1e-5)
    loaded: dict[str, Tensor] = dict(load_critic(exported).named_parameters())
    trained = dict(critic.model.module.named_parameters())
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())
