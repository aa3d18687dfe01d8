"""A run with trackers: what TensorBoard has of it is what its own journals have, and a broken tracker costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import asyncflow
from asyncflow.observe.journal import read_lines
from protocols.control.events import Event, Warned
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.observe.trackers.test_tensorboard import curve, read, texts
from workers.user_code import search_in

BROKEN = """
class Broken:
    def start(self, run): raise ConnectionError("no route to the server")
    def log(self, step, metrics): pass
    def texts(self, step, rows): pass
    def close(self): pass
"""


async def test_curves_evaluations_and_texts_of_a_run_reach_tensorboard(make_recipe: MakeRecipe, tmp_path: Path):
    (tmp_path / "broken_tracker.py").write_text(BROKEN)
    search_in([str(tmp_path)])
    observe = {"trackers": ["broken_tracker.py:Broken", "tensorboard"], "samples": {"every": 2, "rows": 3}}
    events: list[Event] = []
    async with asyncflow.launch(make_recipe(steps=2, observe=observe, evaluation={"every": 1})) as run:
        events = [event async for event in run.events()]
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error

    steps, shown = read_lines(run.folder / "metrics.jsonl"), read(run.folder / "tensorboard")
    assert curve(shown, "policy/loss") == [(line["step"], pytest.approx(line["policy.loss"])) for line in steps]
    for name in ("policy/entropy", "policy/gradient_norm", "critic/gradient_norm", "memory/controller_resident_bytes"):
        assert [step for step, value in curve(shown, name) if value > 0] == [1, 2], name
    assert curve(shown, "tokens_total")[-1] == (2, sum(line["tokens_generated"] for line in steps))
    evaluations = read_lines(run.folder / "evaluations.jsonl")
    points = [(line["step"], pytest.approx(line["value"])) for line in evaluations]
    assert [step for step, _ in points] == [0, 1, 2]
    assert curve(shown, f"evaluation/{evaluations[0]['metric']}") == points

    tables = {line["step"]: line["rows"] for line in read_lines(run.folder / "samples.jsonl")}
    assert {step: len(rows) for step, rows in tables.items()} == {1: 3, 2: 3}
    for step, page in texts(shown, "samples"):
        for row in tables[step]:
            assert f"`{row['prompt']}` | `{row['response']}`" in page
    assert "<eos>" in "".join(row["response"] for rows in tables.values() for row in rows) or tables[1][0]["cut"]

    [warning] = [event.text for event in events if isinstance(event, Warned) and "tracker" in event.text]
    assert warning.startswith("tracker broken_tracker.py:Broken: ConnectionError: no route to the server")
    log = (run.folder / "logs" / "controller.log").read_text()
    assert "tracker broken_tracker.py:Broken: 7 records were dropped" in log
