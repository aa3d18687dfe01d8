"""The table of names follows Prometheus' conventions, so that dashboards and alerts can rely on them."""

from __future__ import annotations

import re

import pytest

from asyncflow.observe.metrics import GROUPS, METRICS, Metric

BOUNDED = {
    *("activity", "cause", "channel", "function", "metric", "phase", "python"),
    *("reason", "replica", "role", "side", "state", "version"),
}


@pytest.mark.parametrize("row", METRICS.values(), ids=lambda row: row.name)
def test_a_metric_is_named_documented_and_labelled_by_the_rules(row: Metric):
    assert re.fullmatch(r"asyncflow_[a-z][a-z_]*", row.full_name)
    assert row.help.endswith(".")
    assert row.name.endswith("_total") == (row.kind == "counter")
    assert set(row.labels) <= BOUNDED
    assert bool(row.buckets) == (row.kind == "histogram")
    assert list(row.buckets) == sorted(set(row.buckets))


def test_names_are_unique():
    assert len(METRICS) == sum(len(metrics) for metrics in GROUPS.values())
