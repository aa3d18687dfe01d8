"""The command line of asyncflow. Each command calls the API that programs use.

Exit codes: 0 done, or drained after SIGTERM; 1 the run failed; 2 bad input; 3 a broken invariant; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from asyncflow.cli.benchmarks import bench
from asyncflow.cli.console import Form, NotPrinted, err, open_standard_streams, out, print_lines
from asyncflow.cli.serving import Serve, ServePort, serve
from asyncflow.recipe.config import BadInput, load_recipe, recipe_text

FAILED, BAD_INPUT = 1, 2

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(bench, name="bench")
app.command()(serve)

RecipePath = Annotated[
    Path,
    typer.Argument(
        help="A recipe: a TOML file. Its relative paths start at the working directory.", show_default=False
    ),
]
Overrides = Annotated[
    list[str], typer.Option("--set", help="Override a key of the recipe: key.path=value. Repeatable.")
]
SettingsPath = Annotated[
    Path, typer.Argument(help="Settings: a TOML file; `asyncflow settings sft` lists its keys.", show_default=False)
]
SettingsOverrides = Annotated[
    list[str], typer.Option("--set", help="Override a key of the settings: key.path=value. Repeatable.")
]
Folder = Annotated[
    Path | None,
    typer.Option("--folder", help="The run's folder; one that holds a run goes on with it. Default: a new one."),
]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run.", show_default=False)]
AllowFresh = Annotated[
    bool, typer.Option("--allow-fresh", help="Start from the beginning where all checkpoints are damaged or gone.")
]


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 - typer's way
    folder: Folder = None,
    allow_fresh: AllowFresh = False,
    serve: Serve = False,
    port: ServePort = 0,
) -> None:
    """Start a training run and print its folder and its progress.

    With --folder the same command starts a run, goes on with it after a crash or a stop, and does nothing once it is
    finished.

    Ctrl-C, SIGTERM or SIGHUP finishes the current step and writes a checkpoint, within deadlines.stop. The second one
    gives the step up and saves the last finished one; the third ends the run at once. SIGUSR1 reloads the changed files
    of your own losses, rewards and algorithm between two steps.

    Exit codes: 0 finished, or saved after SIGTERM; 1 failed; 2 bad input; 3 a broken invariant; 130 saved after Ctrl-C
    or SIGHUP; 128 + the signal's number where it ended at once.
    """
    from asyncflow.cli.driving import drive
    from asyncflow.run.launch import launch
    from asyncflow.run.run_folder import is_finished
    from asyncflow.run.start_progress import StartProgress

    given = load_recipe(recipe, overrides)
    if folder is not None and is_finished(folder, given):
        return out.print(f"run {folder} is finished after step {given.steps}: {folder / 'policy'}", soft_wrap=True)
    progress = StartProgress()
    starting = launch(given, folder=folder, allow_fresh=allow_fresh, progress=progress)
    raise typer.Exit(drive(starting, port=port if serve else None, progress=progress).exit_code)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of a stopped or killed run.", show_default=False)],
    overrides: Annotated[
        list[str],
        typer.Option("--set", help="Go on with another value: key.path=value, of a key that allows it. Repeatable."),
    ] = [],  # noqa: B006
    allow_fresh: AllowFresh = False,
    serve: Serve = False,
    port: ServePort = 0,
) -> None:
    """Continue a run from its newest valid checkpoint, or from the beginning if it ended before its first one.

    It prints what `run` prints, takes the same signals and has the same exit codes.
    """
    from asyncflow.cli.driving import drive
    from asyncflow.run.launch import resume as resume_run
    from asyncflow.run.start_progress import StartProgress

    progress = StartProgress()
    starting = resume_run(folder, overrides=overrides, allow_fresh=allow_fresh, progress=progress)
    raise typer.Exit(drive(starting, port=port if serve else None, progress=progress).exit_code)


@app.command()
def runs(
    root: Annotated[Path, typer.Argument(help="The folder that run folders are in.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List the runs in a folder: state, step, reward and evaluation of each. Nothing is changed."""
    from asyncflow.cli.runs import print_runs

    print_runs(root, as_json, out)


@app.command()
def status(
    folder: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Print how a run stands: whether it runs, how far it is, its evaluations, its samples, its newest checkpoint."""
    from asyncflow.cli.runs import print_status

    print_status(folder, as_json, out)


@app.command()
def samples(
    folder: RunFolder,
    step: Annotated[int | None, typer.Option(help="Of this step. Default: the newest that is kept.")] = None,
    worst: Annotated[
        int, typer.Option(min=0, help="So many with the lowest rewards, of all steps without --step.")
    ] = 0,
    best: Annotated[int, typer.Option(min=0, help="So many with the highest rewards.")] = 0,
    prompt: Annotated[str, typer.Option(help="Only samples whose prompt has this text.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """Print texts that a run has generated, with their rewards; `observe.samples` in the recipe says which are kept."""
    from asyncflow.cli.samples import print_samples

    print_samples(folder, step, worst, best, prompt, as_json, out)


@app.command()
def stop(folder: RunFolder) -> None:
    """Ask a run on this machine to finish its step, write a checkpoint and end, as Ctrl-C does."""
    from asyncflow.cli.runs import stop as stop_run

    print_lines([stop_run(folder)])


@app.command()
def validate(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the recipe with every default instead.")] = False,
) -> None:
    """Check a recipe with its data and models; start nothing. Prints who runs where and the estimated memory."""
    from asyncflow.cli.validation import print_valid
    from asyncflow.run.prepare import prepare

    checked = prepare(load_recipe(recipe, overrides))
    for note in checked.notes:
        err.print(note, markup=False, soft_wrap=True)
    if resolved:
        return out.print(recipe_text(checked.recipe), end="", markup=False, soft_wrap=True)
    return print_valid(str(recipe), checked, out)


@app.command()
def settings(
    key: Annotated[
        str, typer.Argument(help="A key or a table, e.g. loss.clip_low, models.policy, sft, reward-model.")
    ] = "",
    form: Annotated[Form, typer.Option("--format", help="How to print them.")] = Form.TEXT,
) -> None:
    """Print the settings of a recipe, of SFT or of a reward model: type, bounds, default and meaning of each key."""
    from asyncflow.cli.reference import print_reference

    print_reference(key, form, out)


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe: a TOML file.", show_default=False)] = None,
    overrides: Overrides = [],  # noqa: B006
    devices: Annotated[str, typer.Option(help="Find the best placement on these devices, e.g. 128xA100-80G.")] = "",
    device: Annotated[str, typer.Option(help="How fast a device is: a calibration file, or a known device.")] = "",
    save: Annotated[Path | None, typer.Option(help="Write the best placement on this machine to a file.")] = None,
    run: Annotated[Path | None, typer.Option("--from", help="Print advice from the folder of a finished run.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the placement on --devices, or the advice, as JSON.")
    ] = False,
) -> None:
    """Print the dataflow of a recipe's algorithm and where each service runs.

    With --devices or --save it searches for the best placement; with --from it prints advice from a finished run.
    """
    from asyncflow.cli import plans
    from asyncflow.run.prepare import prepare

    if run is not None:
        return print_lines([plans.advise(run, as_json)])
    if recipe is None:
        raise BadInput("plan: give a recipe, or --from the folder of a run")
    if as_json and not devices:
        raise BadInput("--json prints the placement on devices: give them too, e.g. --devices 128xA100-80G")
    if save is not None:
        return print_lines(plans.save_plan(load_recipe(recipe, overrides), device, save))
    checked = prepare(load_recipe(recipe, overrides))
    if devices:
        return print_lines(plans.placement(checked, devices, device, as_json))
    return print_lines(plans.dataflow(checked, device))


@app.command()
def calibrate(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the measurements to a file, for `plan --device`.")] = None,
    quick: Annotated[bool, typer.Option(help="Few rounds and small sizes, to see that it runs.")] = False,
) -> None:
    """Measure and print how fast a recipe's models run on this machine. It takes half a minute."""
    from asyncflow.cli.plans import calibrate as measure

    print_lines(measure(load_recipe(recipe, overrides), as_json, output, quick))


@app.command()
def sft(settings: SettingsPath, overrides: SettingsOverrides = []) -> None:  # noqa: B006
    """Step 1 of RLHF: fine-tune a policy on demonstrations. Prints the output folder and the loss."""
    from asyncflow.run.finetuning import finetune

    finetune(settings, out, overrides)


@app.command("reward-model")
def reward_model(settings: SettingsPath, overrides: SettingsOverrides = []) -> None:  # noqa: B006
    """Step 2 of RLHF: train a reward model on preference pairs, or a cost model on pairs with safety labels.

    Prints the output folder and the accuracy on held-out pairs.
    """
    from asyncflow.run.finetuning import train_reward

    train_reward(settings, out, overrides)


@app.command()
def demo(
    recipes: Annotated[Path, typer.Argument(help="A folder with sft.toml, reward.toml and ppo.toml.")] = Path(
        "deploy/recipes/sorting"
    ),
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run all three steps of RLHF on a small task: make the data, SFT, reward model, PPO.

    Data and models of an earlier demo are reused. Prints the held-out metric before and after PPO.
    """
    from asyncflow.cli.demonstration import demonstrate

    raise typer.Exit(demonstrate(recipes, overrides).exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_lines([f"asyncflow {version('asyncflow')}"])
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself; the help of the application is the module's."""


def main() -> None:
    """Run the `asyncflow` command."""
    from asyncflow.services.channels.endpoint import ServiceError

    open_standard_streams()
    try:
        app()
    except (BadInput, ServiceError, NotPrinted) as error:
        said = error.strerror if isinstance(error, NotPrinted) else error
        with contextlib.suppress(NotPrinted):
            err.print(f"error: {said}", style="red", markup=False, soft_wrap=True)
        sys.exit(BAD_INPUT if isinstance(error, BadInput) else FAILED)


if __name__ == "__main__":
    main()
