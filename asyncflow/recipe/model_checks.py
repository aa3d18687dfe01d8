"""What can be wrong with a recipe's models: their folders, rules and mixes, and how they are cut over ranks."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import msgspec

from asyncflow.dataflow.graph import Dataflow
from asyncflow.recipe.config import BadInput, Placed, Recipe
from asyncflow.recipe.service_specs import (
    REPLICATED,
    colocates_vllm,
    is_collective,
    layout_of,
    roles_of,
    stateful,
    topology_of,
)
from workers.parallel.plan import Decoder, Head, ShardPlan
from workers.rewards.rules import rule_named
from workers.settings import Model


def check_models(recipe: Recipe, dataflow: Dataflow) -> None:
    """Each role that the algorithm calls has one model that is there; all mean the same by a token. Raises BadInput."""
    trained = stateful(dataflow)
    for role in roles_of(dataflow):
        model = recipe.models[role]
        if model.outside:
            _check_outside(recipe, role)
            continue
        if model.mix:
            _check_mix(role, model)
            continue
        if bool(model.path) == bool(model.rule):
            raise BadInput(
                f"models.{role}: give a path or a rule, one of them (path = {model.path!r}, rule = {model.rule!r})"
            )
        if model.rule:
            _check_rule(f"models.{role}.rule", model.rule)
            if role not in ("reward", "cost"):
                raise BadInput(f"models.{role}.rule = {model.rule!r}: only rewards and costs are rules")
        elif role in trained and not 0 < model.learning_rate < math.inf:
            raise BadInput(f"models.{role}.learning_rate = {model.learning_rate}: a trained model needs one above 0")
    if recipe.data.eval:
        _check_rule("evaluation.metric", recipe.evaluation.metric)
    folders = {role: recipe.models[role].path for role in roles_of(dataflow) if recipe.models[role].path}
    parts = recipe.models["reward"].mix if "reward" in roles_of(dataflow) else []
    folders |= {f"reward.mix.{part.name}": part.path for part in parts if part.path}
    for role, folder in folders.items():
        config_of(role, folder)
    _check_same_vocabulary(folders)


def _check_mix(role: str, model: Model) -> None:
    if role != "reward":
        raise BadInput(f"models.{role}.mix: only rewards are mixed")
    if model.path or model.rule:
        raise BadInput(
            f"models.{role}: a mix has its models in its parts: leave out path and rule beside it "
            f"(path = {model.path!r}, rule = {model.rule!r})"
        )
    names = [part.name for part in model.mix]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BadInput(f"models.{role}.mix: name = {min(twice)!r} occurs twice: each part has a name of its own")
    for part in model.mix:
        if part.rule:
            _check_rule(f"models.{role}.mix.{part.name}.rule", part.rule)


def _check_outside(recipe: Recipe, role: str) -> None:
    model = recipe.models[role]
    if model.path or model.rule or model.mix:
        raise BadInput(
            f"models.{role}: its worker is outside, which has the model: "
            f"leave out path, rule and mix (path = {model.path!r}, rule = {model.rule!r}, {len(model.mix)} parts)"
        )
    if role not in ("reward", "cost"):
        raise BadInput(f"models.{role}.outside = true: only rewards and costs can be outside")
    seconds, give_up = recipe.failures.outside_timeout_seconds, recipe.deadlines.give_up
    if seconds >= give_up:
        raise BadInput(
            f"failures.outside_timeout_seconds = {seconds:g}: a run in which nothing moves for "
            f"deadlines.give_up = {give_up:g} s is ended; want less than that"
        )


def _check_rule(where: str, name: str) -> None:
    try:
        rule_named(name)
    except LookupError as error:
        raise BadInput(f"{where}: {error.args[0]}") from error


def _check_same_vocabulary(folders: dict[str, str]) -> None:
    """Models that exchange token ids must mean the same by them."""
    own = folders["policy"]
    tokenizer = Path(own) / "tokenizer.json"
    if not tokenizer.exists():
        raise BadInput(f"models.policy.path: {own} has no tokenizer.json")
    size, digest = config_of("policy", own).get("vocab_size"), _digest(tokenizer)
    for role, folder in folders.items():
        other = config_of(role, folder).get("vocab_size")
        if other != size:
            raise BadInput(f"models.{role}: vocabulary of {other} tokens where the policy has {size} ({folder}, {own})")
        path = Path(folder) / "tokenizer.json"
        if not path.exists() or _digest(path) != digest:
            raise BadInput(
                f"models.{role}: its tokenizer differs from the policy's ({path}, {tokenizer}): "
                "token ids would mean other text"
            )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_lora(recipe: Recipe) -> None:
    """Adapters are trained where this version can train them. Raises BadInput."""
    adapted = [role for role, model in recipe.models.items() if model.lora.rank]
    if others := [role for role in adapted if role != "policy"]:
        raise BadInput(f"models.{others[0]}.lora: only the policy trains adapters; leave it out")
    if adapted and topology_of(recipe, "policy").world_size > 1:
        raise BadInput(
            "models.policy.lora: adapters train on one rank, "
            f"placement.policy.parallel = {recipe.placement['policy'].parallel!r}: want '1-1-1', or no lora"
        )
    if adapted and colocates_vllm(recipe):
        raise BadInput(
            "models.policy.lora: a vLLM beside the policy takes whole weights, no adapters: "
            "want generation.engine = 'torch', or a [placement] of generator"
        )
    if adapted and not is_module("peft"):
        raise BadInput("models.policy.lora needs peft: pip install 'asyncflow[lora]'")


def check_shards(recipe: Recipe, dataflow: Dataflow) -> None:
    """The sizes of a model that is cut over ranks must divide. Raises BadInput."""
    for role in roles_of(dataflow):
        topology = topology_of(recipe, role)
        if not is_collective(recipe, role):
            continue
        head: Head = "tokens" if role in ("policy", "reference") else "score" if role in REPLICATED else "value"
        placed, layout = recipe.placement.get(role, Placed("")), layout_of(recipe, role)
        ways = {f"parallel = {placed.parallel!r}": topology, f"generation = {placed.generation!r}": layout}
        for where, cut in ways.items():
            try:
                ShardPlan(Decoder.of(config_of(role, recipe.models[role].path), head), cut.pp, cut.tp)
            except ValueError as error:
                raise BadInput(f"placement.{role}.{where}: {error}") from error


def config_of(role: str, folder: str) -> dict[str, Any]:
    """The config.json of a role's transformers folder. Raises BadInput where it is none, or lacks its weights."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise BadInput(f"models.{role}.path: no folder {folder}")
    if not path.exists():
        raise BadInput(f"models.{role}.path: {folder} is no transformers folder, it has no config.json")
    if not any(Path(folder).glob("*.safetensors")):
        raise BadInput(f"models.{role}.path: {folder} has no *.safetensors weights")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadInput(f"models.{role}.path: {path}: {error}") from error


def is_module(name: str) -> bool:
    """Whether there is a module of that name, which is not loaded (its parents are)."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent that isn't there, or an empty name
        return False
