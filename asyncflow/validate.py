"""Everything that can be wrong with a recipe, found before a model loads, each with one clear error."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from asyncflow.compose import (
    REPLICATED,
    check_placement,
    check_roles,
    colocates_vllm,
    is_collective,
    layout_of,
    roles_of,
    stateful,
    topology_of,
)
from asyncflow.config import BadInput, Placed, Recipe, nearest
from asyncflow.control.prompts import DataRow, PromptSource
from asyncflow.dataflow.graph import Dataflow, DataflowError
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.steering import with_steering
from asyncflow.dataflow.trace import Declaration, declaration_of, numbers_of, trace
from asyncflow.planning import automatic, pinning
from asyncflow.planning.scenarios import prompt_lengths
from protocols.topology import Topology
from workers.advantages.adaptive_kl import KL_COEFFICIENT, KlSteering, steering_of
from workers.datasets import DataError, Problem, read_rows
from workers.pretraining import text_of
from workers.rewards.rules import rule_named
from workers.settings import Loss, Model
from workers.sharding.plan import Decoder, Head, ShardPlan


class Checked(msgspec.Struct):
    """A recipe that can run: paths absolute, data read, graph traced."""

    recipe: Recipe
    dataflow: Dataflow
    train: PromptSource
    heldout: PromptSource | None
    plan: str = ""  # of a recipe that leaves its placement to the mapper: what it chose, as a plan's file


def check(recipe: Recipe) -> Checked:
    """Check a recipe against its files, and place it where it leaves that to the mapper. Raises BadInput."""
    if recipe.placed_by not in ("", automatic.AUTO):
        recipe = pinning.pinned(recipe, recipe.placed_by)
    recipe = automatic.check_devices(recipe)
    try:
        algorithm = algorithm_named(recipe.algorithm)
        dataflow = trace(algorithm)
    except DataflowError as error:
        raise BadInput(f"algorithm: {error}") from error
    check_roles(recipe, dataflow)
    if not recipe.placed_by:
        check_placement(recipe, dataflow)
    _check_samples(recipe, declaration_of(algorithm))
    _check_numbers(recipe, dataflow)
    dataflow = _steered(recipe, dataflow)
    _check_mode(recipe)
    _check_loss(recipe.loss)
    _check_reference(recipe, dataflow)
    recipe = _absolute(recipe)
    _check_models(recipe, dataflow)
    _check_lora(recipe)
    _check_shards(recipe, dataflow)
    _check_pretraining(recipe)
    train, heldout = _sources(recipe)
    _check_context(recipe, train, heldout)
    if not recipe.placed_by:
        return Checked(recipe, dataflow, train, heldout)
    choice = automatic.place(recipe, dataflow, prompt_lengths(train))
    _check_lora(choice.chosen.recipe)
    _check_shards(choice.chosen.recipe, dataflow)
    return Checked(choice.chosen.recipe, dataflow, train, heldout, pinning.text_of(choice))


def _check_samples(recipe: Recipe, declared: Declaration) -> None:
    if recipe.samples_per_prompt < declared.least_samples:
        raise BadInput(
            f"samples_per_prompt = {recipe.samples_per_prompt}: algorithm {recipe.algorithm!r} compares the samples "
            f"of a prompt, want {declared.least_samples} or more"
        )


def _check_numbers(recipe: Recipe, dataflow: Dataflow) -> None:
    function = dataflow.batch_stage.function
    assert function is not None
    known = numbers_of(function)
    kinds = get_type_hints(function)
    if KL_COEFFICIENT in known:
        known |= msgspec.structs.asdict(KlSteering())
        kinds |= get_type_hints(KlSteering)
    for name, value in recipe.advantage.items():
        if name not in known:
            raise BadInput(f"advantage.{name}: {function.__name__} has no such number{nearest(name, known)}")
        kind = kinds.get(name, type(known[name]))
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise BadInput(f"advantage.{name} = {value!r}: want a value like {known[name]!r}: {error}") from error


def _steered(recipe: Recipe, dataflow: Dataflow) -> Dataflow:
    """The dataflow with the KL coefficient that the recipe wants, whose numbers must be able to steer it."""
    function = dataflow.batch_stage.function
    assert function is not None
    idle = sorted(recipe.advantage.keys() & {"kl_target", "kl_horizon"})
    try:
        steering = steering_of(recipe.advantage)
        if steering.kl == "fixed" and idle:
            raise BadInput(f"advantage.{idle[0]}: a fixed coefficient has none; add kl = 'adaptive', or leave it out")
        if steering.kl == "adaptive":
            start: Any = {**numbers_of(function), **recipe.advantage}[KL_COEFFICIENT]
            steering.from_coefficient(float(start)).after(0.0, recipe.samples_per_step)
    except ValueError as error:
        raise BadInput(f"advantage.kl = 'adaptive': {error}") from error
    return with_steering(dataflow, recipe.advantage)


def _check_mode(recipe: Recipe) -> None:
    if recipe.deterministic and (recipe.staleness or recipe.runtime != "local" or recipe.threads != 1):
        raise BadInput(
            f"deterministic = true needs staleness = 0, runtime = 'local' and threads = 1; "
            f"got {recipe.staleness}, {recipe.runtime!r}, {recipe.threads}"
        )
    if not 0 < recipe.generation.temperature < math.inf:
        raise BadInput(
            f"generation.temperature = {recipe.generation.temperature}: rollouts are drawn at a temperature above 0"
        )


LOSSES = ("ppo", "gspo", "cispo", "reinforce")  # those of workers.losses, which a test compares: it imports torch


def _check_loss(loss: Loss) -> None:
    module, colon, function = loss.policy.partition(":")
    if loss.policy not in LOSSES and not (colon and module and function):
        raise BadInput(f"loss.policy = {loss.policy!r}{nearest(loss.policy, LOSSES)}")
    if colon and not _is_module(module):
        raise BadInput(f"loss.policy = {loss.policy!r}: there is no module {module!r} on the path")


def _check_reference(recipe: Recipe, dataflow: Dataflow) -> None:
    """A KL in the loss needs the reference's log-probs in the experience, which come by way of the batch function."""
    if recipe.loss.kl_coefficient and not any(i.startswith("reference.") for i in dataflow.batch_stage.inputs):
        raise BadInput(
            f"loss.kl_coefficient = {recipe.loss.kl_coefficient}: algorithm {recipe.algorithm!r} asks no reference "
            "for log-probs; want 0, or an algorithm that does, as 'grpo'"
        )


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent that isn't there, or an empty name
        return False


def _absolute(recipe: Recipe) -> Recipe:
    def full(path: str) -> str:
        return str(Path(path).absolute()) if path else ""

    def absolute(model: Model) -> Model:
        mix = [msgspec.structs.replace(part, path=full(part.path)) for part in model.mix]
        return msgspec.structs.replace(model, path=full(model.path), mix=mix)

    models = {role: absolute(model) for role, model in recipe.models.items()}
    paths = {name: full(getattr(recipe.data, name)) for name in ("train", "eval", "pretrain")}
    data = msgspec.structs.replace(recipe.data, **paths)
    return msgspec.structs.replace(recipe, models=models, data=data, folder=full(recipe.folder))


def _check_models(recipe: Recipe, dataflow: Dataflow) -> None:
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
        _config_of(role, folder)
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


def _check_shards(recipe: Recipe, dataflow: Dataflow) -> None:
    """The sizes of a model that is cut over ranks must divide."""
    for role in roles_of(dataflow):
        topology = topology_of(recipe, role)
        if not is_collective(recipe, role):
            continue
        head: Head = "tokens" if role in ("policy", "reference") else "score" if role in REPLICATED else "value"
        placed, layout = recipe.placement.get(role, Placed("")), layout_of(recipe, role)
        ways = {f"parallel = {placed.parallel!r}": topology, f"generation = {placed.generation!r}": layout}
        for where, cut in ways.items():
            try:
                ShardPlan(Decoder.of(_config_of(role, recipe.models[role].path), head), cut.pp, cut.tp)
            except ValueError as error:
                raise BadInput(f"placement.{role}.{where}: {error}") from error


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


def _check_lora(recipe: Recipe) -> None:
    adapted = [role for role, model in recipe.models.items() if model.lora.rank]
    if others := [role for role in adapted if role != "policy"]:
        raise BadInput(f"models.{others[0]}.lora: only the policy trains adapters; leave it out")
    placed = recipe.placement.get("policy")
    if adapted and placed is not None and Topology.parse(placed.parallel).world_size > 1:
        raise BadInput(
            f"models.policy.lora: adapters train on one rank, placement.policy.parallel = {placed.parallel!r}: "
            "want '1-1-1', or no lora"
        )
    if adapted and colocates_vllm(recipe):
        raise BadInput(
            "models.policy.lora: a vLLM beside the policy takes whole weights, no adapters: "
            "want generation.engine = 'torch', or a [placement] of generator"
        )
    if adapted and not _is_module("peft"):
        raise BadInput("models.policy.lora needs peft: pip install 'asyncflow[lora]'")


def _check_rule(where: str, name: str) -> None:
    try:
        rule_named(name)
    except LookupError as error:
        raise BadInput(f"{where}: {error.args[0]}") from error


def _config_of(role: str, folder: str) -> dict[str, Any]:
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


def _check_same_vocabulary(folders: dict[str, str]) -> None:
    """Models that exchange token ids must mean the same by them."""
    own = folders["policy"]
    tokenizer = Path(own) / "tokenizer.json"
    if not tokenizer.exists():
        raise BadInput(f"models.policy.path: {own} has no tokenizer.json")
    size, digest = _config_of("policy", own).get("vocab_size"), _digest(tokenizer)
    for role, folder in folders.items():
        other = _config_of(role, folder).get("vocab_size")
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


def _sources(recipe: Recipe) -> tuple[PromptSource, PromptSource | None]:
    train = _source(recipe, recipe.data.train)
    return train, _source(recipe, recipe.data.eval) if recipe.data.eval else None


def _source(recipe: Recipe, path: str) -> PromptSource:
    rows = _rows(recipe, path)
    try:
        return PromptSource(rows, recipe.models["policy"].path, recipe.seed)
    except ValueError as error:
        raise BadInput(f"data: {path}: {error}") from error


def _rows(recipe: Recipe, path: str) -> list[DataRow]:
    columns = {"prompt": recipe.data.prompt}
    if recipe.data.reference:
        columns["reference"] = recipe.data.reference
    needs_reference = any(m.rules for m in recipe.models.values()) or bool(recipe.data.eval)
    try:
        rows = read_rows(path, DataRow if needs_reference else Problem, columns, recipe.models["policy"].path)
    except DataError as error:
        raise BadInput(f"data: {error}") from error
    return [DataRow(r.prompt, r.reference) for r in rows]


def _check_pretraining(recipe: Recipe) -> None:
    path, loss = recipe.data.pretrain, recipe.loss
    if bool(path) != bool(loss.ptx_coefficient):
        raise BadInput(
            f"data.pretrain = {path!r}, loss.ptx_coefficient = {loss.ptx_coefficient}: the pretraining loss wants "
            "both, a text and a coefficient above 0, or neither"
        )
    if path:
        try:
            text_of(loss, path, recipe.models["policy"].path, recipe.seed)
        except (DataError, ValueError) as error:
            raise BadInput(f"data.pretrain: {error}") from error


def _check_context(recipe: Recipe, *sources: PromptSource | None) -> None:
    config = _config_of("policy", recipe.models["policy"].path)
    limit = recipe.generation.max_model_tokens or config.get("max_position_embeddings")
    for source in sources:
        if source is not None and limit and source.longest + recipe.generation.max_tokens > limit:
            raise BadInput(
                f"generation.max_tokens = {recipe.generation.max_tokens}: the longest prompt has "
                f"{source.longest} tokens and the policy's context is {limit}"
            )
