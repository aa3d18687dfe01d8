"""vLLM receives only the adapters and generates like the adapted policy."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from protocols.weights import BadWeights, Version
from tests import families, tiny
from tests.workers.batches import experience
from workers.generation.packed import received
from workers.generation.vllm import VllmEngine
from workers.roles.policy import PolicyWorker
from workers.settings import Generation, Lora, Loss, Model, Optimizer

pytestmark = pytest.mark.vllm


def test_each_version_of_the_adapters_of_layers_and_experts_is_proven_by_its_probe(tmp_path: Path):
    folder = str(families.make("qwen3_moe", tmp_path / "policy"))
    generation = Generation(slots=8, kv_cache_bytes=2 * 1024 * 1024)
    model = Model(folder, learning_rate=1e-2, lora=Lora(rank=4, publish="adapters"))
    policy = PolicyWorker(model, Loss(), Optimizer(), generation, seed=3)
    rows = experience(8)
    last = len(tiny.VOCABULARY) - 1
    texts = {name: getattr(rows, name) for name in ("prompts", "responses")}
    rows = msgspec.structs.replace(rows, **{n: t.with_values(np.minimum(t.values, last)) for n, t in texts.items()})
    engine = VllmEngine(folder, generation, 3)
    try:
        manifest, buffer = policy.snapshot(Version(0, 0))
        assert engine.load(received(manifest, buffer, model)).probe_difference < 1e-4
        for step in (1, 2):
            policy.update(rows)
            manifest, buffer = policy.snapshot(Version(0, step))
            assert engine.load(received(manifest, buffer, model)).probe_difference < 1e-4
        policy.update(rows)
        late, _ = policy.snapshot(Version(0, 3))
        with pytest.raises(BadWeights, match="probe: log-probs differ"):  # new probe, old weights
            engine.load(received(msgspec.structs.replace(late, tensors=manifest.tensors), buffer, model))
    finally:
        engine.close()
