"""vLLM on a device generates with the weights that train there, and frees its memory while it sleeps."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from protocols.layout.topology import GenerationGrouping, Topology
from protocols.roles import Sampling
from protocols.weights import Version
from tests import tiny
from tests.gpu.conftest import Figure, need_cuda
from tests.workers.generation.test_weight_transfer import (
    GENERATION,
    Round,
    assert_followed,
    folder,  # noqa: F401 - a fixture
    rounds,
)
from tests.workers.ranks import Ranks
from workers.generation.engine import generate_all
from workers.generation.vllm import VllmEngine
from workers.settings import Generation
from workers.training.models import load_causal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
ATOL = 1e-3  # the device's kernels against transformers on the CPU, in float32
GIBIBYTE = 1 << 30


@pytest.fixture(autouse=True)
def device() -> None:
    need_cuda(1)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    need_cuda(2)
    with Ranks(2, patience=timedelta(minutes=10), children=True, device="cuda") as two:
        yield two


def test_weights_are_transferred_on_the_device(folder: str, tmp_path: Path, figure: Figure):  # noqa: F811
    """In one process, without leaving the device."""
    exported = [str(tmp_path / str(i)) for i in range(2)]
    seen = rounds(folder, GenerationGrouping(Topology()), exported, "cuda")
    assert_followed(seen, exported, ATOL)
    for i, one in enumerate(seen):
        assert one.transferred.receipt
        figure(f"weight transfer {i} in process", one.transferred.receipt.seconds, "s")
        figure(f"weight transfer {i}: second copy", one.transferred.copied_bytes, "bytes")
        figure(f"weight transfer {i}: largest difference of log-probs", one.transferred.receipt.probe_difference, "nat")


def on_each_device(folder: str, generate: str, exported: list[str]) -> tuple[list[Round], int]:  # noqa: F811
    """A rank's rounds, and the bytes of its device that model and engine take."""
    layout = Topology.parse(generate)
    before, after = torch.cuda.mem_get_info()[0], []
    seen = rounds(folder, GenerationGrouping(Topology(1, 2, 1), layout.pp, layout.tp), exported, "cuda", after)
    return seen, before - after[0]


@pytest.mark.parametrize("generate", ["1-2", "1-1"])
def test_shards_reach_the_workers_on_their_ranks_devices_by_cuda_ipc(
    ranks: Ranks,
    folder: str,  # noqa: F811
    tmp_path: Path,
    generate: str,
    figure: Figure,
):
    """Two ranks train. 1-2: one engine with a worker on each device. 1-1: two engines, each on its rank's device."""
    exported = [str(tmp_path / str(i)) for i in range(2)]
    (first, taken), (second, also_taken) = ranks.call(on_each_device, folder, generate, exported)
    for seen in (first, second) if generate == "1-1" else (first,):
        assert_followed(seen, exported, ATOL)
    assert min(taken, also_taken) > GENERATION.kv_cache_bytes, "a device has no worker"
    assert max(taken, also_taken) < 1.5 * min(taken, also_taken), "one device has both"
    assert first[-1].transferred.receipt
    figure(f"1-2-1 -> {generate}: weight transfer to workers", first[-1].transferred.receipt.seconds, "s")
    for rank, one in enumerate((taken, also_taken)):
        figure(f"1-2-1 -> {generate}: device {rank} taken by model and engine", one, "bytes")


def test_a_sleeping_engine_gives_its_memory_back(folder: str, figure: Figure):  # noqa: F811
    engine = VllmEngine(folder, Generation(slots=16, kv_cache_bytes=2 * GIBIBYTE), 3, sleeps=True)
    try:
        model = load_causal(folder)
        engine.load(tiny.publish(model, Version(0, 0), "the probe is longer than a block of the cache" * 2))
        prompts, sampling = tiny.make_prompts(["12+34=", "sort: dcba"], samples=4), Sampling(max_tokens=8)
        before = generate_all(engine, prompts, sampling).batch
        awake = torch.cuda.mem_get_info()[0]
        engine.sleep()
        asleep = torch.cuda.mem_get_info()[0]
        engine.wake()
        again = generate_all(engine, prompts, sampling).batch
        assert asleep - awake >= 2 * GIBIBYTE  # at least the KV cache
        assert again.responses == before.responses
    finally:
        engine.close()
    figure("free while awake", awake / GIBIBYTE, "GiB")
    figure("free while asleep", asleep / GIBIBYTE, "GiB")
