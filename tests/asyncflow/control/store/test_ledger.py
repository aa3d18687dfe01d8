"""The ledger: each sample ends once, a refused transition changes nothing, and an acknowledged one is never lost."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncflow.control.store.ledger import LIVE, TERMINAL, EndedSample, EndState, Ledger, LedgerError, State, Totals

ROOT = Path(__file__).parents[4]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.db")
    yield opened
    opened.close()


def test_the_imbalance_counts_every_end_and_what_is_live_once():
    whole = {"created": 15, "trained": 1, "dropped": 2, "failed": 4, "live": 8}
    assert Totals(**whole).imbalance == 0
    for name, count in whole.items():
        one_more = Totals(**whole | {name: count + 1})
        assert one_more.imbalance == (1 if name == "created" else -1), name


def batch_of(ledger: Ledger, *samples: int) -> list[int]:
    """Admit samples and move them into a batch."""
    ledger.admit(samples, version=ledger.version, term=0, cursor=ledger.cursor + len(samples))
    ledger.move(samples, "scored")
    ledger.move(samples, "batched")
    return list(samples)


def query(path: Path, text: str) -> list[tuple[object, ...]]:
    """Query or change a ledger's database without the ledger."""
    with closing(sqlite3.connect(path)) as db, db:
        return db.execute(text).fetchall()


def rows(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows of a ledger."""
    return {table: query(path, f"SELECT * FROM {table} ORDER BY 1") for table in ("samples", "steps", "meta")}


def test_a_new_ledger_is_empty(ledger: Ledger):
    assert (ledger.version, ledger.cursor, ledger.live()) == (0, 0, [])
    assert ledger.totals() == Totals(created=0, trained=0, dropped=0, failed=0, live=0)


def test_a_sample_goes_its_way_to_trained(ledger: Ledger):
    ledger.admit([1, 2], version=0, term=0, cursor=1)
    for state in ("generated", "scored", "batched"):
        ledger.move([1, 2], state)
        assert ledger.live() == [1, 2]
    ledger.commit_step(0, term=0, samples=[2, 1])
    assert ledger.live() == []
    assert ledger.totals() == Totals(created=2, trained=2, dropped=0, failed=0, live=0)
    assert (ledger.version, ledger.cursor) == (1, 1)


def test_a_score_may_be_heard_before_the_generation(ledger: Ledger):
    ledger.admit([1], version=0, term=0, cursor=1)
    ledger.move([1], "scored")
    with pytest.raises(LedgerError, match="sample 1 can't become generated: it is scored"):
        ledger.move([1], "generated")


def test_an_id_is_admitted_once(ledger: Ledger):
    ledger.admit([1, 2], version=0, term=0, cursor=1)
    with pytest.raises(LedgerError, match="admitted twice"):
        ledger.admit([3, 2], version=0, term=0, cursor=2)
    assert ledger.live() == [1, 2], "3 was admitted in the transaction that was refused"
    assert ledger.cursor == 1


@pytest.mark.parametrize("state", ["generated", "batched", "dropped", "failed"])
def test_a_refused_transition_names_sample_and_state_and_changes_nothing(ledger: Ledger, state: State):
    """Sample 1 could move, but 2 has ended, so neither is moved."""
    ledger.admit([1, 2], version=0, term=0, cursor=2)
    if state == "batched":
        ledger.move([1], "scored")
    ledger.end([(2, "failed", "timeout")])
    before = ledger.reasons()
    with pytest.raises(LedgerError, match=f"sample 2 can't become {state}: it is failed"):
        ledger.move([1, 2], state)
    assert ledger.reasons() == before


def test_a_sample_that_was_never_admitted_is_named(ledger: Ledger):
    with pytest.raises(LedgerError, match="sample 9 can't become failed: it is unknown"):
        ledger.end([(9, "failed", "timeout")])


def test_no_sample_is_trained_twice(ledger: Ledger):
    ledger.commit_step(0, 0, batch_of(ledger, 1))
    with pytest.raises(LedgerError, match="sample 1 can't become trained: it is trained"):
        ledger.commit_step(1, 0, [1])
    with pytest.raises(LedgerError, match="sample 1 can't become dropped: it is trained"):
        ledger.end([(1, "dropped", "run_ended")])
    assert ledger.version == 1


def test_a_sample_counts_once_in_a_batch(ledger: Ledger):
    with pytest.raises(LedgerError, match="sample 1 can't become trained: it is trained"):
        ledger.commit_step(0, 0, [*batch_of(ledger, 1), 1])
    assert (ledger.version, ledger.live()) == (0, [1])


def test_a_step_commits_its_samples_and_its_version_together_or_not_at_all(ledger: Ledger, tmp_path: Path):
    batch = batch_of(ledger, 1, 2)
    ledger.admit([3], version=0, term=0, cursor=3)
    with pytest.raises(LedgerError, match="sample 3 can't become trained: it is created"):
        ledger.commit_step(0, 0, [*batch, 3])
    assert (ledger.version, ledger.live()) == (0, [1, 2, 3])
    assert rows(tmp_path / "ledger.db")["steps"] == []


def test_steps_are_committed_in_order(ledger: Ledger):
    batch = batch_of(ledger, 1)
    with pytest.raises(LedgerError, match="step 1 can't be committed at version 0"):
        ledger.commit_step(1, 0, batch)
    ledger.commit_step(0, 0, batch)
    with pytest.raises(LedgerError, match="step 0 can't be committed at version 1"):
        ledger.commit_step(0, 0, batch_of(ledger, 2))


def test_ends_are_counted_by_reason(ledger: Ledger):
    ledger.admit([1, 2, 3], version=0, term=0, cursor=1)
    ledger.end([(1, "failed", "timeout"), (2, "dropped", "group_incomplete")])
    assert ledger.reasons() == {("failed", "timeout"): 1, ("dropped", "group_incomplete"): 1, ("created", ""): 1}
    assert ledger.totals() == Totals(created=3, trained=0, dropped=1, failed=1, live=1)


def test_an_imbalance_shows_a_sample_that_is_in_no_known_state(ledger: Ledger, tmp_path: Path):
    ledger.admit([1, 2], version=0, term=0, cursor=1)
    assert ledger.totals().imbalance == 0
    query(tmp_path / "ledger.db", "UPDATE samples SET state = 'lost' WHERE sample_id = 2")
    assert ledger.totals().imbalance == 1


def test_live_samples_start_again_in_a_new_term(ledger: Ledger, tmp_path: Path):
    ledger.commit_step(0, 0, batch_of(ledger, 1))
    batch_of(ledger, 3)
    ledger.admit([2], version=1, term=0, cursor=3)
    assert ledger.restart_live(term=1) == [2, 3]
    found = query(tmp_path / "ledger.db", "SELECT sample_id, state, attempt, term FROM samples ORDER BY sample_id")
    assert found == [(1, "trained", 0, 0), (2, "created", 1, 1), (3, "created", 1, 1)]


def test_a_backup_is_the_ledger_in_one_file(ledger: Ledger, tmp_path: Path):
    ledger.commit_step(0, 0, batch_of(ledger, 1, 2))
    ledger.admit([3], version=1, term=0, cursor=3)
    (tmp_path / "copy").mkdir()
    ledger.backup(tmp_path / "copy" / "ledger.db")
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["ledger.db"]
    assert rows(tmp_path / "copy" / "ledger.db") == rows(tmp_path / "ledger.db")
    assert query(tmp_path / "copy" / "ledger.db", "PRAGMA journal_mode") == [("delete",)], (
        "reading leaves no file beside"
    )
    ledger.move([3], "scored")
    copy = Ledger(tmp_path / "copy" / "ledger.db")
    copy.move([3], "generated")
    copy.close()


def test_what_was_recorded_is_there_when_the_ledger_is_opened_again(tmp_path: Path):
    first = Ledger(tmp_path / "ledger.db")
    first.commit_step(0, 0, batch_of(first, 1))
    first.close()
    second = Ledger(tmp_path / "ledger.db")
    assert (second.version, second.cursor, second.totals().trained) == (1, 1, 1)
    second.close()


def test_a_full_disk_is_reported_as_such_and_the_ledger_stays_usable(ledger: Ledger):
    """SQLite ends the transaction itself in this case; a second rollback would hide the cause."""
    ledger.admit([1], version=0, term=0, cursor=1)
    ledger._db.execute(f"PRAGMA max_page_count = {ledger._db.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        ledger.admit(range(2, 5000), version=0, term=0, cursor=2)
    assert (ledger.live(), ledger.cursor) == ([1], 1)
    ledger.move([1], "scored")


# --- a killed process

VICTIM = """
import sys
from pathlib import Path
from asyncflow.control.store.ledger import Ledger

ledger = Ledger(Path(sys.argv[1]))
for step in range(100_000):
    ledger.admit([step], version=step, term=0, cursor=step + 1)
    ledger.move([step], "scored")
    ledger.move([step], "batched")
    ledger.commit_step(step, 0, [step])
    print(step + 1, flush=True)  # the acknowledgement
"""


def test_a_killed_process_has_lost_nothing_that_it_acknowledged(tmp_path: Path):
    path = tmp_path / "ledger.db"
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout is not None
        for _ in range(20):
            victim.stdout.readline()
        victim.send_signal(signal.SIGKILL)
        acknowledged = 20 + len(victim.stdout.read().splitlines())
    ledger = Ledger(path)
    totals = ledger.totals()
    assert ledger.version in (acknowledged, acknowledged + 1)
    assert totals.trained == ledger.version
    assert ledger.cursor == totals.created
    assert totals.imbalance == 0
    assert totals.live <= 1, "one sample may have been on its way"
    ledger.close()


# --- a model: a dictionary


class LedgerMachine(RuleBasedStateMachine):
    """After any sequence of valid and invalid calls the ledger equals a dictionary that applies only the valid ones."""

    before: ClassVar[dict[State, tuple[State, ...]]] = {
        "generated": ("created",),
        "scored": ("created", "generated"),
        "batched": ("scored",),
        "trained": ("batched",),
        "dropped": LIVE,
        "failed": LIVE,
    }
    ids = st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True)

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.ledger = Ledger(Path(self.folder.name) / "ledger.db")
        self.model: dict[int, State] = {}
        self.version = self.cursor = 0

    @rule(samples=ids)
    def admit(self, samples: list[int]) -> None:
        if self.model.keys() & set(samples):
            with pytest.raises(LedgerError):
                self.ledger.admit(samples, self.version, 0, self.cursor + 1)
        else:
            self.cursor += 1
            self.ledger.admit(samples, self.version, 0, self.cursor)
            self.model |= dict.fromkeys(samples, "created")

    def apply(self, samples: list[int], state: State) -> bool:
        """Apply a move to the dictionary if it is valid; returns whether it is."""
        valid = all(self.model.get(s) in self.before[state] for s in samples)
        if valid:
            self.model |= dict.fromkeys(samples, state)
        return valid

    @rule(samples=ids, state=st.sampled_from(["generated", "scored", "batched"]))
    def move(self, samples: list[int], state: State) -> None:
        if self.apply(samples, state):
            self.ledger.move(samples, state)
        else:
            with pytest.raises(LedgerError):
                self.ledger.move(samples, state)

    @rule(samples=ids, state=st.sampled_from(["dropped", "failed"]))
    def end(self, samples: list[int], state: EndState) -> None:
        ended: list[EndedSample] = [(s, state, "why") for s in samples]
        if self.apply(samples, state):
            self.ledger.end(ended)
        else:
            with pytest.raises(LedgerError):
                self.ledger.end(ended)

    @rule(samples=ids)
    def commit_any(self, samples: list[int]) -> None:
        if self.apply(samples, "trained"):
            self.ledger.commit_step(self.version, 0, samples)
            self.version += 1
        else:
            with pytest.raises(LedgerError):
                self.ledger.commit_step(self.version, 0, samples)

    @precondition(lambda self: "batched" in self.model.values())
    @rule()
    def commit_batch(self) -> None:
        self.commit_any([s for s, state in self.model.items() if state == "batched"])

    @rule()
    def open_again(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(Path(self.folder.name) / "ledger.db")

    @rule()
    def restart(self) -> None:
        live = sorted(s for s, state in self.model.items() if state in LIVE)
        assert self.ledger.restart_live(1) == live
        self.model |= dict.fromkeys(live, "created")

    @invariant()
    def agrees(self) -> None:
        states = list(self.model.values())
        ends = {state: states.count(state) for state in TERMINAL}
        live = len(states) - sum(ends.values())
        assert self.ledger.totals() == Totals(created=len(states), live=live, **ends)
        assert self.ledger.live() == sorted(s for s, state in self.model.items() if state in LIVE)
        assert (self.ledger.version, self.ledger.cursor) == (self.version, self.cursor)

    def teardown(self) -> None:
        self.ledger.close()
        self.folder.cleanup()


LedgerMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestLedgerAgainstADictionary = LedgerMachine.TestCase
