"""The command line: every command is a few lines over the same API that programs use.

Exit codes: 0 done, 1 the run failed, 2 bad input, 3 a broken invariant, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import uvloop
from rich.console import Console

from asyncflow.client.run import Run
from asyncflow.config import BadInput, load_recipe, recipe_text
from protocols.control import Evaluated, RunEnded

if TYPE_CHECKING:
    from asyncflow.validate import Checked

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
bench = typer.Typer(no_args_is_help=True, help="Measure the parts, each beside its bound.")
app.add_typer(bench, name="bench")
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

RecipePath = Annotated[Path, typer.Argument(help="A recipe: a TOML file.", show_default=False)]
Overrides = Annotated[
    list[str], typer.Option("--set", help="Override a key of the recipe: key.path=value. Repeatable.")
]
Folder = Annotated[Path | None, typer.Option("--folder", help="The run's folder; by default a new one.")]


@app.command()
def run(recipe: RecipePath, overrides: Overrides = [], folder: Folder = None) -> None:  # noqa: B006 - typer's way
    """Start a run. Ctrl-C drains it and writes a checkpoint; twice ends it at once."""
    from asyncflow.launching import launch

    raise typer.Exit(_drive(launch(load_recipe(recipe, overrides), folder=folder)).exit_code)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of a stopped or killed run.", show_default=False)],
    allow_fresh: Annotated[bool, typer.Option(help="Start anew where no checkpoint is valid.")] = False,
) -> None:
    """Go on with a run from its newest valid checkpoint."""
    from asyncflow.launching import resume as resume_run

    raise typer.Exit(_drive(resume_run(folder, allow_fresh=allow_fresh)).exit_code)


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """Check a recipe, its data and its models without starting anything, and print it resolved."""
    from asyncflow.validate import check

    out.print(recipe_text(check(load_recipe(recipe, overrides)).recipe), end="", markup=False, soft_wrap=True)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    devices: Annotated[str, typer.Option(help="Place the models on these instead, e.g. 128xA100-80G.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The placement on --devices as JSON.")] = False,
) -> None:
    """Draw the dataflow that a recipe's algorithm is, and say who runs where: as it says, or best on some devices."""
    from asyncflow.compose import compose
    from asyncflow.validate import check

    if as_json and not devices:
        raise BadInput("--json prints the placement on devices: give them too, e.g. --devices 128xA100-80G")
    checked = check(load_recipe(recipe, overrides))
    if devices:
        _print_placement(checked, devices, as_json)
        return
    out.print(checked.dataflow.draw(), markup=False, soft_wrap=True)
    for spec in compose(checked.recipe, checked.dataflow, checked.recipe.name, 0, "logs"):
        place = f"pool {spec.pool}{', shared' if spec.leased else ''}" if spec.pool else "no device"
        out.print(f"{spec.name:<12} {spec.kind:<10} {place}", markup=False)


@app.command()
def sft(settings: Annotated[Path, typer.Argument(help="Settings: a TOML file.", show_default=False)]) -> None:
    """Step 1 of RLHF: fine-tune a policy on demonstrations."""
    from asyncflow.finetuning import finetune

    finetune(settings, out)


@app.command("reward-model")
def reward_model(settings: Annotated[Path, typer.Argument(help="Settings: a TOML file.", show_default=False)]) -> None:
    """Step 2 of RLHF: train a Bradley-Terry reward model on preference pairs."""
    from asyncflow.finetuning import train_reward

    train_reward(settings, out)


@app.command()
def demo(
    recipes: Annotated[Path, typer.Argument(help="Folder with sft.toml, reward.toml and ppo.toml.")] = Path(
        "deploy/recipes/sorting"
    ),
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """All three steps on a small task: data, SFT, reward model, PPO. Prepared models are reused."""
    from asyncflow.demo.prepare import prepare

    accuracy = prepare(recipes, out)
    from asyncflow.launching import launch

    recipe = load_recipe(recipes / "ppo.toml", overrides)
    evaluations: list[Evaluated] = []
    ended = _drive(launch(recipe), evaluations)
    if ended.outcome == "finished" and len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        if accuracy is not None:
            out.print(f"reward model, held-out pair accuracy: {accuracy:.3f}")
        out.print(
            f"held-out {last.metric} before PPO:    {first.value:.3f}  ({first.samples} prompts no step has seen)"
        )
        out.print(f"held-out {last.metric} after PPO:     {last.value:.3f}")
    raise typer.Exit(ended.exit_code)


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


@bench.command()
def channels(
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON.")] = False,
    quick: Annotated[bool, typer.Option(help="Few rounds and small sizes: to see that it runs.")] = False,
) -> None:
    """What a hop costs: against today's path, Ray's own floor and the bandwidth of memory. Minutes."""
    from asyncflow.bench.channels import QUICK, Sizes, lines, measure, rows
    from asyncflow.bench.report import report

    figures = uvloop.run(measure(QUICK if quick else Sizes()))
    _print_lines([report("channels", rows(figures))] if as_json else lines(figures))


@bench.command()
def transition(
    train: Annotated[str, typer.Option(help="The training layout, p-t-d.")] = "1-4-2",
    generate: Annotated[str, typer.Option(help="The generation layout, p_g-t_g.")] = "1-2",
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON.")] = False,
    quick: Annotated[bool, typer.Option(help="One round of a small model: to see that it runs.")] = False,
) -> None:
    """From training to generation: a full gather, the vanilla grouping and ours, side by side. About a minute."""
    from asyncflow.bench.report import report
    from asyncflow.bench.transition import QUICK, Sizes, lines, measure, rows

    try:
        figures = measure(train, generate, QUICK if quick else Sizes())
    except ValueError as error:
        raise BadInput(str(error)) from None
    _print_lines([report("transition", rows(figures))] if as_json else lines(figures))


def _print_placement(checked: Checked, devices: str, as_json: bool) -> None:
    """The best placement of a recipe's models; responses count with all the tokens that they may have."""
    import msgspec

    from asyncflow.placement.devices import Cluster
    from asyncflow.placement.plan import draw, make_plan
    from asyncflow.placement.shapes import Shape
    from asyncflow.placement.workload import Lengths, Workload, work_of

    recipe = checked.recipe
    try:
        shapes = {}
        for role, model in recipe.models.items():
            if model.path:
                config = msgspec.json.decode((Path(model.path) / "config.json").read_bytes())
                shape = Shape.from_config(Path(model.path).name, config)
                shapes[role] = shape if role in ("policy", "reference") else shape.scoring()
        work = Workload(
            recipe.prompts_per_step,
            prompt=Lengths.measured(checked.train.evaluation(floor=0, limit=0).prompts.lengths.tolist()),
            response=Lengths.fixed(recipe.generation.max_tokens),
            samples_per_prompt=recipe.samples_per_prompt,
            mini_batches=recipe.loss.mini_batches,
            epochs=recipe.loss.epochs,
            staleness=recipe.staleness,
            micro_batch_tokens=recipe.loss.tokens_per_micro_batch,
        )
        placed = make_plan(work_of(checked.dataflow, shapes), Cluster.parse(devices), work)
    except ValueError as error:
        raise BadInput(str(error)) from None
    text = msgspec.json.format(msgspec.json.encode(placed)).decode() if as_json else draw(placed)
    out.print(text, markup=False, soft_wrap=True)


def _drive(context: AbstractAsyncContextManager[Run], evaluations: list[Evaluated] | None = None) -> RunEnded:
    """Run a run to its end under uvloop, with a live view and signals."""
    return uvloop.run(_follow(context, evaluations if evaluations is not None else []))


async def _follow(context: AbstractAsyncContextManager[Run], evaluations: list[Evaluated]) -> RunEnded:
    from asyncflow.cli.live import LiveView

    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None
    stopping: list[asyncio.Task[Any]] = []
    current: list[Run] = []

    def interrupted() -> None:
        if current and not stopping:
            err.print(
                "draining: the step that is training is finished and a checkpoint written; once more ends at once"
            )
            stopping.append(loop.create_task(current[0].stop(), name="stop"))
        else:
            this.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    try:
        async with context as running:
            current.append(running)
            out.print(f"run folder: {running.folder}", soft_wrap=True)
            with LiveView(out) as view:
                async for event in running.events():
                    view.show(event)
            evaluations += running.evaluations
            return await running.wait()
    except asyncio.CancelledError:
        return RunEnded(outcome="stopped", step=-1, error="interrupted", exit_code=INTERRUPTED)


def main() -> None:
    """The `asyncflow` command."""
    from asyncflow.services.endpoint import ServiceError

    try:
        app()
    except BadInput as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(BAD_INPUT)
    except ServiceError as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
