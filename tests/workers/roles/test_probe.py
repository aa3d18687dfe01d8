"""A publication's probe: correct engines pass, whatever the dtype and the model; one wrong small tensor fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from protocols.layout.topology import Topology
from protocols.weights import BadWeights, Probe
from tests import tiny
from tests.workers.batches import VOCABULARY
from workers.generation.publication import verify_installed
from workers.parallel.backends import frozen_model
from workers.parallel.sharding import ONE_DEVICE, Sharding
from workers.roles.probe import answered_probe
from workers.settings import Dtype, Model
from workers.training.models import load_causal

SEED, ROW_TOKENS = 3, 32


def make_experts(at: Path) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        initializer_range=0.1,
    )  # fmt: skip
    return tiny.save_random(Qwen3MoeForCausalLM, config, at, seed=0)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "shallow": lambda at: tiny.make_policy(at, vocabulary=VOCABULARY),
    "deep": lambda at: tiny.make_policy(at, vocabulary=VOCABULARY, layers=12, heads=2),
    "gpt2": lambda at: tiny.make_gpt2(at, vocabulary=VOCABULARY),
    "experts": make_experts,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: str(make(tmp_path_factory.mktemp(name))) for name, make in MAKERS.items()}


def probe_of(folder: str, dtype: Dtype, sharding: Sharding = ONE_DEVICE) -> Probe:
    return answered_probe(frozen_model(Model(path=folder, dtype=dtype), sharding), ROW_TOKENS, SEED)


def answers(model: torch.nn.Module, sequences: list[list[int]]) -> list[list[float]]:
    tokens = torch.tensor(sequences)
    with torch.no_grad():
        log_probs = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MAKERS)
def test_an_engine_that_computes_the_same_weights_in_another_way_passes(folders, name: str, dtype: Dtype):
    probe, model = probe_of(folders[name], dtype), load_causal(folders[name], dtype)
    model.set_attn_implementation("sdpa")
    kernel = verify_installed(probe, lambda sequences: answers(model, sequences))
    exact = verify_installed(probe, lambda sequences: answers(model.float(), sequences))
    assert max(kernel, exact) < 0.8 * probe.tolerance, "there is room for an engine that rounds more"
    assert 0.0 < probe.tolerance < 0.2
    if dtype == "bfloat16":
        assert exact > 0.15 * probe.tolerance, "the tolerance is what rounding explains"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MAKERS)
def test_one_small_tensor_that_is_zero_or_permuted_fails(folders, name: str, dtype: Dtype):
    probe, model = probe_of(folders[name], dtype), load_causal(folders[name], dtype)
    missed: set[str] = set()
    for tensor, parameter in list(model.named_parameters()):
        if ".1." not in tensor:
            continue
        right = parameter.detach().clone()
        for wrong in (right * 0.0, right.flip(0)):
            parameter.data.copy_(wrong)
            try:
                verify_installed(probe, lambda sequences: answers(model, sequences))
                missed.add(tensor)
            except BadWeights as error:
                assert "generation.probe_tolerance" in str(error)
        parameter.data.copy_(right)
    # A query or key bias of one layer may change log-probs less than rounding to bfloat16 does.
    allowed = {f"model.layers.1.self_attn.{name}_proj.bias" for name in "qk"} if dtype == "bfloat16" else set()
    assert missed <= allowed


def test_a_tolerance_of_the_recipe_is_taken_as_it_is_and_nan_never_passes(folders):
    model = frozen_model(Model(path=folders["shallow"]), ONE_DEVICE)
    probe = answered_probe(model, ROW_TOKENS, SEED, tolerance=0.25)
    assert probe.tolerance == 0.25
    off = [[number + 0.2 for number in row] for row in probe.log_probs]
    assert verify_installed(probe, lambda _: off) == pytest.approx(0.2)
    for number in (0.3, math.nan):
        with pytest.raises(BadWeights, match="root mean square"):
            verify_installed(probe, lambda _, n=number: [[x + n for x in row] for row in probe.log_probs])


@pytest.mark.parametrize("topology", ["1-2-1", "2-1-1", "1-1-2"])
def test_sharded_ranks_have_the_batch_of_one_device_and_nearly_its_tolerance(worlds, folders, topology: str):
    alone = probe_of(folders["shallow"], "bfloat16")
    for ours in worlds[2].call(probe_of, folders["shallow"], "bfloat16", Sharding(Topology.parse(topology))):
        assert ours.tokens == alone.tokens
        assert ours.tolerance == pytest.approx(alone.tolerance, rel=0.3)
        assert verify_installed(alone, lambda _, ours=ours: ours.log_probs) < alone.tolerance
