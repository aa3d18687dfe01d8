"""Advice from a run's folder: busy services, waits, and placements that would have been faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncflow.observe.timeline import trace_of
from asyncflow.planner.advice import Advice, advise, format_advice
from asyncflow.recipe.checks import check
from asyncflow.recipe.config import BadInput, load_recipe, recipe_text
from protocols.control.notices import Span
from tests.asyncflow.conftest import MakeRecipe

STEPS = 8
GENERATE, SCORE, VALUES, REFERENCE, CRITIC, POLICY = 4.0, 0.5, 0.5, 0.5, 3.0, 3.0
TOKENS = 6


def recorded(make_recipe: MakeRecipe, folder: Path, steps: int = STEPS, **changes: Any) -> Path:
    """The folder of a run in one pool, whose services ran one after the other for the seconds above."""
    recipe = check(make_recipe(deterministic=False, steps=steps, **changes)).recipe
    folder.mkdir()
    (folder / "recipe.toml").write_text(recipe_text(recipe))
    lines, spans, now = [], list[Span](), 0.0
    for step in range(steps):
        rows = recipe.samples_per_step
        began = now
        for service, activity, seconds, of in (
            ("policy", "generate", GENERATE, -1),
            ("reference", "reference.log_probs#1", REFERENCE, -1),
            ("critic", "critic.values#1", VALUES, -1),
            ("reward", "reward.score#1", SCORE, -1),
            ("critic", "critic.update#1", CRITIC, step),
            ("policy", "policy.update#1", POLICY, step),
        ):
            spans.append(Span(service, activity, now, now + seconds, rows if activity != "generate" else 0, of))
            now += seconds
        wait = GENERATE + REFERENCE + VALUES + SCORE
        lines.append({"step": step + 1, "seconds": now - began, "samples": rows, "tokens_generated": rows * TOKENS,
                      "wait.batch_seconds": wait})  # fmt: skip
    (folder / "metrics.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    (folder / "timeline.json").write_bytes(msgspec.json.encode(trace_of(spans)))
    return folder


def advised(folder: Path) -> Advice:
    return advise(folder, load_recipe(folder / "recipe.toml"))


@pytest.fixture
def advice(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Advice:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    return advised(recorded(make_recipe, tmp_path / "run", pools={"main": {"devices": 1}}))


def test_the_run_is_told_as_it_was(advice: Advice):
    step = GENERATE + SCORE + VALUES + REFERENCE + CRITIC + POLICY
    assert advice.step_s == pytest.approx(step)
    assert advice.simulated_s == pytest.approx(step, rel=0.01)
    assert advice.busy["policy"] == pytest.approx((GENERATE + POLICY) / step, rel=0.05)
    assert advice.pool_idle["main"] == pytest.approx(0, abs=0.01)
    assert advice.batch_wait == pytest.approx((GENERATE + SCORE + VALUES + REFERENCE) / step)


def test_one_device_that_is_always_busy_can_not_be_shared_better(advice: Advice):
    assert advice.moves == []
    assert "no other placement" in format_advice(advice)


def test_more_slots_let_services_work_side_by_side(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three pools with all services in the first: two slots are idle, and the advice is to use them."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    pools = {"main": {"devices": 1}, "spare": {"devices": 1}, "more": {"devices": 1}}
    placement = {"reward": {"pool": "spare"}, "reference": {"pool": "more"}}
    found = advised(recorded(make_recipe, tmp_path / "run", pools=pools, placement=placement))
    best = found.moves[0]
    beside_policy = {service for pool, services in best.pools.items() for service in services if "policy" in services}
    assert "critic" not in beside_policy, "the two that train long are no longer in each other's way"
    assert best.gain > 0.2 and best.step_s == pytest.approx(found.step_s * (1 - best.gain))
    assert f"{best.gain:.0%} less" in format_advice(found)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_record_that_is_too_short_is_refused(make_recipe: MakeRecipe, tmp_path: Path, steps: int):
    with pytest.raises(BadInput, match=f"{steps} steps are on record; advice needs a finished run of 5 or more"):
        advised(recorded(make_recipe, tmp_path / "run", steps=steps))
