"""What every run of `asyncflow bench learning` starts from: sorting five letters, and a policy right on some of them.

The task is learnable in a minute on one core: 40 demonstrations take the policy to a third of the held-out
problems, and the rest is left for reinforcement. Recipes give the algorithm and its numbers; data, models and
their learning rates are this file's, since a policy eight times smaller than a demonstration's wants a higher rate.
"""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import msgspec

from asyncflow.config import Recipe
from asyncflow.demo.task import LETTERS, demonstration, distinct, write_rows
from workers.datasets import Problem
from workers.finetune_settings import Schedule, SftSettings

POLICY_RATE, CRITIC_RATE = 5e-4, 1e-3


class Sizes(msgspec.Struct, frozen=True):
    """The task and the policy."""

    letters: int = 5
    demonstrations: int = 40
    train: int = 2_500  # prompts
    heldout: int = 500
    layers: int = 2
    width: int = 64  # of a policy of 0.13 million parameters
    sft_steps: int = 150
    seed: int = 0

    @property
    def max_tokens(self) -> int:
        """Of a response: the answer, its end, and room to be too long."""
        return self.letters + 2


QUICK = Sizes(train=300, heldout=20, sft_steps=2)


def overrides(recipe: Recipe, folder: Path, sizes: Sizes) -> list[str]:
    """What puts a recipe on this task: data, models with their learning rates, and the lengths of responses."""
    changed = [f"data.train='{folder / 'train.jsonl'}'", f"data.eval='{folder / 'heldout.jsonl'}'"]
    for role, model in recipe.models.items():
        if model.path:
            changed.append(f"models.{role}.path='{folder / 'sft'}'")
        if model.learning_rate:
            changed.append(f"models.{role}.learning_rate={POLICY_RATE if role == 'policy' else CRITIC_RATE}")
    if "overlong_limit" in recipe.advantage:  # all of the price at the limit, none for an answer with its end
        changed += [f"advantage.overlong_limit={sizes.max_tokens}", "advantage.overlong_buffer=1"]
    return [*changed, f"generation.max_tokens={sizes.max_tokens}"]


def prepare(folder: Path, sizes: Sizes) -> None:
    """Write data and models below `folder`, unless they are there. Seconds."""
    from asyncflow.demo.model import model_config, write_base_model
    from workers.sft import train_sft

    if (folder / "sft").exists():
        return
    problems = distinct(lambda rng: _sorting(rng, sizes.letters), sizes.seed)
    write_rows(folder / "heldout.jsonl", islice(problems, sizes.heldout))
    write_rows(folder / "train.jsonl", islice(problems, sizes.train))
    write_rows(folder / "sft.jsonl", map(demonstration, islice(problems, sizes.demonstrations)))
    write_base_model(folder / "base", sizes.seed, model_config(sizes.layers, sizes.width))
    train_sft(
        SftSettings(
            model=str(folder / "base"),
            data=str(folder / "sft.jsonl"),
            output=str(folder / "sft"),
            schedule=Schedule(sizes.sft_steps, batch_size=32, learning_rate=2e-3, decay="linear", seed=sizes.seed),
        )
    )


def _sorting(rng: random.Random, letters: int) -> Problem:
    """`S:dbcaa=` -> `aabcd`."""
    drawn = rng.choices(LETTERS, k=letters)
    return Problem(f"S:{''.join(drawn)}=", "".join(sorted(drawn)))
