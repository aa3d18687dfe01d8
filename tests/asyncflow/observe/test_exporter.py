"""The exporter serves the table's metrics over HTTP, bounds the number of labels, and frees its port."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from asyncflow.observe.exporter import MAX_LABEL_VALUES, OTHER, Exporter, ScrapeTarget, write_targets
from asyncflow.observe.metrics import METRICS, Metric


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    exporter = Exporter("reward", rank=2)
    yield exporter
    exporter.close()


def scrape(port: int) -> dict[str, Family]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return {family.name: family for family in text_string_to_metric_families(answer.read().decode())}


def family_name(row: Metric) -> str:
    """The parser's name of a metric: a counter's family lacks its suffix."""
    return row.full_name.removesuffix("_total") if row.kind == "counter" else row.full_name


def fill(exporter: Exporter) -> None:
    record = {"counter": exporter.inc, "gauge": exporter.set, "histogram": exporter.observe}
    for row in METRICS.values():
        record[row.kind](row.name, 3, **dict.fromkeys(row.labels, "one"))


def test_every_metric_of_the_table_is_answered_with_its_kind_help_and_labels(exporter: Exporter):
    fill(exporter)
    families = scrape(exporter.serve())
    assert set(families) == {family_name(row) for row in METRICS.values()}
    for row in METRICS.values():
        family = families[family_name(row)]
        assert (family.type, family.documentation) == (row.kind, row.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == {"role", "rank", *row.labels}, sample


def test_no_series_exists_before_it_has_a_value(exporter: Exporter):
    families = scrape(exporter.serve())
    alive = {name for name, family in families.items() if family.samples}
    expected = {"up", "build_info", "start_time_seconds", "resident_memory_bytes"}
    assert alive == {METRICS[name].full_name for name in expected}
    assert families["asyncflow_resident_memory_bytes"].samples[0].value > 1e6


def test_values_add_up_under_the_actors_role_and_rank(exporter: Exporter):
    exporter.inc("tokens_generated_total", 40)
    exporter.inc("tokens_generated_total", 2)
    exporter.observe("step_seconds", 0.2)
    families = scrape(exporter.serve())
    [tokens] = families["asyncflow_tokens_generated"].samples
    assert (tokens.value, tokens.labels) == (42, {"role": "reward", "rank": "2"})
    steps = {
        s.labels.get("le"): s.value for s in families["asyncflow_step_seconds"].samples if s.name.endswith("_bucket")
    }
    assert steps["0.1"] == 0
    assert steps["0.25"] == 1


def test_a_metric_about_other_services_takes_their_role_and_defaults_to_its_own():
    exporter = Exporter("controller")
    try:
        exporter.set("loss", 0.5, role="critic")
        exporter.set("loss", 0.25)
        samples = scrape(exporter.serve())["asyncflow_loss"].samples
        assert {s.labels["role"] for s in samples} == {"critic", "controller"}
    finally:
        exporter.close()


def test_a_name_outside_the_table_is_refused_with_the_nearest(exporter: Exporter):
    with pytest.raises(KeyError, match="samples_total"):
        exporter.inc("asyncflow_sample_total", state="trained", reason="")


@pytest.mark.parametrize("labels", [{}, {"state": "trained"}, {"state": "trained", "reason": "", "sample": "7"}])
def test_labels_that_are_not_the_declared_ones_are_refused(exporter: Exporter, labels: dict[str, str]):
    with pytest.raises(ValueError, match=r"samples_total takes the labels \['reason', 'state'\]"):
        exporter.inc("samples_total", 1, **labels)


def test_a_metric_is_only_used_as_its_kind(exporter: Exporter):
    with pytest.raises(ValueError, match="samples_total is a counter, used as a gauge"):
        exporter.set("samples_total", 1, state="trained", reason="")


def test_a_label_that_takes_too_many_values_goes_on_as_other(exporter: Exporter):
    for i in range(MAX_LABEL_VALUES + 10):
        exporter.inc("samples_total", state="failed", reason=f"row {i} broke")
    samples = scrape(exporter.serve())["asyncflow_samples"].samples
    assert len(samples) == MAX_LABEL_VALUES + 1
    assert [s.value for s in samples if s.labels["reason"] == OTHER] == [10]


def test_closing_frees_the_port_and_ends_the_thread(exporter: Exporter):
    before = threading.active_count()
    port = exporter.serve()
    scrape(port)
    exporter.close()
    exporter.close()
    assert threading.active_count() == before
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_serving_twice_is_refused(exporter: Exporter):
    exporter.serve()
    with pytest.raises(RuntimeError, match=r"reward\.2 already serves"):
        exporter.serve()


def test_targets_are_written_as_file_discovery_and_leave_nothing_else(tmp_path: Path):
    path = tmp_path / "metrics" / "targets.json"
    write_targets(path, [ScrapeTarget("127.0.0.1:9", "policy", 0, "first")])
    write_targets(path, [ScrapeTarget("127.0.0.1:1234", "critic", 1, "second")])
    assert json.loads(path.read_text()) == [
        {"targets": ["127.0.0.1:1234"], "labels": {"role": "critic", "rank": "1", "run": "second"}}
    ]
    assert list(path.parent.iterdir()) == [path]
