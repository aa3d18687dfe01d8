"""The metric names follow Prometheus' conventions, so that dashboards and alerts can rely on them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import asyncflow
from asyncflow.observe.metrics import GROUPS, METRICS, Metric

ROOT = Path(asyncflow.__file__).parent
BOUNDED = {
    *("activity", "channel", "metric", "part", "phase", "python"),
    *("reason", "replica", "role", "side", "state", "statistic", "tracker", "version"),
}


@pytest.mark.parametrize("row", METRICS.values(), ids=lambda row: row.name)
def test_a_metric_is_named_documented_and_labelled_by_the_rules(row: Metric):
    assert re.fullmatch(r"asyncflow_[a-z][a-z_]*", row.full_name)
    assert row.help.endswith(".")
    assert row.name.endswith("_total") == (row.kind == "counter")
    assert set(row.labels) <= BOUNDED
    assert bool(row.buckets) == (row.kind == "histogram")
    assert list(row.buckets) == sorted(set(row.buckets))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_of_the_table_is_set_somewhere(name: str):
    """A metric that is never set is an empty panel and an alert that never fires."""
    sources = (path for path in ROOT.rglob("*.py") if path.name != "metrics.py")
    assert any(f'"{name}"' in path.read_text() for path in sources)


def test_names_are_unique():
    assert len(METRICS) == sum(len(metrics) for metrics in GROUPS.values())
