"""What `asyncflow plan` and `calibrate` print and save, as text. The decisions are made in `asyncflow.planner`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec

from asyncflow.planner import advice, auto, plan_file
from asyncflow.planner.calibration.calibration import Calibration, read_calibration
from asyncflow.planner.candidates import runs
from asyncflow.planner.costs.devices import CATALOGUE, Cluster
from asyncflow.planner.costs.workload import work_of
from asyncflow.planner.search.plan import Placement, format_plan, make_plan
from asyncflow.planner.simulation.scenarios import of_placement, of_recipe, prompt_lengths, shapes_of, workload_of
from asyncflow.planner.simulation.simulator import SimulatedRun, simulate
from asyncflow.recipe.checks import Checked
from asyncflow.recipe.config import BadInput, Pool, Recipe
from asyncflow.recipe.service_specs import compose
from asyncflow.run.prepare import prepare
from asyncflow.run.run_folder import recipe_of


def dataflow(checked: Checked, device: str) -> Iterator[str]:
    """The algorithm's graph and where each service runs; with a device, also the simulated time of a step."""
    recipe = checked.recipe
    yield checked.dataflow.draw()
    for spec in compose(recipe, checked.dataflow, recipe.name, 0, "logs"):
        place = f"pool {spec.pool}{', shared' if spec.leased else ''}" if spec.pool else "no device"
        yield f"{spec.name:<12} {'external' if spec.external else spec.role:<10} {place}"
    if device:
        with _bad_input():
            scenario = of_recipe(recipe, checked.dataflow, prompt_lengths(checked.train), read_calibration(device))
            yield _format_simulated(simulate(scenario))


def placement(checked: Checked, devices: str, device: str, as_json: bool) -> list[str]:
    """The best placement of a recipe's models on some devices, by the cost models, and its simulation."""
    recipe = checked.recipe
    with _bad_input():
        cluster = Cluster.parse(devices)
        if device in CATALOGUE and device != cluster.device.name:
            raise BadInput(
                f"--devices {devices} is of {cluster.device.name}, --device says {device}: give --devices alone, or "
                "--device with a calibration file of these devices"
            )
        calibration = read_calibration(device) if device else Calibration(cluster.device)
        cluster = Cluster(calibration.device, cluster.count)
        models = work_of(checked.dataflow, shapes_of(recipe))
        workload = workload_of(recipe, prompt_lengths(checked.train), calibration)
        on_ray = msgspec.structs.replace(recipe, runtime="ray")  # the devices are not here, nor need the runtime be
        placed = make_plan(models, cluster, workload, partial(runs, on_ray))

        def simulated(placement: Placement) -> SimulatedRun:
            return simulate(of_placement(placement, models, cluster, workload, checked.dataflow))

        chosen = simulated(placed.chosen)
        other = simulated(placed.runner_up) if placed.runner_up else None
    if as_json:
        return [_json({**msgspec.structs.asdict(placed), "simulated": chosen, "runner_up_simulated": other})]
    lines = [format_plan(placed), _format_simulated(chosen)]
    return [*lines, f"the runner-up, simulated: {other.step_s:.3g} s a step"] if other else lines


def save_plan(recipe: Recipe, device: str, path: Path) -> list[str]:
    """Search for the best placement on this machine and write it to a file, which a recipe may name after an edit."""
    checked = prepare(recipe)
    given = {} if recipe.pools == {"main": Pool()} else recipe.pools  # the default means: not given
    unplaced = msgspec.structs.replace(checked.recipe, pools=given)
    with _bad_input():
        calibration = read_calibration(device) if device else None
    choice = auto.place(unplaced, checked.dataflow, prompt_lengths(checked.train), calibration)
    path.write_text(plan_file.text_of(choice))
    lines = [f"{choice.devices}: {choice.chosen.name}", _format_simulated(choice.chosen.simulated)]
    if choice.runner_up:
        other = choice.runner_up
        lines.append(f"runner-up of {choice.candidates}: {other.name}: {other.simulated.step_s:.3g} s")
    return [*lines, f"written to {path}; pin it with: placement = {str(path)!r}"]


def advise(run: Path, as_json: bool) -> str:
    """What a run's measured times say about its placement."""
    found = advice.advise(run, recipe_of(run))
    return _json(found) if as_json else advice.format_advice(found)


def calibrate(recipe: Recipe, as_json: bool, output: Path | None, quick: bool) -> list[str]:
    """Measure this machine with a recipe's models; the measurements are also written to `output`."""
    from asyncflow.planner.calibration import machine
    from asyncflow.planner.calibration.measuring import measure
    from asyncflow.run.launch import runtime_of

    checked = prepare(recipe)
    alone = msgspec.structs.replace(checked.recipe, pools={})  # one service is measured alone: it needs no pool
    runtime = runtime_of(alone)
    sizes = machine.QUICK if quick else machine.CalibrationSizes()
    found = asyncio.run(measure(checked.recipe, checked.dataflow, checked.train, runtime, sizes))
    if output is not None:
        output.write_text(f"{_json(found)}\n")
    if as_json:
        return [_json(found)]
    return [*format_calibration(found), *([f"written to {output}"] if output is not None else [])]


def format_calibration(found: Calibration) -> list[str]:
    """A calibration as lines of a table."""
    device, reach = found.device, found.device.efficiency
    lines = [
        found.measured,
        f"matrix products   {device.peak_flops / 1e9:8.1f} GFLOP/s on a slot, of which inference reaches "
        f"{reach.compute:.0%} and training {reach.training:.0%}",
        f"memory            {device.memory_bytes_per_s / 1e9:8.1f} GB/s",
        f"at once           {device.cores:8.2f} slots' work",
    ]
    fixed = {
        "a layer's pass": reach.layer_s, "an optimizer step": reach.optimizer_s, "a decoding step": reach.host_step_s,
        "a sequence in it": reach.host_sequence_s, "a copy of weights": reach.publish_s, "a call": reach.call_s,
        "a step's record": reach.record_s,
    }  # fmt: skip
    lines += [f"{name:<17} {1e3 * seconds:8.3f} ms" for name, seconds in fixed.items()]
    lines += [f"{'a row of ' + name:<17} {1e3 * seconds:8.3f} ms" for name, seconds in found.row_s.items()]
    if found.responses is not None:
        lines.append(f"responses         {found.responses.mean:8.1f} tokens, the longest {found.responses.maximum:.0f}")
    return lines


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value)).decode()


@contextmanager
def _bad_input() -> Iterator[None]:
    """What the planner refuses is bad input of this command."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from None


def _format_simulated(simulated: SimulatedRun) -> str:
    idle = ", ".join(f"{pool} {share:.0%}" for pool, share in simulated.pool_idle.items())
    ages = ", ".join(f"{share:.0%} at {age}" for age, share in simulated.staleness.items())
    return f"simulated: {simulated.step_s:.3g} s a step; idle: {idle}; versions old: {ages}"
