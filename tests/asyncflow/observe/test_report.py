"""The report: one self-contained page from the files of a finished or an interrupted run."""

from __future__ import annotations

import re
import sqlite3
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from asyncflow.observe.journal import MetricsJournal, read_lines
from asyncflow.observe.report import gantt_window, ledger_totals, write_report
from asyncflow.observe.timeline import Timeline
from protocols.control.events import Evaluated, StepCommitted
from protocols.control.notices import Span

STEPS = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    (tmp_path / "recipe.toml").write_text('name = "sort <b>eight</b>"\nalgorithm = "ppo"\nsteps = 30\n')
    metrics = MetricsJournal(tmp_path / "metrics.jsonl")
    evaluations = MetricsJournal(tmp_path / "evaluations.jsonl")
    timeline = Timeline(tmp_path / "timeline.jsonl")
    for step in range(1, STEPS + 1):
        metrics.append(
            StepCommitted(
                step=step,
                version=f"0.{step}",
                seconds=2.0,
                samples=8,
                tokens_generated=64,
                reward_mean=step / STEPS,
                kl=float("nan") if step == 3 else 0.01 * step,
                loss=-0.1,
                staleness_max=1,
                staleness_mean=0.5,
                metrics={"critic.loss": 1 / step, "policy.mismatch_mean": 1e-6, "policy.mismatch_max": 1e-5},
            )
        )
        at = 1.7e9 + 2.0 * step
        timeline.add([Span("generator", "policy.generate#1", at, at + 1.5, 8)])
        timeline.add([Span("policy", "policy.update#1", at + 1, at + 1.75, 8, step)])
    for step in (0, 15, 30):
        evaluations.append(Evaluated(step=step, metric="exact_match", value=step / 40, samples=100))
    timeline.write(tmp_path / "timeline.json")
    for journal in (metrics, evaluations, timeline):
        journal.close()
    with sqlite3.connect(tmp_path / "ledger.db") as ledger:
        ledger.execute("CREATE TABLE samples (id INTEGER PRIMARY KEY, state TEXT, reason TEXT)")
        rows = [("trained", None)] * 240 + [("failed", "reward timed out")] * 3
        ledger.executemany("INSERT INTO samples (state, reason) VALUES (?, ?)", rows)
    ledger.close()
    return tmp_path


class Page(HTMLParser):
    """Parses a page; elements must be nested correctly."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def test_the_page_shows_curves_gantt_idle_time_and_samples(folder: Path):
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path)
    for words in (
        "Reward",
        "KL to the reference",
        "Policy loss",
        "Critic loss",
        "Held-out exact_match",
        "Engine against trainer",
    ):
        assert words in page.texts
    assert page.tags.count("svg") == 9 + 2  # figures, Gantt and idle time
    assert "policy.update#1, 0.75 s, 8 rows, step 30" in page.texts
    assert re.search(r"generator: idle 2\d\.\d% of the time, at least 0\.0%", page.text)
    assert {"240", "243", "reward timed out", "1.23%"} <= set(page.texts)
    assert "step 30: exact_match 0.75" in page.texts


def test_costs_multiplier_coefficient_and_parts_of_the_reward_are_drawn_where_there_are_some(folder: Path):
    own = {"cost_mean": 0.5, "cost_limit": 0.1, "multiplier": 1.5, "kl_coefficient": 0.02, "kl_target": 0.01}
    own |= {"reward.right": 0.75, "policy.ptx_loss": 1.25}
    plain = set(titles(folder))
    lines = [{**line, **own} for line in read_lines(folder / "metrics.jsonl")]
    (folder / "metrics.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(lines))
    new = {"Cost", "Multiplier", "KL coefficient", "Reward: right", "Pretraining loss"}
    assert set(titles(folder)) - plain == new
    page = write_report(folder).read_text()
    assert "step 30: limit 0.1" in page
    assert "step 30: target 0.01" in page


def titles(folder: Path) -> list[str]:
    """The titles of the page's figures."""
    return re.findall(r"<figcaption><b>(.*?)</b>", write_report(folder).read_text())


def test_the_page_needs_nothing_but_itself_and_escapes_what_the_run_says(folder: Path):
    page = Page(write_report(folder))
    assert "sort <b>eight</b>" in page.texts
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert "url(" not in page.text
    assert any(value and value.startswith("default-src 'none'") for _, value in page.attributes)
    assert "prefers-color-scheme: dark" in page.text


def test_a_value_that_is_not_finite_leaves_a_gap_and_no_nan(folder: Path):
    page = Page(write_report(folder))
    assert not any("nan" in (value or "").lower() for _, value in page.attributes)
    start = page.texts.index("KL to the reference")
    figure = page.texts[start : page.texts.index("Policy loss")]
    steps = [text for text in figure if ": value " in text]
    assert len(steps) == STEPS - 1
    assert not any(text.startswith("step 3:") for text in figure)


def test_totals_that_are_given_go_before_those_of_the_ledger(folder: Path):
    page = Page(write_report(folder, totals={("trained", ""): 5, ("dropped", "stale"): 2}))
    assert "stale" in page.texts
    assert "reward timed out" not in page.texts


def test_the_report_of_a_run_that_left_nothing_says_so(tmp_path: Path):
    page = Page(write_report(tmp_path))
    for words in ("No step was committed", "no timeline.json", "no ledger of samples", "no recipe.toml"):
        assert words in page.text


def test_a_ledger_without_samples_table_has_no_totals(tmp_path: Path):
    sqlite3.connect(tmp_path / "ledger.db").execute("CREATE TABLE other (id)").connection.close()
    assert ledger_totals(tmp_path / "ledger.db") == {}


def test_the_gantt_shows_the_last_four_steps_or_the_last_minute():
    steps = [Span("policy", "policy.update#1", 10.0 * s, 10.0 * s + 5, 8, s) for s in range(1, 11)]
    assert gantt_window(steps) == (70.0, 105.0)
    assert gantt_window(steps[:2]) == (10.0, 25.0)
    unknown = [Span("reward", "reward.score#1", 10.0 * s, 10.0 * s + 5) for s in range(1, 21)]
    assert gantt_window(unknown) == (145.0, 205.0)


def test_generated_texts_are_shown_from_the_first_step_to_the_last_and_are_no_markup(folder: Path):
    row = {"prompt": "<b>5+7=", "response": "12<eos>", "reference": "twelve", "reward": 0.5, "parts": {"right": 0.25}}
    row |= {"cost": None, "advantage": -1.0, "versions": [3, 4], "tokens": 2, "cut": True}
    lines = [{"step": step, "rows": [row]} for step in range(1, 21)]
    (folder / "samples.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(lines))
    page = Page(write_report(folder))
    assert {"<b>5+7=", "12<eos>", "twelve", "Step 1", "Step 20"} <= set(page.texts)
    assert page.texts.count("twelve") == 5
    assert "reward 0.5\nright 0.25\nadvantage -1\n2 tokens, cut\nversions 3 to 4" in page.texts
