"""TensorBoard reads back what was logged, and after a resume each step once."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from asyncflow.observe.trackers.tensorboard import TensorBoard
from tests.asyncflow.observe.trackers import tracked


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return events


def curve(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def texts(events: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]


def test_curves_texts_and_the_recipe_are_read_back(tmp_path: Path):
    assert tracked.show(TensorBoard(), tracked.run(tmp_path / "run"), range(1, 4)) == 0
    events = read(tmp_path / "run" / "tensorboard")
    assert curve(events, "reward_mean") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert curve(events, "policy/loss") == [(1, -1.0), (2, -2.0), (3, -3.0)]
    assert curve(events, "evaluation/exact_match.pass@8") == [(3, 0.5)]
    [(step, table)] = texts(events, "samples")
    assert step == 3
    assert "| `5+7=¦'` | `<b>12⏎is it</b><eos>` | `12` |" in table, "a text is no markup and ends no cell"
    assert len(table.splitlines()) == 2 + len(tracked.SAMPLES)
    assert '"learning_rate": 0.0001' in texts(events, "recipe")[0][1]


def test_the_steps_of_an_abandoned_lineage_are_replaced(tmp_path: Path):
    tracked.show(TensorBoard(), tracked.run(tmp_path / "run"), range(1, 6))
    resumed = tracked.run(tmp_path / "run", first_step=3)
    assert tracked.show(TensorBoard(), resumed, range(4, 7), scale=10.0) == 3
    events = read(tmp_path / "run" / "tensorboard")
    assert curve(events, "reward_mean") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    pages = EventMultiplexer({"run": str(tmp_path / "run" / "tensorboard")})  # what TensorBoard's pages read
    pages.Reload()
    assert [event.step for event in pages.Tensors("run", "samples")] == [6]


def test_runs_may_share_a_folder_of_their_own(tmp_path: Path):
    tracked.show(TensorBoard(folder=str(tmp_path / "all")), tracked.run(tmp_path / "run"), range(1, 2))
    assert curve(read(tmp_path / "all" / "sums-1"), "reward_mean") == [(1, 1.0)]
