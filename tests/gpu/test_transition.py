"""The transition from training to generation between devices: bytes by the formula, its speed, and the same model."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from protocols.data.jagged import Jagged
from protocols.layout.topology import Backend, Topology, generation_grouping
from tests.gpu.conftest import Figure, need_cuda
from tests.workers.ranks import Ranks, own_device
from workers.parallel.backends import trained_model
from workers.parallel.sharding import Sharding
from workers.resharding.hybrid_engine import HybridEngine
from workers.settings import Model
from workers.training.micro_batches import MicroBatch
from workers.training.outputs import Outputs

ROUNDS = 5
RANKS = 2
SWITCHES: list[tuple[Backend, str]] = [("3d", "1-2-1 -> 1-1"), ("fsdp", "1-1-2 -> 1-1"), ("fsdp", "1-1-2 -> 1-2")]


class Rows(NamedTuple):
    """The rows that both layouts compute."""

    prompts: Jagged
    responses: Jagged


class Switched(NamedTuple):
    """What one rank measures."""

    received_bytes: int
    seconds: list[float]
    peak_bytes: int
    device_peak_bytes: int  # of CUDA's allocator; 0 on the CPU
    difference: float  # the largest difference of log-probs between the layouts


def switched(folder: str, backend: Backend, switch: str, kind: str) -> Switched:
    """Run by every rank: forward in the training layout, switch ROUNDS times, forward in the generation layout."""
    device, (train, generate) = own_device(kind), map(Topology.parse, switch.split(" -> "))
    model = trained_model(Model(path=folder), Sharding(train, backend, device), regrouped=True)
    engine = HybridEngine(model, generation_grouping(backend, train, generate))
    rows = Rows(Jagged.from_rows([[1, 2, 3], [4, 5]]), Jagged.from_rows([[6, 7], [8, 9, 10]]))
    before = model.forward(rows, 1000, log_probs)
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    transitions = []
    for _ in range(ROUNDS):
        transitions.append(engine.to_generation())
        engine.to_training()
    device_peak = torch.cuda.max_memory_allocated(device) if kind == "cuda" else 0
    engine.to_generation()
    after = engine.forward(rows, 1000, log_probs)
    first = transitions[0]
    difference = float((torch.cat(before) - torch.cat(after)).abs().max())
    return Switched(
        first.received_bytes, [one.seconds for one in transitions[1:]], first.peak_bytes, device_peak, difference
    )


def log_probs(outputs: Outputs, micro: MicroBatch) -> Tensor:
    tokens = micro.response_tokens()
    return outputs.before_response(micro).float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).cpu()


def make(folder: str, kind: str) -> int:
    """Save a Llama to `folder`, of a gigabyte in float32 if there is a device for it, and return its bytes."""
    large = kind == "cuda"
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=2048 if large else 64,
        intermediate_size=4096 if large else 128,
        num_hidden_layers=6 if large else 2,
        num_attention_heads=16 if large else 4,
        num_key_value_heads=16 if large else 4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() * p.itemsize for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize(("backend", "switch"), SWITCHES)
def test_a_switch_receives_what_is_missing_and_no_more(
    kind: str, backend: Backend, switch: str, figure: Figure, tmp_path_factory: pytest.TempPathFactory
):
    if kind == "cuda":
        need_cuda(RANKS)  # NCCL accepts only one rank per device
    folder = str(tmp_path_factory.mktemp("model"))
    matrices = make(folder, kind)
    tensor_ranks = Topology.parse(switch.split(" -> ")[1]).tp
    with Ranks(RANKS, device=kind) as ranks:
        seen: list[Switched] = ranks.call(switched, folder, backend, switch, kind)
    expected = matrices // tensor_ranks - matrices // RANKS
    for rank in seen:
        norms = rank.received_bytes - expected  # fully sharded ranks also shard these
        assert 0 <= norms < matrices * 0.02 if backend == "fsdp" else norms == 0
        assert rank.difference < 1e-4
    seconds = max(statistics.median(rank.seconds) for rank in seen)
    name = f"{backend} {switch} on {kind}"
    figure(f"{name}: received a rank", seen[0].received_bytes, "bytes")
    figure(f"{name}: seconds, slowest rank", seconds, "s")
    figure(f"{name}: peak of weights a rank", seen[0].peak_bytes, "bytes")
    if kind == "cuda":
        figure(f"{name}: peak of the allocator", seen[0].device_peak_bytes, "bytes")
        if expected:
            figure(f"{name}: rate a rank", expected / seconds / 1e9, "GB/s")
