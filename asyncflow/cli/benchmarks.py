"""`asyncflow bench NAME`: the same command for every benchmark of the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from asyncflow.bench.registry import BENCHMARKS, Benchmark, Option
from asyncflow.bench.report import format_report
from asyncflow.cli.console import print_lines

COMMON = (
    Option("json", False, 'Print one JSON object: {"bench", "machine", "rows"}.'),
    Option("quick", False, "Few rounds and small sizes, to see that it runs."),
)

bench = typer.Typer(no_args_is_help=True, help="Measure one part of the system next to its bound.")


def _command(benchmark: Benchmark) -> Callable[..., None]:
    def command(*, json: bool, **options: Any) -> None:
        rows, lines = benchmark.run(**options)
        print_lines([format_report(benchmark.name, rows)] if json else lines)

    parameters = list(_parameters((*benchmark.options, *COMMON)))
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  - where typer reads the options
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameters(options: tuple[Option, ...]) -> Iterator[Parameter]:
    for name, default, text, least in options:
        declared = typer.Option(f"--{name}", help=text, min=least)
        kind = Annotated[Path if isinstance(default, Path) else type(default), declared]
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)


for _benchmark in BENCHMARKS:
    bench.command(_benchmark.name, help=_benchmark.summary)(_command(_benchmark))
