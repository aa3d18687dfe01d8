"""Policy and critic on any backend: the answers, steps, checkpoints and publications are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from protocols.data.columns import take
from protocols.data.messages import Experience, Rollouts
from protocols.layout.topology import Backend, Topology, generation_grouping
from protocols.layout.transfer import protocol
from protocols.roles import Sampling
from protocols.weights import Version, WeightManifest
from tests import tiny
from tests.workers.batches import experience, rollouts
from tests.workers.roles.test_parallel_policy import (
    GENERATION,
    OPTIMIZER,
    PLAIN,
    RICH,
    ROWS,
    Outcome,
    alone,
    assert_same_step,
    folders,  # noqa: F401 - a fixture
    model_at,
    own_rows,
    together,
)
from tests.workers.training.test_offload import elsewhere
from workers.parallel.sharding import Sharding
from workers.roles.policy import PolicyWorker
from workers.settings import Loss

BACKENDS: list[Backend] = ["zero1", "zero2", "fsdp"]
SAMPLING = Sampling(max_tokens=10, temperature=0.8)
TEXTS = ["12+34=", "7*", "what?", "a", "9-9="]


def policy_of(
    backend: Backend, topology: Topology, folder: str, loss: Loss = PLAIN, generate: str = ""
) -> PolicyWorker:
    grouping = generation_grouping(backend, topology, Topology.parse(generate)) if generate else None
    return PolicyWorker(
        model_at(folder), loss, OPTIMIZER, GENERATION, 3, sharding=Sharding(topology, backend), grouping=grouping
    )


# --- what every rank runs


def step(backend: Backend, topology: Topology, folder: str, rows: int, loss: Loss) -> Outcome:
    policy = policy_of(backend, topology, folder, loss)
    data = own_rows(policy, rows)
    return Outcome(policy.log_probs(rollouts(data)), policy.update(data), policy.snapshot(Version(0, 1)))


def published(backend: Backend, topology: Topology, folder: str) -> tuple[WeightManifest, np.ndarray] | None:
    return policy_of(backend, topology, folder).snapshot(Version(0, 0))


def carried_on(backend: Backend, topology: Topology, folder: str, came: str, copy: str, goes: str) -> Outcome:
    policy = policy_of(backend, topology, folder)
    return carry_on(policy, lambda rows: own_rows(policy, rows), came, copy, goes)


def carry_on(policy: PolicyWorker, deal: Callable[[int], Experience], came: str, copy: str, goes: str) -> Outcome:
    """Take a step, load a checkpoint, which undoes it, and save a copy of that; then take a step and save again."""
    policy.update(deal(1))
    policy.load(came)
    policy.save(copy)
    metrics = policy.update(deal(ROWS))
    policy.save(goes)
    return Outcome(None, metrics, policy.snapshot(Version(0, policy.trained.version)))


def loop(backend: Backend, topology: Topology, folder: str, generate: str) -> list[Rollouts | None]:
    """The rows that this rank generates before and after a step."""
    policy = policy_of(backend, topology, folder, generate=generate)
    assert policy.hybrid
    grouping, rows, batches = policy.hybrid.grouping, tiny.make_prompts(TEXTS), []
    shares = protocol("3D_ALL_MICRO_DP").distribute(len(rows), grouping.topology, generation=grouping)
    for _ in range(2):
        answer = policy.generate(take(rows, shares[policy.model.rank]), sampling=SAMPLING)
        batches.append(answer.batch if answer else None)
        policy.update(own_rows(policy, ROWS))
    return batches


def moved_about(backend: Backend, topology: Topology, folder: str, generate: str, moves: bool) -> tuple[Any, ...]:
    """What this rank generates and publishes, with state that changes its storage after each call or not."""
    policy, made, weights = policy_of(backend, topology, folder, RICH, generate), [], 0
    assert policy.hybrid
    grouping, rows = policy.hybrid.grouping, tiny.make_prompts(TEXTS)
    shares = protocol("3D_ALL_MICRO_DP").distribute(len(rows), grouping.topology, generation=grouping)
    for _ in range(2):
        answer = policy.generate(take(rows, shares[policy.model.rank]), sampling=SAMPLING)
        made.append(answer.batch.responses if answer else None)
        weights = policy.trained.relocate(elsewhere) if moves else 0
        policy.update(own_rows(policy, ROWS))
        if moves:
            policy.trained.relocate(elsewhere)
        published = policy.snapshot(Version(0, 1))
        made.append(published[1].tobytes() if published else None)
    return made, weights, sum(tensor.nbytes for tensor in policy.model.parameters.values())


# --- the same as one process


@pytest.mark.parametrize(("topology", "loss"), [("1-1-2", PLAIN), ("1-2-2", RICH)], ids=["plain", "rich"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_gives_the_weights_and_metrics_of_one_process(worlds, folders, backend, topology: str, loss: Loss):  # noqa: F811
    at = Topology.parse(topology)
    ours = together(worlds[at.world_size].call(step, backend, at, folders[True], ROWS, loss), at)
    theirs = alone(folders[True], ROWS, loss)
    assert_same_step(ours, theirs)
    assert ours.log_probs and theirs.log_probs
    np.testing.assert_allclose(ours.log_probs.log_probs.values, theirs.log_probs.log_probs.values, atol=1e-5)


def test_a_publication_of_sharded_ranks_is_byte_for_byte_that_of_one_process(worlds, folders):  # noqa: F811
    manifest, buffer = worlds[4].call(published, "fsdp", Topology(1, 2, 2), folders[False])[0]
    worker = PolicyWorker(model_at(folders[False]), PLAIN, OPTIMIZER, GENERATION, seed=3)
    expected, whole = worker.snapshot(Version(0, 0))
    assert manifest.tensors == expected.tensors
    assert buffer.tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("backend", "topology", "generate"),
    [("3d", "1-2-2", "1-1"), ("zero1", "1-1-2", "1-1"), ("zero2", "1-2-2", "1-2"), ("fsdp", "1-1-4", "1-2")],
)
def test_a_policy_whose_state_moves_between_calls_is_the_one_that_stays(
    worlds,
    folders,  # noqa: F811
    backend: Backend,
    topology: str,
    generate: str,
):
    at = Topology.parse(topology)
    stays, moves = (
        worlds[at.world_size].call(moved_about, backend, at, folders[True], generate, moves) for moves in (False, True)
    )
    moments = {"3d": 2.0, "fsdp": 2.0}.get(backend, 2 / at.dp)  # as shares of the weights that a rank holds
    for (made, _, _), (expected, moved, weights) in zip(stays, moves, strict=True):
        assert made == expected
        assert moved == pytest.approx((1 + moments) * weights, rel=0.01)


# --- checkpoints are independent of the backend

JOURNEY: list[tuple[Backend, str]] = [
    ("3d", "1-2-2"),
    ("3d", "2-1-1"),
    ("fsdp", "1-1-4"),
    ("zero2", "1-1-2"),
    ("zero1", "1-2-2"),
    ("fsdp", "1-2-2"),
    ("3d", "2-2-1"),
]


def alone_from(folder: str, came: Path, at: Path) -> tuple[Outcome, dict[str, Tensor]]:
    """One process's step from a checkpoint, and all tensors of that checkpoint as it reads them."""
    copy, goes = at / "copy", at / "goes"
    for new in (copy, goes):
        new.mkdir(parents=True)
    worker = PolicyWorker(model_at(folder), PLAIN, OPTIMIZER, GENERATION, seed=3)
    outcome = carry_on(worker, experience, str(came), str(copy), str(goes))
    (tensors,) = copy.glob("*.safetensors")
    return outcome, load_file(tensors)


@pytest.mark.parametrize(("tied", "journey"), [(True, JOURNEY), (False, JOURNEY[1:3])], ids=["tied", "untied"])
def test_a_checkpoint_goes_from_one_process_through_every_backend_and_back(
    worlds,
    folders,  # noqa: F811
    tmp_path: Path,
    tied: bool,
    journey: list[tuple[Backend, str]],
):
    """At every stop weights and moments are bitwise unchanged, and the next step is that of one process."""
    start = tmp_path / "start"
    start.mkdir()
    worker = PolicyWorker(model_at(folders[tied]), PLAIN, OPTIMIZER, GENERATION, seed=3)
    worker.update(experience(3))
    worker.save(str(start))
    came = start
    for number, (backend, topology) in enumerate(journey):
        at, here = Topology.parse(topology), tmp_path / str(number)
        straight, state = alone_from(folders[tied], came, here / "alone")
        copy, goes = here / "copy", here / "goes"
        for new in (copy, goes):
            new.mkdir()
        arguments = (backend, at, folders[tied], str(came), str(copy), str(goes))
        again = together(worlds[at.world_size].call(carried_on, *arguments), at)
        assert_same_step(again, straight)
        _, copied = alone_from(folders[tied], copy, here / "alone again")
        assert copied.keys() == state.keys()
        assert all(torch.equal(copied[name], tensor) for name, tensor in state.items())
        came = goes
    assert alone_from(folders[tied], came, tmp_path / "end")[0].published


@pytest.mark.parametrize(("backend", "topology", "generate"), [("fsdp", "1-1-4", "1-2"), ("zero2", "1-2-2", "1-1")])
def test_it_generates_the_rows_of_one_process(worlds, folders, backend, topology: str, generate: str):  # noqa: F811
    at = Topology.parse(topology)
    grouping = generation_grouping(backend, at, Topology.parse(generate))
    ranks = worlds[4].call(loop, backend, at, folders[True], generate)
    worker = PolicyWorker(model_at(folders[True]), PLAIN, OPTIMIZER, GENERATION, seed=3)
    collected = protocol("3D_ALL_MICRO_DP").collect(grouping.topology, generation=grouping)
    for turn in range(2):
        theirs = worker.generate(tiny.make_prompts(TEXTS), sampling=SAMPLING).batch
        answers = [batch for rank in collected if (batch := ranks[rank][turn]) is not None]
        np.testing.assert_array_equal(np.concatenate([a.sample_ids for a in answers]), theirs.sample_ids)
        np.testing.assert_array_equal(np.concatenate([a.responses.values for a in answers]), theirs.responses.values)
        worker.update(experience(ROWS))
