"""Ranks that share a model, as processes on gloo: each computes its own rows, and a damaged frame blocks no rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from asyncflow.services.channels.shard_refs import Partitioning, pack, plan_calls, row_refs
from asyncflow.services.ranks.rank import Rank
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.ranks.worker_factory import build
from asyncflow.services.runtime.local_store import LocalStore
from protocols.control.delivery import RankReply
from protocols.control.replies import Done, SnapshotTaken
from protocols.control.requests import SaveState, SwitchLayout, TakeSnapshot, YieldDevices
from protocols.data import codec
from protocols.data.columns import concat, take
from protocols.data.messages import LogProbs, Rollouts
from protocols.layout.topology import Topology
from protocols.weights import Version
from tests import tiny
from tests.asyncflow.services import rows, specs
from tests.workers.batches import VOCABULARY, experience, rollouts
from tests.workers.ranks import Worlds
from workers.parallel.process_group import World, own_device
from workers.roles.reference import ReferenceWorker
from workers.settings import Generation, Loss, Model

ROWS = 7
STAGE = specs.stage("reference.log_probs#1", protocol="3D_PROTO")


def spec(folder: str, kind: str, topology: str) -> ServiceSpec:
    model, generation = Model(path=folder, learning_rate=0.1), Generation(temperature=0.8)
    settings = specs.settings_of(kind, model, generation)
    return specs.service("a", STAGE, topology=Topology.parse(topology), collective=True, settings=settings)


# --- what every rank runs


def rank_of(own: ServiceSpec, number: int) -> Rank:
    world = World(number, own.topology.world_size, own_device(number))
    return Rank(own, build(own, number, world), LocalStore(), None, number)


def log_probs(folder: str, topology: str, torn_for: int) -> tuple[RankReply, list[LogProbs]]:
    """This rank's reply in a firing on two frames, the second of which is damaged for rank `torn_for`."""
    number = torch.distributed.get_rank()
    store, data = LocalStore(), rollouts(experience(ROWS))
    parts = [pack(store, take(data, cut), 0) for cut in (range(4), range(4, ROWS))]
    located = row_refs(parts)
    calls = plan_calls(
        STAGE.name,
        "log_probs",
        Partitioning("3D_PROTO"),
        [sample for sample, _ in located],
        [[place for _, place in located]],
        [Rollouts.schema_id],
        Topology.parse(topology),
        all_ranks=True,
    )
    mine = calls[number]
    frames = [rows.damaged(p) if number == torn_for and p is parts[1].payload else p for p in mine.payloads]
    reply, payloads = rank_of(spec(folder, "reference", topology), number).work(mine.call, frames)
    answers = [codec.decode(payload) for payload in payloads]
    return reply, [answer for answer in answers if isinstance(answer, LogProbs)]


def requests(folder: str, checkpoint: str) -> list[str]:
    """A description of this policy rank's answer to each request."""
    rank = rank_of(spec(folder, "policy", "1-2-1"), torch.distributed.get_rank())
    said = []
    for request in (TakeSnapshot(Version(0, 0)), SaveState(checkpoint, 0), YieldDevices()):
        answer, payloads = rank.answer(request)
        said.append(f"{type(answer.reply).__name__} with {len(payloads)} payloads")
        if isinstance(answer.reply, SnapshotTaken):
            assert payloads[0].nbytes == answer.reply.manifest.total_bytes
        if isinstance(request, YieldDevices):
            assert answer.reply == Done({"moves": 0.0, "bytes": 0.0}), "a CPU's memory is the host's"
    return said


def switched_without_a_layout(folder: str) -> str:
    rank = rank_of(spec(folder, "policy", "1-2-1"), torch.distributed.get_rank())
    try:
        rank.answer(SwitchLayout("generation"))
    except RuntimeError as error:
        return str(error)
    return ""


# --- the process group


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_policy(tmp_path_factory.mktemp("policy"), vocabulary=VOCABULARY))


def test_what_leaves_the_ranks_is_what_one_process_answers(worlds: Worlds, folder: str):
    answers = worlds[4].call(log_probs, folder, "1-2-2", -1)
    assert [len(batches) for _, batches in answers] == [1, 0, 1, 0], "one rank a replica"
    given = concat([batch for _, batches in answers for batch in batches])
    alone = ReferenceWorker(Model(path=folder), Loss(), Generation(temperature=0.8))
    expected = alone.log_probs(rollouts(experience(ROWS)))
    np.testing.assert_array_equal(given.sample_ids, expected.sample_ids)
    np.testing.assert_allclose(given.log_probs.values, expected.log_probs.values, atol=1e-5)


@pytest.mark.parametrize("torn_for", [2, 3], ids=["the rank that answers", "its peer"])
def test_a_frame_that_one_rank_can_not_read_costs_its_rows_and_no_rank_hangs(
    worlds: Worlds, folder: str, torn_for: int
):
    (first, _), _, (second, answers), (peer, _) = worlds[4].call(log_probs, folder, "1-2-2", torn_for)
    assert not first.damaged, "another replica reads other rows"
    assert (second.damaged, second.lost) == (peer.damaged, peer.lost)
    assert [row for damage in second.damaged for row in damage.rows] == [0, 1, 2], "all of its rows were in that frame"
    assert answers == []


def test_all_ranks_do_what_is_asked_and_the_first_has_the_answer(worlds: Worlds, folder: str, tmp_path: Path):
    first, second = worlds[2].call(requests, folder, str(tmp_path))
    assert first == ["SnapshotTaken with 1 payloads", "Done with 0 payloads", "Done with 0 payloads"]
    assert second == ["Done with 0 payloads"] * 3
    shards = [f"shard-{writer:05}-model-00001-of-00001.safetensors" for writer in range(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*shards, "trainer.json"]


def test_a_policy_whose_service_does_not_generate_has_no_layout_to_switch_to(worlds: Worlds, folder: str):
    said = worlds[2].call(switched_without_a_layout, folder)
    assert all("no generation layout" in text for text in said)
