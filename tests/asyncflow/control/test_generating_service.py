"""A prompt is sent once; if its rows are lost with a generator, all of them are sent again under a new attempt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from asyncflow.control.admission.inflight_prompts import InFlightPrompts
from asyncflow.control.admission.prompts import DataRow, PromptSource
from asyncflow.control.admission.staleness import Admission
from asyncflow.control.generating_service import GeneratingService
from asyncflow.control.store.ledger import Ledger
from asyncflow.control.supervision.liveness import Liveness
from asyncflow.control.supervision.restart_policy import RestartPolicy
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.dataflow.algorithms.remax import remax
from asyncflow.dataflow.trace import trace
from asyncflow.services.channels.endpoint import Endpoint, Payload
from asyncflow.services.runtime.local_store import LocalStore
from protocols.control.delivery import Delivery
from protocols.control.notices import Notice, PromptSettled
from protocols.control.replies import Done, Reply
from protocols.control.requests import Request, SetPaused
from protocols.data.ids import BASELINE_INDEX, index_of, prompt_of
from tests import tiny
from tests.asyncflow.control.store.test_run_store import open_run_store

REMAX = trace(remax)
SAMPLES = 2


class Generator:
    """Records its deliveries. Implements `Endpoint`."""

    name = "generator"

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.requests: list[Request] = []

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        self.deliveries.append(delivery)

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        assert not self.deliveries, "what it is told comes before the prompts"
        self.requests.append(request)
        return Done(), []

    async def notices(self) -> list[Notice]:
        raise NotImplementedError

    def take(self) -> dict[tuple[bool, int], list[int]]:
        """(greedy, attempt) -> the prompts that were delivered since the previous call."""
        found: dict[tuple[bool, int], list[int]] = {}
        for delivery in self.deliveries:
            samples = [sample for shard in delivery.shards for sample in shard.sample_ids]
            greedy = index_of(samples[0]) == BASELINE_INDEX
            assert len(samples) == len(dict.fromkeys(map(prompt_of, samples))) * (1 if greedy else SAMPLES)
            found.setdefault((greedy, delivery.attempt), []).extend(dict.fromkeys(map(prompt_of, samples)))
        self.deliveries.clear()
        return found


async def restart(name: str) -> Endpoint:
    raise NotImplementedError


def kill(name: str) -> None:
    raise NotImplementedError


@pytest.fixture
def source(tmp_path: Path) -> PromptSource:
    tiny.tokenizer().save_pretrained(str(tmp_path))
    return PromptSource([DataRow(f"{i}+{i}=", str(2 * i)) for i in range(7)], str(tmp_path), seed=0)


async def test_what_a_lost_generator_had_generated_is_generated_again_but_for_what_is_at_the_join(
    tmp_path: Path, source: PromptSource
):
    generator, ledger = Generator(), Ledger(tmp_path / "ledger.db")
    inflight = InFlightPrompts(Admission(prompts_per_step=2, staleness=1, steps=10), max_refills=1)
    run_store = open_run_store(tmp_path, ledger)
    policy, liveness = RestartPolicy(REMAX, {}, [], [], 0, 60.0), Liveness(60.0, lambda _: 60.0)
    supervisor = ServiceSupervisor({"generator": generator}, {}, policy, restart, kill, liveness)
    service = GeneratingService(
        "generator",
        dataflow=REMAX,
        supervisor=supervisor,
        store=LocalStore(),
        source=source,
        run_store=run_store,
        inflight=inflight,
        samples_per_prompt=SAMPLES,
        publish_deadline_seconds=1.0,
    )

    await service.admit(3, min_version=0)
    first, second, third = (source.at(i) for i in range(3))
    assert generator.take() == {(greedy, 0): [first, second, third] for greedy in (False, True)}
    inflight.complete(PromptSettled(second, [], []))
    supervisor.replacements["generator"] += 1
    await service.admit(1, min_version=0)
    fourth = source.at(3)
    assert generator.take() == {(greedy, 1): [fourth] for greedy in (False, True)}, "nothing new is out of date"
    await service.set_paused(True)
    await service.prepare(generator)
    assert generator.requests == [SetPaused(True)] * 2, "the successor pauses as well"
    assert generator.take() == {(greedy, 1): [first, third, fourth] for greedy in (False, True)}, "of one attempt all"
    await run_store.abandon()
