"""A 3D-parallel model has the loss, gradients, gradient norm and next weights of one process, on any topology."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen2ForTokenClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from protocols.data.jagged import Jagged
from protocols.layout.topology import Coordinates, Topology
from tests import tiny
from tests.workers.ranks import RankFailed, Worlds
from workers.parallel.model import MicroLoss, ParallelModel, plan_of
from workers.parallel.plan import EMBEDDING, TOKEN_HEAD, Head, ShardPlan
from workers.training.micro_batches import MicroBatch, micro_batch_rows, micro_batches
from workers.training.models import load_causal, load_critic, response_log_probs
from workers.training.outputs import Outputs

TOPOLOGIES = ["2-1-1", "1-2-1", "1-1-2", "2-2-1", "1-2-2", "2-1-2", "2-2-2"]
BUDGET = 40  # padded tokens a micro-batch
HEAD_CHUNK = 4  # response tokens; most micro-batches have more
ROWS = 11  # on two replicas: three and two micro-batches, all of different shapes
RATE = 1e-3


class Rows(NamedTuple):
    """A replica's training rows."""

    prompts: Jagged
    responses: Jagged
    advantages: Jagged
    mask: Jagged


class Case(NamedTuple):
    """A model folder and its output head."""

    folder: str
    head: Head = "tokens"
    dtype: torch.dtype = torch.float32
    recompute: bool = False


def rows(number: int, seed: int = 3) -> Rows:
    """Rows of 3 to 18 tokens, some of which are masked."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 12, number)
    prompts = [draw.integers(0, 30, n).astype(np.int32) for n in draw.integers(2, 8, number)]
    responses = [draw.integers(0, 30, n).astype(np.int32) for n in lengths]
    advantages = Jagged.from_rows([draw.normal(size=n) for n in lengths], np.float32)
    mask = Jagged.from_rows([draw.random(n) < 0.8 for n in lengths], np.uint8)
    return Rows(Jagged.from_rows(prompts, np.int32), Jagged.from_rows(responses, np.int32), advantages, mask)


def part(data: Rows, replica: int, replicas: int) -> Rows:
    """A replica's rows: consecutive, with counts that differ by at most one."""
    own = np.array_split(np.arange(len(data.prompts)), replicas)[replica]
    return Rows(*(column.take(own) for column in data))


def trained(data: Rows) -> int:
    """The number of trained tokens."""
    return int(data.mask.values.sum(dtype=np.int64))


def loss_of(data: Rows, head: Head, share: float) -> MicroLoss:
    """A policy-gradient or value loss: the mean over these rows' trained tokens, times their share of the batch."""
    weight = share / max(trained(data), 1)

    def loss(outputs: Outputs, micro: MicroBatch) -> Tensor:
        advantages = micro.column(data.advantages)
        if head == "tokens":
            per_token = -response_log_probs(outputs, micro) * advantages
        else:
            per_token = (outputs.before_response(micro).squeeze(-1) - advantages) ** 2
        return (per_token * micro.column(data.mask) * weight).sum()

    return loss


# --- one process, with transformers alone


class Step(NamedTuple):
    """One training step: loss, gradient norm, gradients before clipping and weights after it, by name."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@cache
def whole(case: Case, number: int, limit: float = math.inf) -> Step:
    """The step on one process with transformers and torch."""
    data = rows(number)
    model = load_causal(case.folder) if case.head == "tokens" else load_critic(case.folder)
    nn.Module.to(model, case.dtype)
    loss_of_micro, total = loss_of(data, case.head, 1.0), 0.0
    for micro in micro_batches(data, 10_000):
        logits = model(input_ids=micro.tokens, attention_mask=micro.mask, use_cache=False).logits
        loss = loss_of_micro(Outputs(logits), micro)
        loss.backward()
        total += loss.item()
    named = dict(model.named_parameters())
    gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    norm = float(torch.nn.utils.clip_grad_norm_(named.values(), limit))
    torch.optim.AdamW(named.values(), lr=RATE).step()
    return Step(total, norm, gradients, {n: p.detach() for n, p in named.items()})


# --- many processes: what every rank runs


def sharded_step(topology: Topology, case: Case, number: int, limit: float) -> Step:
    """This rank's part of the same step."""
    model = ParallelModel(
        case.folder, topology, head=case.head, dtype=case.dtype, recompute=case.recompute, head_chunk=HEAD_CHUNK
    )
    data = part(rows(number), model.place.dp, topology.dp)
    share = trained(data) / trained(rows(number))
    loss = model.backward(data, BUDGET, loss_of(data, case.head, share))
    gradients = {n: p.grad.clone() for n, p in model.optimized.items() if p.grad is not None}
    norm = model.clip_gradient(limit)
    torch.optim.AdamW(model.optimized.values(), lr=RATE).step()
    model.all_gather_updated()
    return Step(loss, norm, gradients, {n: p.detach() for n, p in model.parameters.items()})


def outputs(topology: Topology, case: Case, number: int) -> list[Tensor]:
    """This rank's log-probs of the response tokens, in one tensor; none before the last stage."""
    model = ParallelModel(case.folder, topology, head_chunk=HEAD_CHUNK)
    data = part(rows(number), model.place.dp, topology.dp)
    log_probs = model.outputs(data, BUDGET, response_log_probs)
    return [] if log_probs is None else [torch.from_numpy(log_probs)]


def passes(topology: Topology, case: Case, number: int) -> int:
    """How many micro-batches this rank computes in a step."""
    model = ParallelModel(case.folder, topology)
    counted: list[None] = []
    model.shard.register_forward_hook(lambda module, inputs, output: counted.append(None))
    data = part(rows(number), model.place.dp, topology.dp)
    model.backward(data, BUDGET, loss_of(data, case.head, 1.0))
    return len(counted)


def together(topology: Topology, plan: ShardPlan, steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole tensors, after checking that ranks with the same shard agree on it bit by bit."""
    found: dict[str, Tensor] = {}
    for replica in range(topology.dp):
        for stage in range(topology.pp):
            first = replica * topology.replica_size + stage * topology.tp
            for parameter in plan.parameters(stage):
                shards = [steps[first + t][parameter.name] for t in range(topology.tp)]
                if parameter.cut is None:
                    assert all(torch.equal(shard, shards[0]) for shard in shards), parameter.name
                tensor = shards[0] if parameter.cut is None else torch.cat(shards, parameter.cut)
                assert torch.equal(found.setdefault(parameter.name, tensor), tensor), parameter.name
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """qwen2: tied, grouped queries, biases; qwen3: tied, grouped queries, head norms; llama: untied, no groups, all
    biases; grouped: untied, grouped queries.

    The critic is qwen2's body with a non-zero head, so that the body has gradients.
    """
    sizes = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    made: dict[str, str] = {}
    qwen2 = tiny.config(layers=4, tied=True)
    qwen2.update({k: v for k, v in sizes.items() if k != "num_hidden_layers"})
    valued = copy.deepcopy(qwen2)
    valued.num_labels = 1
    models = {
        "critic": lambda: Qwen2ForTokenClassification(valued),
        "qwen2": lambda: Qwen2ForCausalLM(qwen2),
        "qwen3": lambda: Qwen3ForCausalLM(
            Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
        ),
        "grouped": lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=False)),
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(**sizes, num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
        ),
    }
    for name, make in models.items():
        torch.manual_seed(0)
        model = make()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # initially zero, where a missing one would go unnoticed
                torch.nn.init.normal_(parameter, std=0.1)
        made[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(made[name])
    return made


def run(worlds: Worlds, topology: str, case: Case, number: int, limit: float = math.inf) -> Step:
    """The step on all ranks, assembled; all ranks must agree on loss and norm."""
    at = Topology.parse(topology)
    steps = worlds[at.world_size].call(sharded_step, at, case, number, limit)
    assert len({(step.loss, step.norm) for step in steps}) == 1
    plan = plan_of(AutoConfig.from_pretrained(case.folder), at, case.head)
    gradients = together(at, plan, [step.gradients for step in steps])
    weights = together(at, plan, [step.weights for step in steps])
    return Step(steps[0].loss, steps[0].norm, gradients, weights)


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference over all parameters; a head tied across stages is compared with the embedding."""
    assert ours.keys() - {TOKEN_HEAD} == theirs.keys() - {TOKEN_HEAD}
    return max(float((tensor - theirs.get(name, theirs[EMBEDDING])).abs().max()) for name, tensor in ours.items())


# --- the same numbers


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "grouped"])
def test_loss_gradients_and_norm_are_those_of_one_process(worlds, folders, topology: str, name: str):
    ours, theirs = run(worlds, topology, Case(folders[name]), ROWS), whole(Case(folders[name]), ROWS)
    assert largest_difference(ours.gradients, theirs.gradients) < 1e-6
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
    assert ours.norm == pytest.approx(theirs.norm, rel=1e-6)


@pytest.mark.parametrize("topology", ["1-2-2", "2-1-2", "2-2-2"])
def test_a_replica_without_rows_changes_nothing(worlds, folders, topology: str):
    ours, theirs = run(worlds, topology, Case(folders["qwen2"]), 1), whole(Case(folders["qwen2"]), 1)
    assert largest_difference(ours.gradients, theirs.gradients) < 1e-6
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)


def test_replicas_run_as_many_micro_batches_as_the_longest(worlds, folders):
    """With weights gathered in each micro-batch, a replica with fewer of them would leave the others waiting."""
    number = 14
    ones = [len(micro_batch_rows(part(rows(number), replica, 2), BUDGET)) for replica in range(2)]
    assert ones[0] != ones[1]
    assert worlds[4].call(passes, Topology(1, 2, 2), Case(folders["qwen2"]), number) == [max(ones)] * 4
    assert worlds[4].call(passes, Topology(2, 1, 2), Case(folders["qwen2"]), 1) == [1] * 4


@pytest.mark.parametrize("topology", ["2-1-1", "1-2-2", "2-2-2"])
def test_an_optimizer_step_after_clipping_gives_the_same_weights(worlds, folders, topology: str):
    """In float64, because Adam turns the rounding of a gradient near zero into a full step."""
    case = Case(folders["qwen3"], dtype=torch.float64)
    theirs = whole(case, ROWS, 0.5)
    ours = run(worlds, topology, case, ROWS, 0.5)
    assert theirs.norm > 0.5  # it was clipped
    assert largest_difference(ours.weights, theirs.weights) < 1e-3 * RATE


@pytest.mark.parametrize("topology", ["2-1-1", "1-2-1", "2-2-2"])
def test_a_value_head_trains_alike(worlds, folders, topology: str):
    case = Case(folders["critic"], head="value")
    ours, theirs = run(worlds, topology, case, ROWS), whole(case, ROWS)
    assert largest_difference(ours.gradients, theirs.gradients) < 1e-6
    assert ours.norm == pytest.approx(theirs.norm, rel=1e-6)


@pytest.mark.parametrize("topology", ["1-2-1", "2-2-1"])
def test_recomputing_activations_changes_nothing(worlds, folders, topology: str):
    kept = run(worlds, topology, Case(folders["qwen2"]), ROWS)
    again = run(worlds, topology, Case(folders["qwen2"], recompute=True), ROWS)
    assert largest_difference(again.gradients, kept.gradients) == 0.0


def test_bfloat16_is_near(worlds, folders):
    ours = run(worlds, "2-2-1", Case(folders["llama"], dtype=torch.bfloat16), ROWS)
    theirs = whole(Case(folders["llama"]), ROWS)
    assert (ours.gradients[EMBEDDING].dtype, ours.weights[EMBEDDING].dtype) == (torch.float32, torch.bfloat16)
    assert ours.norm == pytest.approx(theirs.norm, rel=0.1)


def test_one_rank_needs_no_world(folders):
    alone, theirs = (
        sharded_step(Topology(), Case(folders["qwen2"]), ROWS, math.inf),
        whole(Case(folders["qwen2"]), ROWS),
    )
    assert largest_difference(alone.gradients, theirs.gradients) < 1e-6
    assert alone.norm == pytest.approx(theirs.norm, rel=1e-6)


@pytest.mark.parametrize("topology", ["2-1-1", "1-2-2", "2-2-2"])
def test_a_forward_gives_the_last_stage_its_replicas_outputs(worlds, folders, topology: str):
    at, case = Topology.parse(topology), Case(folders["qwen2"])
    results = worlds[at.world_size].call(outputs, at, case, ROWS)
    alone = torch.cat(outputs(Topology(), case, ROWS))
    for rank, kept in enumerate(results):
        assert bool(kept) == (at.coordinates(rank).pp == at.pp - 1)
    collected = [torch.cat(results[at.rank(Coordinates(at.pp - 1, 0, dp))]) for dp in range(at.dp)]
    assert torch.allclose(torch.cat(collected), alone, atol=1e-5)


# --- refusals


def test_a_world_of_another_size_is_refused(worlds, folders):
    with pytest.raises(RankFailed, match=r"topology 1-2-2 has 4 ranks, torch\.distributed has 2"):
        worlds[2].call(outputs, Topology(1, 2, 2), Case(folders["qwen2"]), ROWS)


def test_a_folder_that_lacks_tensors_is_refused(folders):
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors: \['score.weight'\]"):
        ParallelModel(folders["qwen2"], Topology(), head="score")
