"""Fixtures for tests of runs and recipes: a small task, its models on disk, and a recipe that trains on it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncflow.recipe.config import Recipe, to_recipe
from tests import tiny

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def last_ray_ends() -> Iterator[None]:
    """Shuts the shared Ray down at the end of the session."""
    yield
    import ray

    ray.shutdown()


@pytest.fixture
def ray_started(last_ray_ends: None) -> None:
    """Starts the Ray that tests share, as a run would. A runtime does not shut it down: the session uses it, too."""
    import ray

    from asyncflow.services.runtime import ray_session

    if not ray.is_initialized():
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
        ray_session.join("local", cpus=2)


@pytest.fixture
def no_ray() -> None:
    """Shuts Ray down, for a test that starts one with its own settings."""
    import ray

    ray.shutdown()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy/, other/ (a second random policy) and reward/ as transformers folders."""
    root = tmp_path_factory.mktemp("models")
    tiny.make_policy(root / "policy", seed=0)
    tiny.make_policy(root / "other", seed=5)
    tiny.make_reward(root / "reward", seed=1)
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and heldout.jsonl with sums of two digits."""
    root, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, count in (("train", 30), ("heldout", 10)):
        pairs = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(count)]
        rows = [json.dumps({"prompt": f"{a}+{b}=", "reference": str(a + b)}) for a, b in pairs]
        (root / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def table(models: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe as a table: deterministic PPO on the local runtime; the policy itself generates with torch."""
    return {
        "name": "test",
        "steps": 5,
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
        "seed": 7,
        "deterministic": True,
        "runtime": "local",
        "folder": str(tmp_path / "runs"),
        "data": {"train": str(data / "train.jsonl"), "eval": str(data / "heldout.jsonl")},
        "models": {
            "policy": {"path": str(models / "policy"), "learning_rate": 1e-3},
            "critic": {"path": str(models / "policy"), "learning_rate": 2e-3},
            "reference": {"path": str(models / "other")},
            "reward": {"path": str(models / "reward")},
        },
        "generation": {"engine": "torch", "max_tokens": 6},
        "advantage": {"kl_coefficient": 0.1, "gae_lambda": 0.9},
        "deadlines": {"stall": 20.0, "give_up": 60.0},
    }


@pytest.fixture
def make_recipe(table: dict[str, Any]) -> MakeRecipe:
    """Makes the recipe with some top-level keys replaced; a nested table is merged into its default."""

    def make(**changes: Any) -> Recipe:
        merged = dict(table)
        for key, value in changes.items():
            merged[key] = {**merged[key], **value} if isinstance(value, dict) and key in merged else value
        return to_recipe(merged)

    return make
