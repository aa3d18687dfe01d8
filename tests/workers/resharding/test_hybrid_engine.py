"""The hybrid engine switches layouts in place: equal weights, no byte received that is not missing, no second copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from protocols.data.jagged import Jagged
from protocols.layout.topology import GenerationGrouping, Style, Topology
from tests.workers.ranks import Worlds
from workers.parallel.model import ParallelModel, plan_of
from workers.parallel.plan import EMBEDDING, ShardPlan
from workers.resharding.hybrid_engine import HybridEngine, Transition
from workers.training.micro_batches import MicroBatch, in_row_order, micro_batches
from workers.training.models import load_causal
from workers.training.outputs import Outputs

SWITCHES = ["1-4-2 -> 1-2", "1-2-2 -> 1-1", "2-2-2 -> 1-2", "2-4-1 -> 1-1", "1-8-1 -> 1-2", "4-2-1 -> 2-1"]
BUDGET = 60
BUCKET_BYTES = 4096


class Rows(NamedTuple):
    """Rows to generate from and to train on."""

    prompts: Jagged
    responses: Jagged


class Generating(NamedTuple):
    """What one rank observes in its generation layout."""

    transition: Transition
    weights: dict[str, Tensor]
    logits: list[Tensor]
    views: bool  # every trained parameter lies inside a generation weight


def rows(number: int = 9) -> Rows:
    draw = np.random.default_rng(5)
    prompts, responses = ([draw.integers(0, 32, n) for n in draw.integers(2, 9, number)] for _ in range(2))
    return Rows(Jagged.from_rows(prompts, np.int32), Jagged.from_rows(responses, np.int32))


def part(data: Rows, index: int, of: int) -> Rows:
    own = np.array_split(np.arange(len(data.prompts)), of)[index]
    return Rows(*(column.take(own) for column in data))


def in_order(parts: list[Tensor], data: Rows) -> list[Tensor]:
    """What was read of each micro-batch, joined in the order of the rows; nothing where nothing was read."""
    return [in_row_order(parts, data, BUDGET)] if parts else []


def at_responses(outputs: Outputs, micro: MicroBatch) -> Tensor:
    return outputs.before_response(micro)


def likelihood(outputs: Outputs, micro: MicroBatch) -> Tensor:
    return torch.nn.functional.cross_entropy(at_responses(outputs, micro), micro.response_tokens(), reduction="sum")


def grouping_of(text: str, style: Style = "hybridflow") -> GenerationGrouping:
    train, generate = (Topology.parse(layout) for layout in text.split(" -> "))
    return GenerationGrouping(train, generate.pp, generate.tp, style)


# --- what every rank runs


def generating(folder: str, grouping: GenerationGrouping) -> Generating:
    model = ParallelModel(folder, grouping.topology)
    engine = HybridEngine(model, grouping, bucket_bytes=BUCKET_BYTES)
    transition = engine.to_generation()
    mine = part(part(rows(), engine.place.dp, grouping.topology.dp), engine.place.micro_dp, grouping.micro_dp)
    logits = in_order(engine.forward(mine, BUDGET, at_responses), mine)
    storages = {weight.untyped_storage().data_ptr() for weight in engine.weights.values()}
    views = all(p.untyped_storage().data_ptr() in storages for p in model.parameters.values())
    return Generating(transition, {n: w.data.clone() for n, w in engine.weights.items()}, logits, views)


class Trained(NamedTuple):
    """The result of training on one rank."""

    weights: dict[str, Tensor]
    received_bytes: list[int]  # of each switch


def trained(folder: str, grouping: GenerationGrouping, switches: int) -> Trained:
    """Two training steps, each followed by `switches` switches to generation and back."""
    model = ParallelModel(folder, grouping.topology)
    engine = HybridEngine(model, grouping, bucket_bytes=BUCKET_BYTES)
    optimizer = torch.optim.AdamW(model.parameters.values(), lr=1e-2)
    data, received = part(rows(), model.place.dp, grouping.topology.dp), []
    for _ in range(2):
        model.backward(data, BUDGET, likelihood)
        model.clip_gradient(1.0)
        optimizer.step()
        for _ in range(switches):
            received.append(engine.to_generation().received_bytes)
            engine.to_training()
    return Trained({name: p.detach() for name, p in model.parameters.items()}, received)


def updated_weights(folder: str, grouping: GenerationGrouping) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The generation weights after a training step, and the logits of the training and of the generation layout."""
    model = ParallelModel(folder, grouping.topology)
    engine = HybridEngine(model, grouping, bucket_bytes=BUCKET_BYTES)
    engine.to_generation()
    engine.to_training()
    model.backward(part(rows(), model.place.dp, grouping.topology.dp), BUDGET, likelihood)
    torch.optim.SGD(model.parameters.values(), lr=1e-2).step()
    logits = in_order(model.forward(rows(), BUDGET, at_responses), rows())
    engine.to_generation()
    logits += in_order(engine.forward(rows(), BUDGET, at_responses), rows())
    return {n: w.data.clone() for n, w in engine.weights.items()}, logits


def refusals(folder: str, grouping: GenerationGrouping) -> list[str]:
    """The errors of calls in the wrong layout."""
    model = ParallelModel(folder, grouping.topology)
    engine = HybridEngine(model, grouping)
    said: list[str] = []
    try:
        engine.to_training()
    except RuntimeError as error:
        said.append(str(error))
    engine.to_generation()
    try:
        engine.to_generation()
    except RuntimeError as error:
        said.append(str(error))
    engine.to_training()
    try:
        engine.forward(rows(), BUDGET, at_responses)
    except (RuntimeError, NotImplementedError) as error:
        said.append(type(error).__name__)
    return said


# --- the whole model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A tied and an untied model of four layers, with 16 heads on 8 key-value heads."""
    made = {}
    for tied in (True, False):
        torch.manual_seed(1)
        config = Qwen3Config(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=4,
            initializer_range=0.1,
            tie_word_embeddings=tied,
        )
        made[tied] = str(tmp_path_factory.mktemp("model"))
        Qwen3ForCausalLM(config).save_pretrained(made[tied])
    return made


Generate = Callable[[GenerationGrouping, bool], list[Generating]]


@pytest.fixture(scope="module")
def generate(worlds: Worlds, folders: dict[bool, str]) -> Generate:
    """Switch all ranks to a layout and generate there, once for all tests that use the result."""

    @cache
    def results(grouping: GenerationGrouping, tied: bool) -> list[Generating]:
        return worlds[grouping.topology.world_size].call(generating, folders[tied], grouping)

    return results


@cache
def whole(folder: str) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and logits [response tokens, V] of one process."""
    model = load_causal(folder)
    (micro,) = micro_batches(rows(), 10_000)
    with torch.no_grad():
        logits = model(input_ids=micro.tokens, attention_mask=micro.mask, use_cache=False).logits
    return {n: p.detach() for n, p in model.named_parameters()}, micro.before_response(logits)


def assembled(results: list[dict[str, Tensor]], ranks: list[int], grouping: GenerationGrouping, plan: ShardPlan):
    """The weights of the generation replica that these ranks form."""
    at = {(c.pp, c.tp): results[rank] for rank in ranks for c in [grouping.coordinates(rank)]}
    found: dict[str, Tensor] = {}
    for stage in range(plan.pp):
        assert at[stage, 0].keys() == {p.name for p in plan.parameters(stage)}
        for p in plan.parameters(stage):
            shards = [at[stage, t][p.name] for t in range(plan.tp)]
            found[p.name] = shards[0] if p.cut is None else torch.cat(shards, p.cut)
    return found


def replicas(grouping: GenerationGrouping) -> list[list[int]]:
    """Ranks of each generation replica, in order of replica and micro-DP index."""
    found: dict[tuple[int, int], list[int]] = {}
    for rank in range(grouping.topology.world_size):
        c = grouping.coordinates(rank)
        found.setdefault((c.dp, c.micro_dp), []).append(rank)
    return [ranks for _, ranks in sorted(found.items())]


def check_generation(results: list[Generating], folder: str, grouping: GenerationGrouping) -> None:
    """Every replica's shards form the whole model, and the logits of all replicas are those of all rows, in order."""
    weights, logits = whole(folder)
    plan = ShardPlan(plan_of(AutoConfig.from_pretrained(folder), Topology()).decoder, grouping.pp, grouping.tp)
    for ranks in replicas(grouping):
        ours = assembled([r.weights for r in results], ranks, grouping, plan)
        for name, tensor in ours.items():
            assert torch.equal(tensor, weights.get(name, weights[EMBEDDING])), name
    last = [[r for r in ranks if grouping.coordinates(r).pp == grouping.pp - 1] for ranks in replicas(grouping)]
    for shard in range(grouping.tp):  # each tensor rank of the last stage has the full logits
        parts = [part for ranks in last for part in results[ranks[shard]].logits]
        torch.testing.assert_close(torch.cat(parts), logits, atol=1e-5, rtol=1e-5)


# --- to generation


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_generation_has_the_whole_models_weights_and_logits(generate: Generate, folders, switch: str, tied: bool):
    grouping = grouping_of(switch)
    check_generation(generate(grouping, tied), folders[tied], grouping)


@pytest.mark.parametrize("style", ["vanilla", "deepspeed"])
@pytest.mark.parametrize("switch", ["1-4-2 -> 1-2", "2-2-2 -> 1-2", "4-2-1 -> 2-1"])
def test_the_styles_to_compare_with_generate_alike(generate: Generate, folders, switch: str, style: Style):
    grouping = grouping_of(switch, style)
    check_generation(generate(grouping, True), folders[True], grouping)


# --- received bytes


def sizes(folder: str) -> tuple[int, int, int]:
    """Bytes of the layers' matrices, of the layers' uncut tensors, and of the embedding (or head)."""
    weights, _ = whole(folder)
    in_layers = {n: 4 * w.numel() for n, w in weights.items() if n.startswith("model.layers.")}
    norms = sum(size for name, size in in_layers.items() if "norm" in name)
    return sum(in_layers.values()) - norms, norms, 4 * weights[EMBEDDING].numel()


@pytest.mark.parametrize("switch", SWITCHES)
def test_received_bytes_are_the_formulas_and_the_ends(generate: Generate, folders, switch: str):
    """Untied. Ranks that generate with the embedding or head but did not train it receive all of its shard."""
    grouping = grouping_of(switch)
    results = generate(grouping, False)
    matrices, norms, end = sizes(folders[False])
    final_norm, (p, t), (p_g, t_g) = 4 * 32, (grouping.topology.pp, grouping.topology.tp), (grouping.pp, grouping.tp)
    for rank, result in enumerate(results):
        stage = grouping.topology.coordinates(rank).pp
        expected = grouping.received_bytes(matrices) + norms // p_g - norms // p
        if grouping.coordinates(rank).pp == 0:
            expected += end // t_g - (end // t if stage == 0 else 0)
        if grouping.coordinates(rank).pp == p_g - 1:
            expected += end // t_g + final_norm - (end // t + final_norm if stage == p - 1 else 0)
        assert result.transition.received_bytes == expected, rank


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_training_shard_stays_inside_the_generation_weights(generate: Generate, switch: str):
    for result in generate(grouping_of(switch), False):
        seen = result.transition
        assert result.views
        assert seen.redundant_bytes == 0
        assert seen.generation_bytes == sum(4 * w.numel() for w in result.weights.values())
        assert seen.peak_bytes <= seen.generation_bytes + BUCKET_BYTES


@pytest.mark.parametrize(("style", "received"), [("hybridflow", 0.25), ("vanilla", 0.75), ("deepspeed", 0.875)])
def test_the_papers_example_in_shares_of_the_model(generate: Generate, folders, style: Style, received: float):
    """1-4-2 -> 1-2-2-2: with one pipeline stage every matrix is cut, embedding and head included."""
    results = generate(grouping_of("1-4-2 -> 1-2", style), False)
    matrices, norms, end = sizes(folders[False])
    model = matrices + 2 * end
    whole_on_each = (norms + 4 * 32) // 2 if style == "deepspeed" else 0  # ZeRO also shards what tensor ranks replicate
    for result in results:
        assert result.transition.received_bytes == received * model + whole_on_each
        if style != "hybridflow":
            assert model <= result.transition.peak_bytes <= model + norms + 4 * 32 + 2 * BUCKET_BYTES
            assert result.transition.redundant_bytes == pytest.approx(model / 4, abs=norms + 4 * 32)


# --- back to training


@pytest.mark.parametrize("switch", ["1-2-2 -> 1-1", "2-2-2 -> 1-2"])
def test_training_after_switching_back_is_unaffected(worlds, folders, switch: str):
    grouping = grouping_of(switch)
    world = worlds[grouping.topology.world_size]
    switched = world.call(trained, folders[True], grouping, 2)
    straight = world.call(trained, folders[True], grouping, 0)
    for ours, theirs in zip(switched, straight, strict=True):
        assert len(set(ours.received_bytes)) == 1  # the same at every switch
        assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in theirs.weights)


def test_generation_sees_the_trained_weights(worlds, folders):
    grouping = grouping_of("1-2-2 -> 1-1")
    results = worlds[4].call(updated_weights, folders[True], grouping)
    before, _ = whole(folders[True])
    for weights, logits in results:
        assert not torch.equal(weights[EMBEDDING], before[EMBEDDING])
        training, generation = logits[: len(logits) // 2], logits[len(logits) // 2 :]
        torch.testing.assert_close(torch.cat(training), torch.cat(generation), atol=1e-5, rtol=1e-5)


def test_calls_out_of_turn_are_refused(worlds, folders):
    for said in worlds[4].call(refusals, folders[True], grouping_of("1-2-2 -> 1-1")):
        assert said[0].startswith("the hybrid engine is training already")
        assert said[1].startswith("the hybrid engine is generating already")
        assert len(said) == 3  # old weights are not used


def test_a_grouping_of_another_topology_is_refused(folders):
    model = ParallelModel(folders[True], Topology())
    with pytest.raises(ValueError, match="the grouping is of topology 1-2-1, the model trains on 1-1-1"):
        HybridEngine(model, GenerationGrouping(Topology(1, 2, 1)))
