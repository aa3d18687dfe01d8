"""Fits of calls of several sizes, and an efficiency that reproduces the measured times."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from asyncflow.planner.calibration.calibration import (
    Calibration,
    LinearFit,
    ModelTimings,
    Timed,
    efficiency_of,
    fit,
    read_calibration,
)
from asyncflow.planner.costs.devices import CATALOGUE, Refused
from asyncflow.planner.costs.layouts import Layout
from asyncflow.planner.costs.shapes import Shape
from asyncflow.planner.costs.speeds import ModelSpeed
from asyncflow.planner.costs.workload import Lengths, ModelWork, Workload
from protocols.layout.topology import Topology

SHAPE = Shape("small", layers=2, hidden=128, intermediate=128, heads=4, kv_heads=2, vocabulary=48, tied=True)
PEAK, BANDWIDTH = 4e11, 8e10


def test_a_line_is_found_again():
    line = fit([1, 8, 64], [0.003, 0.010, 0.066])
    assert (line.fixed_s, line.slope_s) == (pytest.approx(0.002), pytest.approx(0.001))


def test_neither_part_of_a_line_is_negative():
    falling = fit([1, 10], [0.2, 0.1])
    assert falling.slope_s == 0 and 0.1 <= falling.fixed_s <= 0.2
    steeper = fit([10, 20], [0.01, 0.1])
    assert steeper.fixed_s == 0 and 0.001 < steeper.slope_s < 0.01


def test_one_size_gives_a_slope_or_a_height_but_always_its_own_time():
    line = fit([10, 10], [0.02, 0.02])
    assert line.fixed_s + 10 * line.slope_s == pytest.approx(0.02)


@pytest.mark.parametrize("seconds", [[], [0.1], [0.1, 0.0]])
def test_times_that_are_none_are_refused(seconds: list[float]):
    with pytest.raises(ValueError, match="a time above 0 for each amount, got 2 amounts"):
        fit([1, 2], seconds)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_cost_models_give_back_what_was_measured(steps: int):
    """Calls of 1 to 64 rows of 40 tokens, with the recipe's number of optimizer steps."""
    rows = (1, 8, 64)
    forward = [Timed(40 * n, 0.004 + 2e-6 * 40 * n) for n in rows]
    again = [t.seconds if steps > 1 else 0.0 for t in forward]
    update = [Timed(40 * n, steps * 0.02 + 7e-6 * 40 * n + a) for n, a in zip(rows, again, strict=True)]
    figures = ModelTimings(
        shape=SHAPE, sample_tokens=40.0, steps=steps, peak_flops=PEAK, bandwidth=BANDWIDTH, forward=forward,
        update=update, decode=LinearFit(0.005, 0.0001), publish_s=0.03,
    )  # fmt: skip
    device = msgspec.structs.replace(
        CATALOGUE["cpu-slot"], peak_flops=PEAK, memory_bytes_per_s=BANDWIDTH, efficiency=efficiency_of(figures)
    )
    work = Workload(64, Lengths.fixed(8), Lengths.fixed(32), mini_batches=steps)
    model = ModelWork("policy", SHAPE, generates=1, trains=True, rereads=True)
    speed = ModelSpeed(model, Layout(Topology(), False, 1, 1), device, work)
    for number, n in enumerate(rows):
        assert speed.forward_s([40] * n) == pytest.approx(forward[number].seconds, rel=0.02)
    assert speed.update_s([40] * 64) == pytest.approx(update[2].seconds, rel=0.02)
    assert speed.decode_s(1, 24) == pytest.approx(0.0051, rel=0.05)
    assert speed.decode_s(64, 24) == pytest.approx(0.0114, rel=0.05)
    assert speed.publish_s == pytest.approx(0.03, rel=0.02)


def test_a_calibration_is_a_file(tmp_path: Path):
    saved = Calibration(CATALOGUE["cpu-slot"], Lengths.fixed(7), 48, {"reward": 0.001}, "here")
    (tmp_path / "here.json").write_bytes(msgspec.json.encode(saved))
    assert read_calibration(str(tmp_path / "here.json")) == saved
    assert read_calibration("H100").device is CATALOGUE["H100"]


def test_responses_that_were_cut_go_on_under_a_larger_limit():
    seen = Calibration(CATALOGUE["cpu-slot"], Lengths((8.0, 48.0, 48.0, 48.0)), limit=48)
    here, longer, shorter = (seen.responses_under(limit) for limit in (48, 96, 16))
    assert here == seen.responses
    assert longer and longer.tokens[0] == 8 and 48 < longer.tokens[1] <= longer.maximum <= 96
    assert shorter and shorter.tokens == (8, 16, 16, 16)


def test_responses_of_no_known_limit_were_not_cut():
    seen = Calibration(CATALOGUE["cpu-slot"], Lengths((8.0, 48.0)))
    assert seen.responses_under(96) == seen.responses


def test_what_is_no_calibration_is_refused(tmp_path: Path):
    with pytest.raises(Refused, match=r"device 'H999': no file .*and no device of A100-80G"):
        read_calibration("H999")
    for content in (b'{"device": 3}', b'{"device": {"name": "\xff"}}'):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(Refused, match="no calibration of `asyncflow calibrate`"):
            read_calibration(str(tmp_path / "other.json"))
