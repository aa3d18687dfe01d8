"""vLLM loads what a policy of each family publishes, answers its probe, and generates with a cache that it sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from protocols.roles import Sampling
from protocols.weights import Version
from tests import families, tiny
from tests.workers.batches import VOCABULARY, experience
from workers.families import CPU_HEAD_SIZES, vllm_is_for_cpu, vllm_support
from workers.generation.engine import generate_all
from workers.generation.packed import received
from workers.generation.vllm import VllmEngine
from workers.roles.policy import PolicyWorker
from workers.settings import Generation, Loss, Model, Optimizer

pytestmark = pytest.mark.vllm

GENERATION = Generation(max_tokens=8, slots=4, max_model_tokens=96)  # the cache is what four such rows need
# All but the one that `validate` refuses; Qwen2 is that of test_vllm.py, and Mistral is here with its window.
FAMILIES = tuple(family for family in families.CONFIGS if family not in ("gpt_neox", "mistral", "qwen2"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_publication_of_a_family_is_proven_and_generates(family: str, tmp_path: Path):
    folder = str(families.make(family, tmp_path / family, vocabulary=VOCABULARY))
    model = Model(path=folder, learning_rate=1e-2)
    policy = PolicyWorker(model, Loss(), Optimizer(), GENERATION, seed=3)
    engine = VllmEngine(folder, GENERATION, 3)
    try:
        for version in (Version(0, 0), Version(0, 1)):
            taken = policy.snapshot(version)
            assert engine.load(received(taken.manifest, taken.buffer, model)).probe_difference < 1e-3
            policy.update(experience(4))
        prompts = tiny.make_prompts(["1+1=", "what is this?"])
        answered = generate_all(engine, prompts, Sampling(max_tokens=8, temperature=1.0))
    finally:
        engine.close()
    assert not answered.failures
    assert answered.batch is not None
    assert all(np.isfinite(row).all() for row in answered.batch.log_probs)


def test_the_table_of_head_sizes_is_vllms():
    if not vllm_is_for_cpu():
        pytest.skip("this vLLM has no attention for CPUs")
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_SIZES


def test_every_family_but_one_is_vllms_own():
    """GPT-NeoX is run by transformers' code, into which a publication is not loaded: `validate` refuses it."""
    support = {family: vllm_support(families.config(family).to_dict()) for family in families.CONFIGS}
    assert {family for family, kind in support.items() if kind != "own"} == {"gpt_neox"}
    assert support["gpt_neox"] == "transformers"
