"""`asyncflow bench`: every registered benchmark runs by the same command and prints the same kind of table."""

from __future__ import annotations

import inspect
import json
from importlib import import_module

import pytest
from typer.testing import CliRunner

from asyncflow.bench.registry import BENCHMARKS, Benchmark
from asyncflow.cli.main import app


def test_the_help_lists_every_benchmark():
    text = CliRunner().invoke(app, ["bench", "--help"]).output
    assert all(benchmark.name in text for benchmark in BENCHMARKS)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_a_benchmarks_run_takes_exactly_its_options(benchmark: Benchmark):
    run = import_module(f"asyncflow.bench.{benchmark.name}").run
    assert set(inspect.signature(run).parameters) == {"quick", *(option.name for option in benchmark.options)}


def test_json_is_one_object_of_rows():
    printed = CliRunner().invoke(app, ["bench", "planning", "--quick", "--json"]).stdout
    report = json.loads(printed)
    assert (report["bench"], set(report)) == ("planning", {"bench", "machine", "rows"})
    assert {frozenset(row) for row in report["rows"]} == {
        frozenset(("name", "value", "unit", "peer", "ratio", "bound"))
    }
