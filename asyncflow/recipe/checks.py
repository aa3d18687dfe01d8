"""Checks a recipe against its algorithm and its files before anything starts; each mistake is one clear error.

`check` lists the checks in order; those of the models and their placement are in `model_checks`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import msgspec
from msgspec.structs import replace

from asyncflow.control.admission.prompts import PromptSource
from asyncflow.control.evaluation_sets import EvaluationSet
from asyncflow.dataflow.graph import Dataflow, DataflowError
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.steering import with_steering
from asyncflow.dataflow.trace import Declaration, declaration_of, defaults_of, trace
from asyncflow.recipe.config import BadInput, Recipe, nearest
from asyncflow.recipe.engine_checks import check_engine, with_context
from asyncflow.recipe.evaluations import data_of, sets_of
from asyncflow.recipe.model_checks import check_models, check_placement, check_roles, check_shards
from asyncflow.recipe.model_folders import config_of
from asyncflow.recipe.prompt_sources import heldout_prompts, train_prompts
from asyncflow.recipe.rule_checks import loaded_rules
from asyncflow.recipe.tracker_checks import check_trackers
from asyncflow.services.channels.prompt_join import LEAST_OF_GROUP
from workers.advantages.adaptive_kl import KL_COEFFICIENT, KlSteering, steering_of
from workers.data.datasets import DataError
from workers.data.pretraining import text_of
from workers.settings import Loss, Model
from workers.user_code import BadCode, source_of


class Checked(msgspec.Struct):
    """A recipe that can run: paths absolute, data read, graph traced."""

    recipe: Recipe
    dataflow: Dataflow
    train: PromptSource
    heldout: list[tuple[EvaluationSet, PromptSource]]
    notes: list[str] = []  # what a user should know of the data: the mix, rows that are left out
    plan: str = ""  # the placement that the planner chose, as the text of a plan file; "": the recipe has its own


def check(recipe: Recipe) -> Checked:
    """Check a recipe against its files. Raises BadInput.

    A recipe without a placement (`placed_by` is set) passes all other checks; `asyncflow.run.prepare` then finds a
    placement that passes `check_placement` and calls `check_shards` and `check_engine`.
    """
    try:
        algorithm = algorithm_named(recipe.algorithm)
        dataflow = trace(algorithm)
    except DataflowError as error:
        raise BadInput(f"algorithm: {error}") from error
    check_roles(recipe, dataflow)
    if not recipe.placed_by:
        check_placement(recipe, dataflow)
    _check_samples_per_prompt(recipe, declaration_of(algorithm))
    _check_partial_groups(recipe)
    _check_advantage_kwargs(recipe, dataflow)
    dataflow = _with_kl_steering(recipe, dataflow)
    _check_deterministic(recipe)
    check_trackers(recipe.observe)
    _check_policy_loss(recipe.loss)
    _check_kl_has_reference(recipe, dataflow)
    recipe = _with_absolute_paths(recipe)
    check_models(recipe, dataflow)
    _check_stop_token_ids(recipe)
    if not recipe.placed_by:
        check_shards(recipe, dataflow)
    notes = _check_pretraining_text(recipe)
    heldout: list[tuple[EvaluationSet, PromptSource]] = []
    with loaded_rules(recipe, dataflow) as rules:
        train, more = train_prompts(recipe, rules.rewards)
        notes += more
        for wanted, (name, given) in zip(sets_of(recipe), data_of(recipe).items(), strict=True):
            key = f"data.eval.{name}" if name else "data.eval"
            source, more = heldout_prompts(recipe, key, given, rules.of(wanted.scorers))
            heldout.append((wanted, source))
            notes += more
    recipe = with_context(recipe, train, *(source for _, source in heldout))
    if not recipe.placed_by:
        check_engine(recipe)
    return Checked(recipe, dataflow, train, heldout, notes=notes)


def _check_samples_per_prompt(recipe: Recipe, declared: Declaration) -> None:
    if recipe.samples_per_prompt < declared.least_samples:
        raise BadInput(
            f"samples_per_prompt = {recipe.samples_per_prompt}: algorithm {recipe.algorithm!r} compares the samples "
            f"of a prompt, want {declared.least_samples} or more"
        )


def _check_partial_groups(recipe: Recipe) -> None:
    """Partial groups have 2 samples or more, so a step has at least twice as many rows as prompts. Raises BadInput."""
    if not recipe.failures.partial_groups:
        return
    if recipe.samples_per_prompt <= LEAST_OF_GROUP:
        raise BadInput(
            f"failures.partial_groups = true: with samples_per_prompt = {recipe.samples_per_prompt} one failure leaves "
            f"fewer than {LEAST_OF_GROUP}; want {LEAST_OF_GROUP + 1} or more, or leave it out"
        )
    if recipe.loss.mini_batches > (rows := LEAST_OF_GROUP * recipe.prompts_per_step):
        raise BadInput(
            f"loss.mini_batches = {recipe.loss.mini_batches}: with failures.partial_groups a step may have {rows} "
            f"samples: want at most as many mini-batches"
        )


def _check_advantage_kwargs(recipe: Recipe, dataflow: Dataflow) -> None:
    function = dataflow.batch_stage.function
    assert function is not None
    known = defaults_of(function)
    kinds = get_type_hints(function)
    if KL_COEFFICIENT in known:
        known |= msgspec.structs.asdict(KlSteering())
        kinds |= get_type_hints(KlSteering)
    for name, value in recipe.advantage.items():
        if name not in known:
            raise BadInput(f"advantage.{name}: {function.__name__} has no such argument{nearest(name, known)}")
        kind = kinds.get(name, type(known[name]))
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise BadInput(f"advantage.{name} = {value!r}: want a value like {known[name]!r}: {error}") from error


def _with_kl_steering(recipe: Recipe, dataflow: Dataflow) -> Dataflow:
    """The dataflow with a fixed or an adaptive KL coefficient. Raises BadInput if its settings can't work."""
    function = dataflow.batch_stage.function
    assert function is not None
    unused = sorted(recipe.advantage.keys() & {"kl_target", "kl_horizon"})
    try:
        steering = steering_of(recipe.advantage)
        if steering.kl == "fixed" and unused:
            raise BadInput(f"advantage.{unused[0]}: a fixed coefficient has none; add kl = 'adaptive', or leave it out")
        if steering.kl == "adaptive":
            start: Any = {**defaults_of(function), **recipe.advantage}[KL_COEFFICIENT]
            steering.from_coefficient(float(start)).after(0.0, recipe.samples_per_step)
    except ValueError as error:
        raise BadInput(f"advantage.kl = 'adaptive': {error}") from error
    return with_steering(dataflow, recipe.advantage)


def _check_deterministic(recipe: Recipe) -> None:
    if recipe.deterministic and (recipe.staleness or recipe.runtime != "local" or recipe.threads != 1):
        raise BadInput(
            f"deterministic = true needs staleness = 0, runtime = 'local' and threads = 1; "
            f"got {recipe.staleness}, {recipe.runtime!r}, {recipe.threads}"
        )


LOSSES = ("ppo", "gspo", "cispo", "reinforce")  # the names in workers.losses, repeated because it imports torch


def _check_policy_loss(loss: Loss) -> None:
    module, colon, function = loss.policy.partition(":")
    if loss.policy not in LOSSES and not (colon and module and function):
        raise BadInput(f"loss.policy = {loss.policy!r}{nearest(loss.policy, LOSSES)}")
    if colon:
        try:
            source_of(module)
        except BadCode as error:
            raise BadInput(f"loss.policy = {loss.policy!r}: {error}") from error


def _check_kl_has_reference(recipe: Recipe, dataflow: Dataflow) -> None:
    """A KL in the loss needs the reference's log-probs in the experience, where the batch function puts them."""
    if recipe.loss.kl_coefficient and not any(i.startswith("reference.") for i in dataflow.batch_stage.inputs):
        raise BadInput(
            f"loss.kl_coefficient = {recipe.loss.kl_coefficient}: algorithm {recipe.algorithm!r} asks no reference "
            "for log-probs; want 0, or an algorithm that does, e.g. 'grpo'"
        )


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    def full(path: str) -> str:
        return str(Path(path).absolute()) if path else ""

    def absolute(model: Model) -> Model:
        mix = [replace(part, path=full(part.path)) for part in model.mix]
        return replace(model, path=full(model.path), mix=mix)

    models = {role: absolute(model) for role, model in recipe.models.items()}
    given = recipe.data.train
    train = full(given) if isinstance(given, str) else [replace(s, path=full(s.path)) for s in given]
    held_out = {name: replace(given, path=full(given.path)) for name, given in data_of(recipe).items()}
    single = held_out[""].path if "" in held_out else ""
    data = replace(recipe.data, train=train, eval=single or held_out or "", pretrain=full(recipe.data.pretrain))
    code = [full(folder) for folder in recipe.code]
    return replace(recipe, models=models, data=data, folder=full(recipe.folder), code=code)


def _check_stop_token_ids(recipe: Recipe) -> None:
    config = config_of("policy", recipe.models["policy"].path)
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if rows and (beyond := [token for token in recipe.generation.stop_token_ids if token >= rows]):
        raise BadInput(f"generation.stop_token_ids: {beyond[0]} is no token: the policy's vocabulary has {rows}")


def _check_pretraining_text(recipe: Recipe) -> list[str]:
    """Check that the text can be used; returns what to report of it."""
    path, loss = recipe.data.pretrain, recipe.loss
    if bool(path) != bool(loss.ptx_coefficient):
        raise BadInput(
            f"data.pretrain = {path!r}, loss.ptx_coefficient = {loss.ptx_coefficient}: the pretraining loss wants "
            "both, a text and a coefficient above 0, or neither"
        )
    try:
        skip = recipe.data.overlong == "skip"
        text = text_of(loss, path, recipe.models["policy"].path, recipe.seed, skip_overlong=skip)
    except (DataError, ValueError) as error:
        raise BadInput(f"data.pretrain: {error}") from error
    return [f"data.pretrain: left out {text.left_out}"] if text and text.left_out else []
