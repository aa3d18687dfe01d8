"""The policy on many ranks: its answers, step, checkpoint and publication are those of one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from protocols.data.columns import take
from protocols.data.jagged import Jagged
from protocols.data.messages import Experience, LogProbs, Metrics
from protocols.layout.topology import Topology
from protocols.layout.transfer import protocol
from protocols.weights import Version, WeightManifest
from tests import tiny
from tests.workers.batches import VOCABULARY, experience, rollouts
from tests.workers.ranks import RankFailed
from workers.data.pretraining import PretrainingText
from workers.data.token_rows import TokenRows
from workers.parallel.sharding import Sharding
from workers.roles.policy import PolicyWorker
from workers.settings import Generation, Loss, Model, Optimizer
from workers.training.mini_batches import mini_batches, replica_mini_batches
from workers.training.models import load_causal

TOPOLOGIES = ["1-1-2", "1-2-1", "2-1-1", "1-2-2"]
ROWS = 7  # four and three on two replicas
GENERATION = Generation(engine="torch", temperature=0.8)
# Adam turns the rounding of a gradient near zero into a full step; a large epsilon makes it behave like SGD.
OPTIMIZER = Optimizer(epsilon=1.0, gradient_clip=0.1, warmup_steps=3)
RATE = 0.1
PLAIN = Loss(tokens_per_micro_batch=40)
RICH = Loss(
    policy="gspo",
    epochs=2,
    mini_batches=2,
    aggregation="sequence-mean-token-mean",
    correction="tis",
    kl_coefficient=0.1,
    entropy_coefficient=0.01,
    tokens_per_micro_batch=40,
)


class Outcome(NamedTuple):
    """The results of a step on one rank or in one process."""

    log_probs: LogProbs | None  # before the step
    metrics: Metrics | None
    published: tuple[WeightManifest, np.ndarray] | None  # after it


def model_at(folder: str) -> Model:
    return Model(path=folder, learning_rate=RATE)


@cache
def alone(folder: str, rows: int, loss: Loss) -> Outcome:
    """The step on one device."""
    worker, data = PolicyWorker(model_at(folder), loss, OPTIMIZER, GENERATION, seed=3), experience(rows)
    return Outcome(worker.log_probs(rollouts(data)), worker.update(data), worker.snapshot(Version(0, 1)))


# --- what every rank runs


def parallel(topology: Topology, folder: str, loss: Loss = PLAIN) -> PolicyWorker:
    return PolicyWorker(model_at(folder), loss, OPTIMIZER, GENERATION, seed=3, sharding=Sharding(topology))


def own_rows(policy: PolicyWorker, rows: int) -> Experience:
    """The rows that a service would send to this rank, perhaps none."""
    shares = protocol("METRIC").distribute(rows=rows, topology=policy.model.topology)
    return take(experience(rows), shares[policy.model.rank])


def step(topology: Topology, folder: str, rows: int, loss: Loss) -> Outcome:
    policy = parallel(topology, folder, loss)
    data = own_rows(policy, rows)
    return Outcome(policy.log_probs(rollouts(data)), policy.update(data), policy.snapshot(Version(0, 1)))


def published(topology: Topology, folder: str, exported: str) -> tuple[WeightManifest, np.ndarray] | None:
    policy = parallel(topology, folder)
    policy.export(exported)
    return policy.snapshot(Version(0, 0))


def saved(topology: Topology, folder: str, checkpoint: str) -> None:
    policy = parallel(topology, folder)
    policy.update(own_rows(policy, ROWS))
    policy.save(checkpoint)


def load(topology: Topology, folder: str, checkpoint: str) -> None:
    parallel(topology, folder).load(checkpoint)


# --- the ranks


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A tied and an untied policy whose vocabulary is divisible by the tensor ranks, with a tokenizer."""
    return {
        tied: str(tiny.make_policy(tmp_path_factory.mktemp("policy"), tied=tied, vocabulary=VOCABULARY))
        for tied in (True, False)
    }


def together(outcomes: list[Outcome], topology: Topology) -> Outcome:
    """The service's view: combined metrics, collected log-probs, and rank 0's publication."""
    collected = protocol("METRIC").collect(topology)
    for rank, outcome in enumerate(outcomes):
        assert (outcome.metrics is not None) == (rank in collected)
        assert (outcome.published is not None) == (rank == 0)
    metrics = protocol("METRIC").combine([m for rank in collected if (m := outcomes[rank].metrics)])
    answers = [a for rank in collected if (a := outcomes[rank].log_probs)]
    log_probs = None
    if answers:
        ids = np.concatenate([a.sample_ids for a in answers])
        log_probs = LogProbs(sample_ids=ids, log_probs=Jagged.concat([a.log_probs for a in answers]))
    return Outcome(log_probs, metrics, outcomes[0].published)


def largest_difference(ours: Outcome, theirs: Outcome) -> float:
    """The largest difference over all published weights, which must have the same names, offsets and shapes."""
    assert ours.published and theirs.published
    (manifest, buffer), (expected, whole) = ours.published, theirs.published
    assert [(e.name, e.shape, e.start) for e in manifest.tensors] == [
        (e.name, e.shape, e.start) for e in expected.tensors
    ]
    return float(np.abs(buffer.view(np.float32) - whole.view(np.float32)).max())


def assert_same_step(ours: Outcome, theirs: Outcome) -> None:
    assert largest_difference(ours, theirs) < 1e-6
    assert ours.metrics and theirs.metrics
    assert ours.metrics.values == pytest.approx(theirs.metrics.values, rel=2e-4, abs=2e-6)


# --- the same step


@pytest.mark.parametrize("topology", [*TOPOLOGIES, "2-2-1", "2-2-2"])
def test_a_step_gives_the_weights_and_metrics_of_one_process(worlds, folders, topology: str):
    at = Topology.parse(topology)
    ours = together(worlds[at.world_size].call(step, at, folders[True], ROWS, PLAIN), at)
    theirs = alone(folders[True], ROWS, PLAIN)
    assert_same_step(ours, theirs)
    assert ours.log_probs and theirs.log_probs
    np.testing.assert_array_equal(ours.log_probs.sample_ids, theirs.log_probs.sample_ids)
    np.testing.assert_array_equal(ours.log_probs.log_probs.offsets, theirs.log_probs.log_probs.offsets)
    np.testing.assert_allclose(ours.log_probs.log_probs.values, theirs.log_probs.log_probs.values, atol=1e-5)


@pytest.mark.parametrize(("topology", "tied"), [("1-2-2", True), ("2-1-2", False)])
def test_epochs_of_mini_batches_with_every_part_of_the_loss_do_too(worlds, folders, topology: str, tied: bool):
    at = Topology.parse(topology)
    ours = together(worlds[4].call(step, at, folders[tied], ROWS, RICH), at)
    assert_same_step(ours, alone(folders[tied], ROWS, RICH))


@pytest.mark.parametrize("loss", [PLAIN, RICH], ids=["plain", "rich"])
def test_a_replica_without_rows_takes_part(worlds, folders, loss: Loss):
    at = Topology(1, 2, 2)
    assert_same_step(together(worlds[4].call(step, at, folders[True], 1, loss), at), alone(folders[True], 1, loss))


def test_mini_batches_of_replicas_are_those_of_all_rows():
    loss, whole, sizes = Loss(epochs=2, mini_batches=3), experience(ROWS), [4, 0, 3]
    cuts = [take(whole, rows) for rows in (range(4), [], range(4, 7))]
    replicas = [replica_mini_batches(cut, sizes, i, loss, seed=5) for i, cut in enumerate(cuts)]
    for expected, *own in zip(mini_batches(whole, loss, seed=5), *replicas, strict=True):
        assert set(expected.sample_ids.tolist()) == {sample for part in own for sample in part.sample_ids.tolist()}


# --- publications and exports


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("topology", ["1-2-2", "2-2-1"])
def test_a_publication_is_byte_for_byte_that_of_one_process(worlds, folders, tmp_path: Path, topology: str, tied: bool):
    manifest, buffer = worlds[4].call(published, Topology.parse(topology), folders[tied], str(tmp_path))[0]
    worker = PolicyWorker(model_at(folders[tied]), PLAIN, OPTIMIZER, GENERATION, seed=3)
    expected, whole = worker.snapshot(Version(0, 0))
    assert manifest.tensors == expected.tensors
    assert buffer.tobytes() == whole.tobytes()
    assert manifest.probe and expected.probe
    assert manifest.probe.tokens == expected.probe.tokens
    np.testing.assert_allclose(manifest.probe.log_probs, expected.probe.log_probs, atol=1e-5)
    exported, given = load_causal(tmp_path), load_causal(folders[tied])
    tokens = torch.arange(VOCABULARY).unsqueeze(0)
    assert torch.equal(exported(tokens).logits, given(tokens).logits)
    assert (tmp_path / "tokenizer.json").read_bytes() == (Path(folders[tied]) / "tokenizer.json").read_bytes()


# --- checkpoints


@pytest.fixture(scope="module")
def checkpoint(worlds, folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that 1-2-2 saved after a step."""
    folder = tmp_path_factory.mktemp("checkpoint")
    worlds[4].call(saved, Topology(1, 2, 2), folders[True], str(folder))
    return folder


SHARDS = [f"shard-{writer:05}-model-00001-of-00001.safetensors" for writer in range(2)]


def test_one_replica_writes_the_checkpoint(checkpoint: Path):
    assert sorted(path.name for path in checkpoint.iterdir()) == [*SHARDS, "trainer.json"]


def test_another_models_checkpoint_is_refused(folders, checkpoint: Path):
    with pytest.raises(ValueError, match=r"tensors differ from the model's: \['lm_head\.weight'\]"):
        load(Topology(), folders[False], str(checkpoint))


def test_where_one_rank_cannot_read_none_loads(worlds, folders, checkpoint: Path, tmp_path: Path):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / SHARDS[1]).write_bytes(b"torn")
    with pytest.raises(RankFailed) as failed:
        worlds[2].call(load, Topology(1, 2, 1), folders[True], str(tmp_path))
    assert f"{SHARDS[1]}: this part of the checkpoint can't be read" in str(failed.value)


# --- a pretraining text beside the rows


def text_step(topology: Topology, folder: str, rows: int, loss: Loss) -> Outcome:
    policy = PolicyWorker(
        model_at(folder), loss, OPTIMIZER, GENERATION, 3, pretraining_text(), sharding=Sharding(topology)
    )
    metrics = policy.update(own_rows(policy, rows))
    return Outcome(None, metrics, policy.snapshot(Version(0, 1)))


def pretraining_text() -> PretrainingText:
    data = experience(9)
    return PretrainingText(TokenRows(data.prompts, data.responses), rows=3, seed=5)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_step_with_a_pretraining_text_is_that_of_one_process(worlds, folders, topology: str):
    """The text has three rows per optimizer step, of which a replica gets one or two."""
    loss = msgspec.structs.replace(RICH, ptx_coefficient=0.5)
    at = Topology.parse(topology)
    ours = together(worlds[at.world_size].call(text_step, at, folders[True], ROWS, loss), at)
    worker = PolicyWorker(model_at(folders[True]), loss, OPTIMIZER, GENERATION, 3, pretraining_text())
    metrics = worker.update(experience(ROWS))
    assert metrics.values["ptx_loss"] > 0
    assert_same_step(ours, Outcome(None, metrics, worker.snapshot(Version(0, 1))))
