"""The journals hold one line per step, survive a crash at any byte, and repeat no step after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncflow.observe.journal import MetricsJournal, read_lines
from protocols.control.events import Evaluated, StepCommitted


def committed(step: int, **metrics: float) -> StepCommitted:
    return StepCommitted(
        step=step,
        version=f"0.{step}",
        seconds=1.5,
        samples=8,
        tokens_generated=64,
        reward_mean=0.25,
        kl=0.01,
        loss=-0.5,
        staleness_max=1,
        staleness_mean=0.5,
        metrics=metrics,
    )


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def test_a_step_is_one_flat_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    journal = MetricsJournal(path)
    journal.append(committed(1, **{"critic.loss": 0.125, "ratio": float("nan"), "loss": 9.0}))
    [text] = path.read_text().splitlines()
    assert json.loads(text) == {
        "step": 1,
        "version": "0.1",
        "seconds": 1.5,
        "samples": 8,
        "tokens_generated": 64,
        "reward_mean": 0.25,
        "kl": 0.01,
        "loss": -0.5,
        "staleness_max": 1,
        "staleness_mean": 0.5,
        "critic.loss": 0.125,
        "ratio": None,
    }
    journal.close()


def test_an_evaluation_is_a_line_too_and_rewinds_alike(tmp_path: Path):
    path = tmp_path / "evaluations.jsonl"
    journal = MetricsJournal(path)
    for step in (0, 10, 20):
        journal.append(Evaluated(step=step, metric="exact_match", value=0.5, samples=100))
    journal.rewind(10)
    assert steps_of(path) == [0, 10]
    journal.close()


def test_lines_are_readable_while_the_run_still_writes(tmp_path: Path):
    journal = MetricsJournal(tmp_path / "metrics.jsonl")
    journal.append(committed(1))
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    journal.close()


def test_a_crash_at_any_byte_loses_at_most_the_line_it_tore(tmp_path: Path):
    whole = tmp_path / "whole.jsonl"
    journal = MetricsJournal(whole)
    journal.append(committed(1))
    first = len(whole.read_bytes())
    journal.append(committed(2))
    journal.close()
    data = whole.read_bytes()
    for cut in range(len(data) + 1):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(data[:cut])
        reopened = MetricsJournal(path)
        reopened.append(committed(3))
        reopened.close()
        kept = [1, 2] if cut == len(data) else [1] if cut >= first else []
        assert steps_of(path) == [*kept, 3], f"cut at byte {cut}"


@pytest.mark.parametrize("torn", [b"\0" * 40, b"\0" * 40 + b"\n", b'{"step": 2, "rew\n', b"7\n", b'{"a":"\xff"}\n'])
def test_an_end_that_is_no_line_is_removed_on_opening(tmp_path: Path, torn: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n' + torn)
    assert steps_of(path) == [1]
    MetricsJournal(path).close()
    assert path.read_bytes() == b'{"step":1}\n'


def test_a_rewound_journal_goes_on_behind_the_resumed_step(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    journal = MetricsJournal(path)
    for step in range(1, 8):
        journal.append(committed(step))
    journal.close()

    resumed = MetricsJournal(path)
    resumed.rewind(5)
    resumed.append(committed(6))
    resumed.close()
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    assert list(tmp_path.iterdir()) == [path]


def test_a_journal_that_is_too_large_keeps_every_second_line_and_the_newest(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    journal = MetricsJournal(path)
    for step in range(1, 7):
        journal.append(committed(step))
    journal.thin_out(most_bytes=path.stat().st_size)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    journal.append(committed(7))
    journal.thin_out(most_bytes=path.stat().st_size - 1)
    journal.append(committed(8))
    assert steps_of(path) == [1, 3, 5, 7, 8]
