"""Checks a recipe's models: their roles, folders, rules and mixes, and where and on how many ranks they are placed."""

from __future__ import annotations

import importlib.util
import math

from asyncflow.dataflow.graph import Dataflow
from asyncflow.recipe.config import BadInput, Placed, Recipe, nearest
from asyncflow.recipe.model_folders import check_folder, config_of
from asyncflow.recipe.service_specs import (
    GENERATOR,
    colocates_vllm,
    is_collective,
    layout_of,
    pools_of,
    roles_of,
    stateful,
    topology_of,
)
from asyncflow.services.ranks.role_specs import ROLE_SPECS
from protocols.roles import ROLES
from workers.data.hf_folder import end_tokens_of, vocabulary_in
from workers.data.tokenizer import Tokenizer
from workers.data.tokenizer_difference import difference
from workers.parallel.plan import Decoder, ShardPlan, has_plan
from workers.settings import Model


def check_roles(recipe: Recipe, dataflow: Dataflow) -> None:
    """Check that the recipe has a model for each role that the algorithm calls. Raises BadInput."""
    for role in recipe.models:
        if role not in ROLES:
            raise BadInput(f"models.{role}: no such role{nearest(role, ROLES)}")
    for role in roles_of(dataflow):
        if role not in ROLES:
            raise BadInput(f"algorithm {recipe.algorithm!r} calls the role {role!r}, which this version does not run")
        if role not in recipe.models:
            raise BadInput(
                f"algorithm {recipe.algorithm!r} needs models.{role}, the recipe has {', '.join(recipe.models)}"
            )


def check_placement(recipe: Recipe, dataflow: Dataflow) -> None:
    """Check that this version can run the pools and the placement. Raises BadInput."""
    if not recipe.pools:
        raise BadInput("pools: at least one pool is needed")
    for service in recipe.delays:
        if service not in pools_of(recipe, dataflow):
            raise BadInput(f"delays.{service}: no such service{nearest(service, pools_of(recipe, dataflow))}")
    known = {*roles_of(dataflow), GENERATOR}
    for service, placed in recipe.placement.items():
        if service not in known:
            raise BadInput(f"placement.{service}: no such service{nearest(service, known)}")
        if service in recipe.models and recipe.models[service].outside:
            raise BadInput(f"placement.{service}: its model is external and takes no device; leave it out")
        if placed.pool not in recipe.pools:
            raise BadInput(f"placement.{service}.pool = {placed.pool!r}{nearest(placed.pool, recipe.pools)}")
        _check_parallel(recipe, service, placed)
    if colocates_vllm(recipe) and (layout := layout_of(recipe, "policy")).pp > 1:
        raise BadInput(
            f"placement.policy: parallel = {recipe.placement['policy'].parallel!r} generates in {layout.pp} stages, "
            f"and vLLM is fed in one: generation = '1-{layout.tp}', or generation.engine = 'torch', "
            f"or a [placement] of {GENERATOR}"
        )
    if recipe.models["policy"].lora.rank:
        _check_adapters_placed(recipe)


def _check_parallel(recipe: Recipe, service: str, placed: Placed) -> None:
    """Check that this version can run so many ranks, and that the pool has the devices. Raises BadInput."""
    where = f"placement.{service}: parallel = {placed.parallel!r}, replicas = {placed.replicas}"
    try:
        topology, _ = topology_of(recipe, service), layout_of(recipe, service)
    except ValueError as error:
        raise BadInput(f"placement.{service}: {error}") from None
    devices = recipe.pools[placed.pool].devices
    if placed.replicas != 1:
        raise BadInput(f"{where}: this version runs one replica of a service: replicas = 1")
    if service == GENERATOR and topology.world_size > 1:
        raise BadInput(f"{where}: this version runs generators of one rank; a policy's own ranks may generate instead")
    model = recipe.models.get(service, Model())
    if (topology.replica_size > 1 or placed.backend == "fsdp") and (model.rule or model.mix):
        raise BadInput(
            f"{where}, backend = {placed.backend!r}: a rule or a mix can't be divided over ranks: "
            "parallel = '1-1-d' and no backend"
        )
    if topology.world_size > devices:
        raise BadInput(f"{where}: {topology.world_size} ranks in pool {placed.pool!r} of {devices} devices")
    _check_collective(recipe, service, placed)


def _check_collective(recipe: Recipe, service: str, placed: Placed) -> None:
    """Check the settings of collective ranks, which only they may have. Raises BadInput."""
    if placed.generation and (service != "policy" or GENERATOR in recipe.placement):
        raise BadInput(
            f"placement.{service}.generation = {placed.generation!r}: only a policy's own ranks generate, "
            f"where no {GENERATOR} is placed; leave it out"
        )
    if placed.recompute and not ROLE_SPECS[service].trains:
        raise BadInput(
            f"placement.{service}.recompute = true: it saves memory in training, and {service} does not train; "
            "leave it out"
        )
    several = topology_of(recipe, service).world_size > 1
    if placed.backend != "3d" and not several:
        raise BadInput(
            f"placement.{service}.backend = {placed.backend!r}: it says what several ranks divide, "
            f"{service} on {placed.parallel} has one; leave it out"
        )
    if placed.backend in ("zero1", "zero2") and not ROLE_SPECS[service].trains:
        raise BadInput(
            f"placement.{service}.backend = {placed.backend!r}: it divides what training needs, and {service} does not "
            "train: 'fsdp' divides its weights, without a backend each replica has them whole"
        )
    collective = is_collective(recipe, service) and several
    if collective and recipe.runtime == "local":
        raise BadInput(
            f"placement.{service}.parallel = {placed.parallel!r}: ranks that work together need a process each, "
            "runtime = 'local' has one; take runtime = 'ray'"
        )


def _check_adapters_placed(recipe: Recipe) -> None:
    """Refuse to train a policy's adapters where its ranks share the model or generate with vLLM. Raises BadInput."""
    topology = topology_of(recipe, "policy")
    if topology.replica_size > 1 or (topology.dp > 1 and GENERATOR not in recipe.placement):
        raise BadInput(
            "models.policy.lora: adapters train on ranks that hold the whole model, "
            f"placement.policy.parallel = {recipe.placement['policy'].parallel!r}: want '1-1-1', "
            "or '1-1-d' and a [placement] of generator, or no lora"
        )
    if colocates_vllm(recipe):
        raise BadInput(
            "models.policy.lora: a vLLM beside the policy takes whole weights, no adapters: "
            "want generation.engine = 'torch', or a [placement] of generator"
        )


def check_models(recipe: Recipe, dataflow: Dataflow) -> None:
    """Check that each role has one model, that its files exist, and that all share a tokenizer. Raises BadInput."""
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
            if not ROLE_SPECS[role].scores:
                raise BadInput(f"models.{role}.rule = {model.rule!r}: only rewards and costs are rules")
        elif role in trained and not 0 < model.learning_rate < math.inf:
            raise BadInput(f"models.{role}.learning_rate = {model.learning_rate}: a trained model needs one above 0")
    _check_lora(recipe)
    _check_attention(recipe)
    folders = {role: recipe.models[role].path for role in roles_of(dataflow) if recipe.models[role].path}
    parts = recipe.models["reward"].mix if "reward" in roles_of(dataflow) else []
    folders |= {f"reward.mix.{part.name}": part.path for part in parts if part.path}
    _check_same_vocabulary(folders)
    for role, folder in folders.items():
        check_folder(role, folder)


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


def _check_outside(recipe: Recipe, role: str) -> None:
    model = recipe.models[role]
    if model.path or model.rule or model.mix:
        raise BadInput(
            f"models.{role}: its worker is external (outside = true) and has the model: "
            f"leave out path, rule and mix (path = {model.path!r}, rule = {model.rule!r}, {len(model.mix)} parts)"
        )
    if not ROLE_SPECS[role].scores:
        raise BadInput(f"models.{role}.outside = true: only rewards and costs can be external")
    seconds, give_up = recipe.failures.outside_timeout_seconds, recipe.deadlines.give_up
    if seconds >= give_up:
        raise BadInput(
            f"failures.outside_timeout_seconds = {seconds:g}: a run without progress for "
            f"deadlines.give_up = {give_up:g} s is ended; want less than that"
        )


def _check_same_vocabulary(folders: dict[str, str]) -> None:
    """Check that models which exchange token ids have tokenizers that do the same, and rows for all ids; and that the
    policy names a token that ends a response. Raises BadInput.
    """
    own = folders["policy"]
    rows = {role: vocabulary_in(config_of(role, folder)) for role, folder in folders.items()}
    try:
        ids = Tokenizer(own).size
        end_tokens_of(own)
    except ValueError as error:
        raise BadInput(f"models.policy.path: {error}") from error
    ids = min(ids, rows["policy"] or ids)  # a policy has no rows for tokens that are never used
    for role, folder in folders.items():
        size = rows[role]
        if size is not None and size < ids:
            raise BadInput(
                f"models.{role}: {folder} has {size} rows of vocabulary, and the policy's tokens have ids up to "
                f"{ids - 1} ({own}): want a model whose embedding has a row for each"
            )
        try:
            unlike = difference(own, folder)
        except ValueError as error:
            raise BadInput(f"models.{role}: {error}") from error
        if unlike:
            raise BadInput(
                f"models.{role}: its tokenizer differs from the policy's: {unlike}; token ids would mean other text"
            )


def _check_lora(recipe: Recipe) -> None:
    """Refuse adapters that this version can't train, wherever they are placed. Raises BadInput."""
    adapted = [role for role, model in recipe.models.items() if model.lora.rank]
    if others := [role for role in adapted if role != "policy"]:
        raise BadInput(f"models.{others[0]}.lora: only the policy trains adapters; leave it out")
    if adapted and not is_module("peft"):
        raise BadInput("models.policy.lora needs peft: pip install 'asyncflow[lora]'")
    if adapted:
        from workers.training.lora import unadaptable  # torch: seconds that most recipes do without

        policy = recipe.models["policy"]
        if reason := unadaptable(policy.path, policy.lora):
            raise BadInput(f"models.policy.{reason}")


def _check_attention(recipe: Recipe) -> None:
    """Refuse flash attention where it can't run. Raises BadInput."""
    for role, model in recipe.models.items():
        if model.attention != "flash_attention_2":
            continue
        if model.dtype != "bfloat16":
            raise BadInput(
                f"models.{role}.attention = 'flash_attention_2' computes in bfloat16, dtype = {model.dtype!r}"
            )
        if not is_module("flash_attn"):
            raise BadInput(f"models.{role}.attention = 'flash_attention_2' needs flash-attn; 'sdpa' needs nothing")


def check_shards(recipe: Recipe, dataflow: Dataflow) -> None:
    """Check that a model's sizes divide by the ranks that share it. Raises BadInput.

    A family without a sharding plan stands whole on each rank: it can be replicated or fully sharded, not cut.
    """
    for role in roles_of(dataflow):
        if not is_collective(recipe, role):
            continue
        config, topology = config_of(role, recipe.models[role].path), topology_of(recipe, role)
        generates = role == "policy" and GENERATOR not in recipe.placement
        if topology.replica_size == 1 and not generates and not has_plan(config):
            continue
        placed, layout = recipe.placement.get(role, Placed("")), layout_of(recipe, role)
        ways = {f"parallel = {placed.parallel!r}": topology, f"generation = {placed.generation!r}": layout}
        for where, cut in ways.items():
            try:
                ShardPlan(Decoder.of(config, ROLE_SPECS[role].head), cut.pp, cut.tp)
            except ValueError as error:
                other = "" if has_plan(config) else _for_any_family(recipe, role)
                raise BadInput(f"placement.{role}.{where}: {error}{other}") from error


def _for_any_family(recipe: Recipe, role: str) -> str:
    """What works for a family without a sharding plan, where its model would be cut or generate with shards."""
    if topology_of(recipe, role).replica_size > 1:
        return "; want parallel = '1-1-d' with backend = 'fsdp', which takes any family"
    torch = " or generation.engine = 'torch'" if topology_of(recipe, role).world_size == 1 else ""
    return f"; want a [placement] of {GENERATOR}{torch}"


def is_module(name: str) -> bool:
    """Whether a module of that name exists. It is not imported, but its parent packages are."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent that isn't there, or an empty name
        return False
