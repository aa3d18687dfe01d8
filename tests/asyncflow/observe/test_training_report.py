"""The report of a fine-tuning: its curves and the answers before and after."""

from __future__ import annotations

from pathlib import Path

import msgspec

from asyncflow.observe.training_report import training_page, write_training_report


def test_it_has_the_curves_that_were_measured_and_the_answers():
    steps = [{"step": 0, "heldout_loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.0, "heldout_loss": 1.1}]
    answers = [{"prompt": "1+1=", "demonstrated": "2", "before": "<b>", "after": "2"}]
    page = training_page("sft", steps, answers)
    assert page.count("<figure>") == 2
    assert "Held-out loss" in page and "Learning rate" not in page
    assert "&lt;b&gt;" in page and "<b>Loss</b>" in page


def test_it_is_written_from_the_folder(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(msgspec.json.encode({"step": 1, "loss": 1.0}) + b"\n")
    page = write_training_report(tmp_path, "reward model").read_text()
    assert "<title>reward model: training report</title>" in page and "Answers" not in page
