"""A run as trackers get it: its beginning, three steps, an evaluation and two samples."""

from __future__ import annotations

from pathlib import Path

from asyncflow.observe.trackers.tracker import TrackedRun, Tracker
from protocols.control.samples import ShownSample

PROMPT, RESPONSE = "5+7=|`", "<b>12\nis it</b><eos>"

RECIPE = {"name": "sums", "steps": 3, "data": {"train": "sums.jsonl"}, "models": {"policy": {"learning_rate": 1e-4}}}


def run(folder: Path, first_step: int = 0) -> TrackedRun:
    folder.mkdir(exist_ok=True)
    return TrackedRun(
        id="0123456789abcdef",
        name="sums-1",
        folder=str(folder),
        project="tests",
        first_step=first_step,
        recipe=RECIPE,
    )


def sample(number: int, reward: float | None) -> ShownSample:
    return ShownSample(
        sample=number,
        prompt=PROMPT,
        response=RESPONSE,
        reference="12",
        reward=reward,
        parts={"right": 0.5},
        advantage=-0.25,
        versions=(2, 3),
        tokens=9,
        cut=False,
    )


SAMPLES = [sample(1 << 60, None), sample((1 << 60) + 1, 1.0)]


def show(tracker: Tracker, run: TrackedRun, steps: range, scale: float = 1.0) -> int | None:
    """Start a tracker, show some steps with an evaluation and texts after the last, and close it."""
    shown = tracker.start(run)
    for step in steps:
        tracker.log(step, {"reward_mean": step * scale, "policy/loss": -step * scale})
    tracker.log(steps[-1], {"evaluation/exact_match.pass@8": 0.5})
    tracker.texts(steps[-1], SAMPLES)
    tracker.close()
    return shown
