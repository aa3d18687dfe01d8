"""Build the scenario of a recipe, or of a placement that the search found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from asyncflow.control.admission.prompts import PromptSource
from asyncflow.control.settings import Pace
from asyncflow.dataflow.graph import Dataflow
from asyncflow.planner.calibration.calibration import Calibration, LinearFit
from asyncflow.planner.calibration.measured_speeds import MeasuredSpeed
from asyncflow.planner.costs.devices import GB, Cluster, Device
from asyncflow.planner.costs.layouts import Layout
from asyncflow.planner.costs.shapes import Shape
from asyncflow.planner.costs.speeds import ModelSpeed, Speed
from asyncflow.planner.costs.workload import Lengths, ModelWork, Workload, with_separate_generator, work_of
from asyncflow.planner.search.plan import PlacedModel, Placement
from asyncflow.planner.simulation.scenario import WARM_UP, Scenario
from asyncflow.recipe.config import Pool, Recipe
from asyncflow.recipe.service_specs import GENERATOR, layout_of, pools_of, services_of, topology_of
from asyncflow.services.ranks.role_specs import ROLE_SPECS
from protocols.layout.topology import Topology

MOST_PROMPTS = 4096  # whose lengths are measured
STEADY_STEPS = 6  # that are measured
FINEST_TURN = 16  # tokens between two checks of an engine for weights and rows, as in a run
TURNS_PER_RESPONSE = 16  # long responses: check less often, to simulate fewer events


def prompt_lengths(source: PromptSource) -> Lengths:
    """The lengths of the first prompts of a recipe's data, in tokens."""
    return Lengths.measured(source.evaluation(min_version=0, limit=MOST_PROMPTS).prompts.lengths.tolist())


def shapes_of(recipe: Recipe) -> dict[str, Shape]:
    """Shapes of the models that a recipe reads from folders, by role. Raises ValueError for an unsupported model."""
    shapes = {}
    for role, model in recipe.models.items():
        if model.path:
            config = msgspec.json.decode((Path(model.path) / "config.json").read_bytes())
            shape = Shape.from_config(Path(model.path).name, config)
            shapes[role] = shape if ROLE_SPECS[role].head == "tokens" else shape.scoring()
    return shapes


def workload_of(recipe: Recipe, prompt: Lengths, calibration: Calibration) -> Workload:
    """The workload of a recipe's step; without measured responses, each has the maximum number of tokens."""
    limit = recipe.generation.max_tokens
    return Workload(
        recipe.prompts_per_step,
        prompt=prompt,
        response=calibration.responses_under(limit) or Lengths.fixed(limit),
        samples_per_prompt=recipe.samples_per_prompt,
        mini_batches=recipe.loss.mini_batches,
        epochs=recipe.loss.epochs,
        staleness=recipe.staleness,
        micro_batch_tokens=recipe.loss.tokens_per_micro_batch,
        running_sequences=recipe.generation.slots,
    )


def of_recipe(
    recipe: Recipe, dataflow: Dataflow, prompt: Lengths, calibration: Calibration, devices: Mapping[str, Device] = {}
) -> Scenario:
    """A recipe in its own placement on calibrated devices; `devices` describes other kinds, by the pool's device."""
    device, workload = calibration.device, workload_of(recipe, prompt, calibration)
    pools = {s: p for s, p in pools_of(recipe, dataflow).items() if s in {*dataflow.services, GENERATOR}}
    speeds: dict[str, Speed] = {s: MeasuredSpeed(LinearFit(0.0, calibration.row_s.get(s, 0.0))) for s in pools}
    models = work_of(dataflow, shapes_of(recipe))
    for model in with_separate_generator(models) if GENERATOR in recipe.placement else models:
        grouping = layout_of(recipe, model.role) if model.generates else None
        sizes = (grouping.pp, grouping.tp) if grouping else (0, 0)
        recompute = model.role in recipe.placement and recipe.placement[model.role].recompute
        layout = Layout(topology_of(recipe, model.role), recompute, *sizes)
        pool = recipe.pools.get(pools[model.role], Pool())
        speeds[model.role] = ModelSpeed(model, layout, devices.get(pool.device, device), workload)
    return Scenario(
        dataflow=dataflow,
        services=services_of(recipe, dataflow),
        pools=pools,
        devices={name: pool.devices for name, pool in recipe.pools.items() if name in pools.values()},
        speeds=speeds,
        pace=_pace(workload, recipe.steps, recipe.max_refills),
        prompt=prompt,
        response=workload.response,
        firing_rows=recipe.firing_rows,
        mailbox_rows=recipe.mailbox_rows,
        whole_batches=recipe.generation.engine == "torch",
        call_s=device.efficiency.call_s,
        record_s=device.efficiency.record_s,
        cores=device.cores,
        crowded=device.crowded,
        delays=recipe.delays,
        seed=recipe.seed,
    )


def of_placement(
    placement: Placement, models: Sequence[ModelWork], cluster: Cluster, workload: Workload, dataflow: Dataflow
) -> Scenario:
    """A placement from the search. A stage takes all available rows at once: each firing fills the pipeline once."""
    placed = {model.role: (pool, model) for pool in placement.pools for model in pool.models}
    works = {model.role: model for model in (with_separate_generator(models) if GENERATOR in placed else models)}
    speeds: dict[str, Speed] = {service: MeasuredSpeed() for service in dataflow.services}
    for role, (_, model) in placed.items():
        cache = model.cache_gb * GB
        speeds[role] = ModelSpeed(works[role], layout_of_placed(model), cluster.device, workload, cache)
    return Scenario(
        dataflow=dataflow,
        services={s.name: GENERATOR if s.generates and GENERATOR in placed else s.service for s in dataflow.stages},
        pools={**dict.fromkeys(dataflow.services, ""), **{role: pool.name for role, (pool, _) in placed.items()}},
        devices={pool.name: pool.devices for pool in placement.pools},
        speeds=speeds,
        pace=_pace(workload),
        prompt=workload.prompt,
        response=workload.response,
        firing_rows=workload.samples,
        call_s=cluster.device.efficiency.call_s,
        cores=cluster.device.cores,
        crowded=cluster.device.crowded,
        turn_tokens=max(FINEST_TURN, int(workload.response.mean / TURNS_PER_RESPONSE)),
    )


def layout_of_placed(model: PlacedModel) -> Layout:
    """The layout of a model in a plan, which holds it as text."""
    pp, _, tp = model.generation.partition("-")
    return Layout(Topology.parse(model.parallel), model.recompute, int(pp or 0), int(tp or 0))


def _pace(workload: Workload, steps: int = 1 << 30, max_refills: int = 4) -> Pace:
    return Pace(
        steps=min(steps, WARM_UP + 2 * workload.staleness + STEADY_STEPS),
        prompts_per_step=workload.prompts_per_step,
        samples_per_prompt=workload.samples_per_prompt,
        staleness=workload.staleness,
        max_refills=max_refills,
    )
