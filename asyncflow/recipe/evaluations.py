"""The held-out sets of a recipe: `data.eval` is one path, or a table of sets by name, each with its own settings."""

from __future__ import annotations

import re

import msgspec

from asyncflow.control.evaluation_sets import EvaluationSet
from asyncflow.control.settings import Evaluation, EvaluationData
from asyncflow.recipe.config import BadInput, Recipe
from workers.settings import refuse_in_vllm

EVALUATOR = "evaluator"  # the service of the first metric; those of the others have a number behind it
_OF_ROWS = {"path", "prompt", "reference"}  # the other keys of a set are those of [evaluation]
REWARD = "reward"  # as a metric: the score of the run's own reward


def data_of(recipe: Recipe) -> dict[str, EvaluationData]:
    """The held-out sets by name; a path alone is the set named ""."""
    held_out = recipe.data.eval
    sets = held_out if isinstance(held_out, dict) else {"": held_out} if held_out else {}
    return {name: EvaluationData(given) if isinstance(given, str) else given for name, given in sets.items()}


def evaluators_of(recipe: Recipe) -> dict[str, str]:
    """The rules that are metrics -> the services that score them."""
    metrics = [metric for given in data_of(recipe).values() for metric in _metrics(_settings(recipe, given))]
    rules = dict.fromkeys(metric for metric in metrics if metric != REWARD)
    return {rule: f"{EVALUATOR}{number if number > 1 else ''}" for number, rule in enumerate(rules, 1)}


def is_evaluator(service: str) -> bool:
    """Whether a service scores held-out answers only."""
    return service.removeprefix(EVALUATOR).isdecimal() or service == EVALUATOR


def sets_of(recipe: Recipe) -> list[EvaluationSet]:
    """The held-out sets, in the recipe's order. Raises BadInput for settings that contradict each other."""
    evaluators = evaluators_of(recipe)
    sets = []
    for name, given in data_of(recipe).items():
        where, settings = f"data.eval.{name}" if name else "evaluation", _settings(recipe, given)
        _check(where, name, settings, recipe)
        sets.append(
            EvaluationSet(
                name=name,
                scorers={metric: evaluators.get(metric, REWARD) for metric in _metrics(settings)},
                sampling=msgspec.structs.replace(
                    recipe.generation.sampling.greedy,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=settings.top_k,
                ),
                samples=settings.samples,
                limit=settings.limit,
                pass_at=sorted(set(settings.pass_at or [settings.samples] * (settings.samples > 1))),
                pass_score=settings.pass_score,
            )
        )
    return sets


def _settings(recipe: Recipe, given: EvaluationData) -> Evaluation:
    """The recipe's [evaluation] with what this set says otherwise."""
    own = msgspec.structs.asdict(given)
    return msgspec.structs.replace(
        recipe.evaluation, **{key: value for key, value in own.items() if key not in _OF_ROWS and value is not None}
    )


def _metrics(settings: Evaluation) -> list[str]:
    return [settings.metric] if isinstance(settings.metric, str) else settings.metric


def _check(where: str, name: str, settings: Evaluation, recipe: Recipe) -> None:
    if name and not re.fullmatch(r"[A-Za-z]\w*", name):
        raise BadInput(f"data.eval: the set's name {name!r} becomes part of its curves': want letters, digits and '_'")
    metrics = _metrics(settings)
    if not metrics or len(set(metrics)) < len(metrics):
        raise BadInput(f"{where}.metric = {metrics}: want at least one, and each of them once")
    if REWARD in metrics and ("reward" not in recipe.models or recipe.models["reward"].outside):
        raise BadInput(f"{where}.metric = {REWARD!r}: the run has no reward of its own; name a rule")
    if settings.temperature == 0.0:
        contradiction = {
            "samples": settings.samples > 1,
            "top_p": settings.top_p < 1.0,
            "top_k": settings.top_k > 0,
        }
        for key in (key for key, there in contradiction.items() if there):
            raise BadInput(
                f"{where}.{key} = {getattr(settings, key)}: at temperature 0 an answer is greedy, and all are alike; "
                f"want {where}.temperature above 0, or leave {key} out"
            )
    if over := [k for k in settings.pass_at if k > settings.samples]:
        raise BadInput(f"{where}.pass_at = {over[0]}: of {settings.samples} answers; want {where}.samples of as many")
    if recipe.generation.engine == "vllm":
        try:
            refuse_in_vllm(f"{where}.temperature", settings.temperature)
        except ValueError as error:
            raise BadInput(str(error)) from None
