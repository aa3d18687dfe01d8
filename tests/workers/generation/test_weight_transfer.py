"""Weight transfer from training ranks to vLLM, which generates with the current weights; no rank holds extra copies."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from msgspec.structs import replace
from transformers import PreTrainedModel

from protocols.data.messages import Rollouts
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.roles import Sampling
from protocols.weights import BadWeights, Probe, Version
from tests import tiny
from tests.workers.batches import VOCABULARY, experience
from tests.workers.ranks import Ranks, own_device
from workers.generation.engine import generate_all
from workers.generation.vllm import VllmEngine
from workers.generation.weight_transfer import TransferredWeights, WeightTransfer, devices_of, modules_of
from workers.parallel.model import ParallelModel
from workers.parallel.plan import ShardPlan
from workers.parallel.sharding import Sharding
from workers.roles.policy import PolicyWorker
from workers.settings import Generation, Loss, Model, Optimizer
from workers.training.models import load_causal

GENERATION = Generation(slots=16, kv_cache_bytes=2 * 1024 * 1024)
SAMPLING = Sampling(max_tokens=12)
# Several blocks of the prefix cache, equal in all versions: entries of old weights would be hit.
TEXTS = ["3+4*5=" * 30, "sort: dcba " * 20, "12+34="]
SEED = 3


def policy_of(folder: str, grouping: GenerationGrouping, device: str = "cpu") -> PolicyWorker:
    model, optimizer = Model(path=folder, learning_rate=0.3), Optimizer(epsilon=1.0)
    sharding, generation = Sharding(grouping.topology, device=own_device(device)), replace(GENERATION, engine="torch")
    return PolicyWorker(model, Loss(), optimizer, generation, SEED, sharding=sharding, grouping=grouping)


class Round(NamedTuple):
    """One weight transfer on one rank and, on the engine's rank, the rows that vLLM generated after it."""

    transferred: TransferredWeights
    generated: Rollouts | None


def rounds(
    folder: str, grouping: GenerationGrouping, exported: list[str], device: str = "cpu", free: list[int] | None = None
) -> list[Round]:
    """Run by every rank: transfer the weights, generate, export and train a step, once per folder in `exported`.

    Appends the free bytes of a CUDA device after each generation to `free`.
    """
    policy = policy_of(folder, grouping, device)
    assert policy.hybrid
    first = policy.hybrid.tensor_group.index == 0
    if grouping.topology.world_size > 1 and first:
        with pytest.raises(ValueError, match="one of 2 ranks, which vLLM takes for its own: give it workers"):
            VllmEngine(folder, GENERATION, SEED)
    devices = devices_of(policy.hybrid)
    engine = VllmEngine(folder, GENERATION, SEED, devices=devices) if first else None
    transfer = WeightTransfer(policy.hybrid, engine)
    seen: list[Round] = []
    try:
        for folder_after in exported:
            transferred = transfer.publish(Version(0, policy.trained.version), policy.probe()).load_on(engine)
            rows = generate_all(engine, tiny.make_prompts(TEXTS, samples=3), SAMPLING) if engine else None
            seen.append(Round(transferred, rows.batch if rows else None))
            if free is not None and device == "cuda":
                dist.barrier()
                free.append(torch.cuda.mem_get_info()[0])
            policy.export(folder_after)
            policy.update(experience(5))
        if grouping.topology.world_size == 1:
            assert engine
            refused(transfer, engine, policy.probe())
    finally:
        transfer.close()
        if engine:
            engine.close()
    if grouping.topology.world_size > 1:
        dist.barrier()  # closing an engine must not affect the ranks' own process group
    return seen


def refused(transfer: WeightTransfer, engine: VllmEngine, probe: Probe) -> None:
    """The engine refuses an old version, and weights whose log-probs differ from the trainer's probe."""
    with pytest.raises(BadWeights, match="is not newer than"):
        transfer.publish(Version(0, 1), probe).load_on(engine)
    assert engine.version == Version(0, 1)
    wrong = Probe(probe.tokens, [[value - 1.0 for value in row] for row in probe.log_probs], probe.tolerance)
    with pytest.raises(BadWeights, match="log-probs differ by 1"):
        transfer.publish(Version(0, 2), wrong).load_on(engine)
    assert engine.version is None
    transfer.publish(Version(0, 2), probe).load_on(engine)
    assert engine.version == Version(0, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_policy(tmp_path_factory.mktemp("policy"), vocabulary=VOCABULARY))


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2, patience=timedelta(minutes=5), children=True) as ranks:
        yield ranks


def assert_generated_by(model: PreTrainedModel, rows: Rollouts, atol: float) -> None:
    for prompt, response, log_probs in zip(rows.prompts, rows.responses, rows.log_probs, strict=True):
        np.testing.assert_allclose(
            log_probs, tiny.log_probs(model, prompt, response, known=len(tiny.VOCABULARY)), atol=atol
        )


def assert_followed(seen: list[Round], exported: list[str], atol: float = 1e-4) -> None:
    """Each round's rows were generated with the weights that it transferred; those of the two rounds differ."""
    generated = [one.generated for one in seen]
    for rows, path in zip(generated, exported, strict=True):
        assert rows is not None
        assert_generated_by(load_causal(path), rows, atol)
    assert generated[0] and generated[1] and generated[0].responses != generated[1].responses
    for version, one in enumerate(seen):
        assert one.transferred.receipt
        assert one.transferred.receipt.version == Version(0, version)
        assert one.transferred.receipt.probe_difference < atol


def model_bytes(folder: str) -> int:
    return sum(p.numel() * p.itemsize for p in load_causal(folder).parameters())


@pytest.mark.vllm
def test_one_rank_transfers_its_weights_in_process(folder: str, tmp_path: Path):
    exported = [str(tmp_path / str(i)) for i in range(2)]
    seen = rounds(folder, GenerationGrouping(Topology()), exported)
    assert_followed(seen, exported)
    for one in seen:
        assert one.transferred.transition.received_bytes == 0
        assert one.transferred.copied_bytes == model_bytes(folder)  # the second copy is vLLM's


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_two_tensor_ranks_transfer_their_shards_to_two_workers(two: Ranks, folder: str, tmp_path: Path):
    """1-2-1 -> 1-2: nothing is received, and each rank copies half of the model to its worker."""
    exported = [str(tmp_path / str(i)) for i in range(2)]
    first, second = two.call(rounds, folder, GenerationGrouping(Topology(1, 2, 1), 1, 2), exported)
    assert_followed(first, exported)
    plan = ShardPlan(ParallelModel(folder, Topology()).decoder_plan.decoder, 1, 2)
    shard = 4 * sum(plan.shard_elements(spec) for spec in plan.parameters(0))
    for one in (*first, *second):
        assert one.transferred.transition.received_bytes == 0
        assert one.transferred.copied_bytes == shard


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_each_of_two_ranks_feeds_an_engine_of_its_own(two: Ranks, folder: str, tmp_path: Path):
    """1-2-1 -> 1-1: each rank receives half of the model, module by module, and copies all of it to its engine."""
    exported = [str(tmp_path / str(i)) for i in range(2)]
    ranks = two.call(rounds, folder, GenerationGrouping(Topology(1, 2, 1), 1, 1), exported)
    matrices = sum(4 * p.numel() for n, p in load_causal(folder).named_parameters() if "norm" not in n)
    for seen in ranks:
        assert_followed(seen, exported)
        for one in seen:
            assert one.transferred.transition.received_bytes == matrices // 2
            assert one.transferred.copied_bytes == model_bytes(folder)


def test_modules_hold_the_tensors_that_vllm_packs_together(folder: str):
    modules = modules_of(ParallelModel(folder, Topology()).decoder_plan)
    ends = [sorted(name.rpartition("model.layers.0.")[2] for name in module) for module in modules[1:6]]
    assert ends == [
        ["input_layernorm.weight"],
        sorted(f"self_attn.{kind}_proj.{what}" for kind in "qkv" for what in ("weight", "bias")),
        ["self_attn.o_proj.weight"],
        ["post_attention_layernorm.weight"],
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    ]


def test_an_engine_runs_on_the_first_rank_of_its_replica(folder: str):
    policy = policy_of(folder, GenerationGrouping(Topology()))
    assert policy.hybrid
    with pytest.raises(ValueError, match="rank 0 of 1 that generate together: the first has the engine"):
        WeightTransfer(policy.hybrid, None)
