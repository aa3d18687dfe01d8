"""compose() turns a recipe and a dataflow into the specs of the run's services: roles, placement and edges. Pure."""

from __future__ import annotations

import re
from collections import Counter

from asyncflow.dataflow.graph import ADVANTAGE, ChannelSpec, Dataflow, Stage
from asyncflow.recipe.config import BadInput, Recipe, nearest
from asyncflow.recipe.evaluations import evaluators_of
from asyncflow.services.ranks.role_specs import ROLE_SPECS
from asyncflow.services.ranks.spec import (
    AdvantageSettings,
    Fires,
    Limits,
    ModelSettings,
    ServiceSpec,
    Settings,
    StageSpec,
    Target,
    effective_protocol,
)
from protocols.layout.topology import Backend, GenerationGrouping, Topology, generation_grouping
from protocols.roles import ROLES, Sampling
from protocols.stage import contract_of
from workers.advantages.adaptive_kl import without_steering
from workers.settings import Model
from workers.user_code import module_of

GENERATOR = "generator"
NO_DEVICE = ""  # the pool of services that need no device of their own


def roles_of(dataflow: Dataflow) -> list[str]:
    """The roles of the models that the algorithm calls."""
    return [s for s in dataflow.services if s != ADVANTAGE]


def pools_of(recipe: Recipe, dataflow: Dataflow) -> dict[str, str]:
    """service -> pool. A role without a placement goes to the first pool; a service without a device to none."""
    first = next(iter(recipe.pools))
    services = [*roles_of(dataflow), *([GENERATOR] if GENERATOR in recipe.placement else [])]
    pools = {s: recipe.placement[s].pool if s in recipe.placement else first for s in services}
    pools |= {s: NO_DEVICE for s in services if s in recipe.models and _needs_no_device(recipe.models[s])}
    return {**pools, ADVANTAGE: NO_DEVICE, **dict.fromkeys(evaluators_of(recipe).values(), NO_DEVICE)}


def _needs_no_device(model: Model) -> bool:
    return (bool(model.rules) and not model.folders) or model.outside


def topology_of(recipe: Recipe, service: str) -> Topology:
    """The topology of a service's ranks."""
    return Topology.parse(recipe.placement[service].parallel) if service in recipe.placement else Topology()


def backend_of(recipe: Recipe, service: str) -> Backend:
    """How a service's ranks divide its model."""
    return recipe.placement[service].backend if service in recipe.placement else "3d"


def layout_of(recipe: Recipe, service: str) -> GenerationGrouping:
    """The grouping of a service's ranks for generation. Raises ValueError if it does not divide the topology."""
    topology, placed = topology_of(recipe, service), recipe.placement.get(service)
    if placed is None:
        return GenerationGrouping(topology)
    layout = Topology.parse(placed.generation or f"{topology.pp}-{topology.tp}")
    if layout.dp != 1:
        raise ValueError(f"generation = {placed.generation!r}: write p-t, the number of replicas follows from parallel")
    return generation_grouping(placed.backend, topology, layout)


def is_collective(recipe: Recipe, service: str) -> bool:
    """Whether a service's ranks compute together: they divide one model, or train replicas of one.

    A policy that generates with vLLM is collective even with one rank, since it alternates generation and training.
    """
    topology = topology_of(recipe, service)
    if service == "policy" and colocates_vllm(recipe):
        return True
    divided = topology.replica_size > 1 or backend_of(recipe, service) == "fsdp"
    return divided or (topology.dp > 1 and not ROLE_SPECS[service].replicable)


def colocates_vllm(recipe: Recipe) -> bool:
    """Whether the policy's ranks generate with vLLM, next to the model they train."""
    return recipe.generation.engine == "vllm" and GENERATOR not in recipe.placement


def compose(recipe: Recipe, dataflow: Dataflow, run: str, term: int, log_folder: str) -> list[ServiceSpec]:
    """The services of a run, in the order of the algorithm."""
    pools = pools_of(recipe, dataflow)
    counts = Counter(p for p in pools.values() if p != NO_DEVICE)

    limits = Limits(
        mailbox_rows=recipe.mailbox_rows or recipe.samples_per_step,
        firing_rows=recipe.firing_rows,
        inline_bytes=recipe.inline_bytes,
        threads=recipe.threads,
    )

    def spec(name: str, settings: Settings) -> ServiceSpec:
        layout = layout_of(recipe, name)
        return ServiceSpec(
            name=name,
            settings=settings,
            limits=limits,
            run=run,
            term=term,
            seed=recipe.seed,
            deterministic=recipe.deterministic,
            code=recipe.code,
            stages=_stages_of(recipe, dataflow, name),
            pool=pools[name],
            topology=topology_of(recipe, name),
            generation_layout=Topology(layout.pp, layout.tp),
            backend=backend_of(recipe, name),
            recompute=name in recipe.placement and recipe.placement[name].recompute,
            collective=is_collective(recipe, name),
            leased=counts[pools[name]] > 1,
            samples_per_prompt=recipe.samples_per_prompt,
            log_path=f"{log_folder}/{name}.log",
            metrics_host=recipe.metrics_host,
            delay_seconds=recipe.delays.get(name, {}),
        )

    specs = [spec(role, _settings_of(recipe, role, recipe.models[role])) for role in roles_of(dataflow)]
    if GENERATOR in recipe.placement:
        specs.insert(1, spec(GENERATOR, _settings_of(recipe, GENERATOR, recipe.models["policy"])))
    specs.append(spec(ADVANTAGE, _advantage_settings(recipe)))
    for metric, evaluator in evaluators_of(recipe).items():
        specs.append(spec(evaluator, _settings_of(recipe, "reward", Model(rule=metric))))
    return specs


def _settings_of(recipe: Recipe, role: str, model: Model) -> ModelSettings:
    """The settings of a service of that role, with that model."""
    return ModelSettings(
        role,
        model,
        recipe.loss,
        recipe.optimizer,
        recipe.generation,
        recipe.failures,
        tokenizer_path=recipe.models["policy"].path,
        pretrain=recipe.data.pretrain,
        skip_overlong=recipe.data.overlong == "skip",
    )


def _advantage_settings(recipe: Recipe) -> AdvantageSettings:
    return AdvantageSettings(
        recipe.algorithm,
        _advantage_kwargs(recipe),
        recipe.failures.partial_groups,
        recipe.observe.samples,
        recipe.models["policy"].path,
    )


def _advantage_kwargs(recipe: Recipe) -> dict[str, float | bool | str]:
    """The keyword arguments of the batch function."""
    fixed = recipe.advantage.get("kl", "fixed") == "fixed"
    return without_steering(recipe.advantage) if fixed else dict(recipe.advantage)


def channel_named(recipe: Recipe, dataflow: Dataflow, name: str) -> tuple[str, Stage]:
    """Find a stage by its name ("policy.generate#1"), or by the name of a message that only it sends ("rollouts").

    Returns the service that runs the stage, and the stage. Raises BadInput with the nearest known name.
    """
    sending = [stage for stage in dataflow.stages if not stage.is_sink]
    found = [stage for stage in sending if name in (stage.name, _snake(stage.produces.__name__))]
    if not found:
        known = {stage.name for stage in sending} | {_snake(stage.produces.__name__) for stage in sending}
        raise BadInput(f"channel {name!r}: no stage and no message of this run{nearest(name, known)}")
    if len(found) > 1:
        raise BadInput(f"channel {name!r}: sent by {', '.join(s.name for s in found)}; use one of these names")
    return _service_of(recipe, found[0]), found[0]


def _snake(message: str) -> str:
    """LogProbs -> log_probs"""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", message).lower()


def user_modules(recipe: Recipe, dataflow: Dataflow) -> list[str]:
    """The user's modules that the services import, from recipe values such as "package.module:function"."""
    rules = [rule for role in roles_of(dataflow) for rule in recipe.models[role].rules]
    named = [recipe.algorithm, recipe.loss.policy, *rules, *evaluators_of(recipe)]
    return sorted({module for name in named if (module := module_of(name))})


def services_of(recipe: Recipe, dataflow: Dataflow) -> dict[str, str]:
    """stage -> the service that runs it."""
    return {stage.name: _service_of(recipe, stage) for stage in dataflow.stages}


def replaceable(recipe: Recipe, dataflow: Dataflow) -> list[str]:
    """The services that can be replaced when they die: those without state of their own and without external workers.

    The rows that a batch function without state has joined are sent to its successor again.
    """
    answering = [role for role, model in recipe.models.items() if ROLE_SPECS[role].replicable and not model.outside]
    joining = [] if ADVANTAGE in stateful(dataflow) else [ADVANTAGE]
    return [*answering, *[GENERATOR] * (GENERATOR in recipe.placement), *joining, *evaluators_of(recipe).values()]


def stateful(dataflow: Dataflow) -> list[str]:
    """The services whose state a checkpoint holds: those that train, and a batch function with state."""
    carries = [ADVANTAGE] if dataflow.batch_stage.state is not None else []
    return list(dict.fromkeys([s.service for s in dataflow.sinks] + carries))


def _stages_of(recipe: Recipe, dataflow: Dataflow, service: str) -> list[StageSpec]:
    """The stages that a service runs: its own, and if it is the generator those that generate."""
    return [_stage_spec(recipe, dataflow, s) for s in dataflow.stages if _service_of(recipe, s) == service]


def _service_of(recipe: Recipe, stage: Stage) -> str:
    return GENERATOR if stage.generates and GENERATOR in recipe.placement else stage.service


def _stage_spec(recipe: Recipe, dataflow: Dataflow, stage: Stage) -> StageSpec:
    inputs = dataflow.inputs_of(stage.name)
    contract = contract_of(ROLES[stage.service], stage.method) if stage.service in ROLES else None
    return StageSpec(
        name=stage.name,
        method=stage.method,
        fires=_fires(stage),
        inputs=[c.edge for c in inputs],
        schemas=[c.message.schema_id for c in inputs],
        sources=list(stage.inputs),
        outputs=[_target(recipe, dataflow, c) for c in dataflow.consumers(stage.name)],
        protocol=effective_protocol(stage.protocol, topology_of(recipe, _service_of(recipe, stage))),
        grains=[c.grain for c in inputs],
        whole_groups=contract.whole_groups if contract else False,
        balance=contract.balance if contract else "rows",
        sampling=_sampling(recipe, stage) if stage.generates else None,
        filter=stage.filter.name if stage.filter is not None else "",
        filter_inputs=list(stage.filter.inputs) if stage.filter is not None else [],
    )


def _target(recipe: Recipe, dataflow: Dataflow, channel: ChannelSpec) -> Target:
    service = _service_of(recipe, dataflow.stage(channel.destination))
    return Target(service, channel.edge, topology_of(recipe, service).world_size)


def _fires(stage: Stage) -> Fires:
    if stage.generates:
        return "generate"
    if stage.closes:
        return "closed"
    return "batch" if stage.is_sink else "rows"


def _sampling(recipe: Recipe, stage: Stage) -> Sampling:
    sampling = recipe.generation.sampling
    return sampling.greedy if stage.greedy else sampling
