"""MLflow: a tracking server, or a local database."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncflow.observe.trackers.tables import COLUMNS, rows_of
from asyncflow.observe.trackers.tracker import TrackedRun
from protocols.control.samples import ShownSample

ID_TAG = "asyncflow.id"
LONGEST_PARAMETER = 500  # characters
MOST_PARAMETERS = 100  # in one request


class MLflow:
    """Implements `Tracker`. Credentials come from MLFLOW_TRACKING_USERNAME and the like, never from a recipe.

    A resumed run goes on with the same run, which is found by a tag. Its steps can't be taken back, so those of an
    abandoned lineage stay. Texts are artifacts, samples/step_000010.json.
    """

    def __init__(self, uri: str = "") -> None:
        """`uri` of the store; "": as MLFLOW_TRACKING_URI says, else mlflow.db beside the run's folder."""
        self._uri = uri
        self._client: Any = None
        self._run = ""

    def start(self, run: TrackedRun) -> int | None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunStatus

        self._metric = Metric
        beside = Path(run.folder).parent / "mlflow.db"
        uri = self._uri or os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{beside}"
        self._client = client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(run.project)
        # Else a local store would put files into the working directory.
        files = beside.with_name("mlflow-artifacts").as_uri() if uri.startswith("sqlite:") else None
        number = experiment.experiment_id if experiment else client.create_experiment(run.project, files)
        if found := client.search_runs([number], f"tags.`{ID_TAG}` = '{run.id}'", max_results=1):
            self._run = found[0].info.run_id
            client.update_run(self._run, status=RunStatus.to_string(RunStatus.RUNNING))
        else:
            self._run = client.create_run(number, run_name=run.name, tags={ID_TAG: run.id}).info.run_id
            # A parameter can't change: of a resumed run the recipe's file says what it went on with.
            parameters = [Param(key, value[:LONGEST_PARAMETER]) for key, value in _flat(run.recipe)]
            for start in range(0, len(parameters), MOST_PARAMETERS):
                client.log_batch(self._run, params=parameters[start : start + MOST_PARAMETERS])
        client.log_dict(self._run, dict(run.recipe), "recipe.json")
        return None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        values = [self._metric(_name(name), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=values)

    def texts(self, step: int, rows: Sequence[ShownSample]) -> None:
        table = {"columns": COLUMNS, "data": rows_of(step, rows)}  # the form in which MLflow shows a table
        self._client.log_dict(self._run, table, f"samples/step_{step:06d}.json")

    def close(self) -> None:
        if self._run:
            self._client.set_terminated(self._run)


def _name(metric: str) -> str:
    """A metric's name without the characters that MLflow refuses."""
    return re.sub(r"[^\w./ -]", "_", metric)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield _name(f"{prefix}{key}"), value if isinstance(value, str) else msgspec.json.encode(value).decode()
