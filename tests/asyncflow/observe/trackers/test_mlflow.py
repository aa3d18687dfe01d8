"""MLflow's local store has the curves, the texts and the recipe, and a resumed run goes on in the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from asyncflow.observe.trackers.mlflow import MLflow
from tests.asyncflow.observe.trackers import tracked


def points(client: MlflowClient, run: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run, name)]


def test_a_resumed_run_has_the_curves_and_texts_of_both_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes ten seconds to make
    uri = (tmp_path / "store").as_uri()
    assert tracked.show(MLflow(uri), tracked.run(tmp_path / "run"), range(1, 4)) is None
    tracked.show(MLflow(uri), tracked.run(tmp_path / "run", first_step=3), range(4, 6))

    client = MlflowClient(tracking_uri=uri)
    [run] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])  # pyright: ignore
    number = run.info.run_id
    assert (run.info.run_name, run.info.status) == ("sums-1", "FINISHED")
    assert points(client, number, "policy/loss") == [(step, -float(step)) for step in range(1, 6)]
    assert points(client, number, "evaluation/exact_match.pass_8") == [(3, 0.5), (5, 0.5)]
    assert run.data.params["models.policy.learning_rate"] == "0.0001"
    table = json.loads(Path(client.download_artifacts(number, "samples/step_000005.json")).read_text())
    assert dict(zip(table["columns"], table["data"][1], strict=True)) == {
        "step": 5,
        "sample": str((1 << 60) + 1),
        "prompt": tracked.PROMPT,
        "response": tracked.RESPONSE,
        "reference": "12",
        "reward": 1.0,
        "parts": "right 0.5",
        "cost": None,
        "advantage": -0.25,
        "oldest version": 2,
        "newest version": 3,
        "tokens": 9,
        "cut": False,
    }
    assert len(client.list_artifacts(number, "samples")) == 2
