"""A run of PPO with every model of one family: policy, reference, critic and reward; what it exports loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncflow.recipe.config import to_recipe
from tests import families
from tests.asyncflow.pipeline.runs import finished, metric
from workers.training.models import load_causal, load_reward

APART = {"pools": {"train": {}, "rollout": {}}, "placement": {"generator": {"pool": "rollout"}}, "steps": 2}


@pytest.mark.parametrize(("family", "lora"), [("gpt2", {"rank": 4}), ("opt", {}), ("qwen3_moe", {"rank": 4})])
async def test_a_family_has_every_role_of_a_run(table: dict[str, Any], tmp_path: Path, family: str, lora: Any):
    """GPT-2: transposed layers, learned positions, two names of a head; OPT: no class for a critic; experts."""
    folder = str(families.make(family, tmp_path / "policy"))
    load_reward(folder, seed=5).save_pretrained(str(tmp_path / "reward"))
    (tmp_path / "reward" / "tokenizer.json").write_bytes((tmp_path / "policy" / "tokenizer.json").read_bytes())
    models = {
        "policy": {"path": folder, "learning_rate": 1e-3, "lora": lora},
        "critic": {"path": folder, "learning_rate": 1e-3},
        "reference": {"path": folder},
        "reward": {"path": str(tmp_path / "reward")},
    }
    run = await finished(to_recipe(table | APART | {"models": models, "deterministic": False}))
    assert len(metric(run, "loss")) == 2
    assert {*load_causal(run / "policy").state_dict()} == {*load_causal(folder).state_dict()}
