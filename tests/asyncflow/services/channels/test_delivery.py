"""Exactly-once processing between an outbox and a row table, over a lossy network and through restarts.

A state machine drives the real Outbox and RowTable. A sender produces rows and delivers them to a receiver. The
network drops, duplicates and reorders deliveries, and both sides may die at any time. What the receiver has processed
counts until the receiver dies.

Invariant: after the network has recovered and the outbox has been delivered again, the current receiver has processed
each row of every open prompt exactly once. At all times no row is processed twice, and table and outbox hold no more
than the open prompts need.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncflow.services.channels.mailbox import has_room
from asyncflow.services.channels.outbox import Outbox
from asyncflow.services.channels.row_table import RowTable
from protocols.data.ids import prompt_of, sample_id
from tests.asyncflow.services.rows import remembered

EDGE = "reward.score#1.0"
CAPACITY = 3
WINDOW = 3

Rows = tuple[int, tuple[int, ...], int]  # attempt, samples, incarnation of the sender that owns the bytes


class Delivery(RuleBasedStateMachine):
    """The model (which rows exist and were processed) next to the real outbox and table, which must agree with it."""

    @initialize(samples=st.integers(1, 3))
    def begin(self, samples: int) -> None:
        self.per_prompt = samples
        self.faults_left = 4  # bounded: a schedule full of deaths exercises nothing else
        self.live: dict[int, int] = {}  # prompt -> its attempt
        self.finished: list[int] = []
        self.attempt_made: dict[int, int] = {}  # sample -> attempt that the current sender produced
        self.outbox: Outbox[Rows] = Outbox()
        self.sender_lives = 0  # incarnation
        self.network: list[Rows] = []
        self.table: RowTable[int] = RowTable(1)
        self.largest = 0  # rows of the largest delivery, which may enter an empty mailbox
        self.done: Counter[tuple[int, int]] = Counter()  # (sample, attempt) -> times the current receiver processed it

    # --- normal steps

    @precondition(lambda self: len(self.live) < WINDOW)
    @rule(prompts=st.integers(1, WINDOW))
    def admit(self, prompts: int) -> None:
        for _ in range(min(prompts, WINDOW - len(self.live))):
            self.live[len(self.live) + len(self.finished)] = 0

    @precondition(lambda self: self._unmade())
    @rule(data=st.data())
    def make_and_send(self, data: st.DataObject) -> None:
        """The sender produces some rows of one attempt, records them in its outbox and sends them."""
        unmade = self._unmade()
        attempt = self.live[prompt_of(unmade[0])]
        rows = [s for s in unmade if self.live[prompt_of(s)] == attempt]
        self._make(rows[: data.draw(st.integers(1, len(rows)))], attempt)

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """Any delivery in the network arrives, if there is room for it."""
        self._deliver(data.draw(st.integers(0, len(self.network) - 1)))

    @precondition(lambda self: self.table.complete)
    @rule(most=st.integers(1, 4))
    def work(self, most: int) -> None:
        self._work(most)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end_prompt(self, data: st.DataObject) -> None:
        prompt = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[prompt]
        self.finished.append(prompt)
        self.outbox.end([prompt])
        self.table.end([prompt])

    # --- faults

    @precondition(lambda self: self.faults_left and self.network)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.faults_left -= 1
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    @precondition(lambda self: self.faults_left and self.network)
    @rule()
    def drop_all(self) -> None:
        self.faults_left -= 1
        self.network.clear()

    @precondition(lambda self: self.faults_left and self.network)
    @rule(data=st.data())
    def double(self, data: st.DataObject) -> None:
        self.faults_left -= 1
        self.network.append(data.draw(st.sampled_from(self.network)))

    @precondition(lambda self: self.faults_left)
    @rule()
    def redeliver(self) -> None:
        """The outbox is delivered again although nothing was lost."""
        self.faults_left -= 1
        self.network += self.outbox.kept(EDGE)

    @precondition(lambda self: self.faults_left)
    @rule(samples_anew=st.booleans())
    def sender_dies(self, samples_anew: bool) -> None:
        """The bytes of its rows are lost, and its successor produces the rows of all open prompts again.

        A sender that samples produces other rows, under a higher attempt; one that computes produces the same rows.
        """
        self.faults_left -= 1
        self.sender_lives += 1
        self.outbox = Outbox()
        self.outbox.end(self.finished)
        self.attempt_made.clear()
        self.live = {prompt: attempt + samples_anew for prompt, attempt in self.live.items()}

    @precondition(lambda self: self.faults_left)
    @rule()
    def receiver_dies(self) -> None:
        """Its successor learns which prompts have ended, and is sent everything in the outbox."""
        self.faults_left -= 1
        self.table = RowTable(1)
        self.table.end(self.finished)
        self.done.clear()
        self.network += self.outbox.kept(EDGE)

    # --- invariants

    @invariant()
    def nothing_is_done_twice(self) -> None:
        assert all(times == 1 for times in self.done.values()), self.done

    @invariant()
    def the_mailbox_is_bounded(self) -> None:
        assert len(self.table) <= max(CAPACITY, self.largest)

    @invariant()
    def memory_is_bounded_by_what_lives(self) -> None:
        living = len(self.live) * self.per_prompt
        assert len(self.table) + remembered(self.table) <= 2 * living
        assert len(self.outbox) <= living

    def teardown(self) -> None:
        """Finally everything is delivered: each row is processed once, and after all prompts end no memory is held."""
        if not hasattr(self, "table"):
            return
        while unmade := self._unmade():
            attempt = self.live[prompt_of(unmade[0])]
            self._make([s for s in unmade if self.live[prompt_of(s)] == attempt], attempt)
        self._settle_down()
        self.network += self.outbox.kept(EDGE)
        self._settle_down()
        for prompt, attempt in self.live.items():
            for sample in self._samples(prompt):
                assert self.done[sample, attempt], f"sample {sample} of attempt {attempt} is lost"
        self.nothing_is_done_twice()
        self.outbox.end(list(self.live))
        self.table.end(list(self.live))
        assert (len(self.outbox), len(self.table), remembered(self.table)) == (0, 0, 0)

    # --- steps of both sides

    def _samples(self, prompt: int) -> list[int]:
        return [sample_id(prompt, i) for i in range(self.per_prompt)]

    def _unmade(self) -> list[int]:
        return [s for p, a in sorted(self.live.items()) for s in self._samples(p) if self.attempt_made.get(s, -1) < a]

    def _make(self, samples: list[int], attempt: int) -> None:
        rows: Rows = (attempt, tuple(samples), self.sender_lives)
        self.attempt_made |= dict.fromkeys(samples, attempt)
        self.outbox.keep(EDGE, samples, rows)
        self.network.append(rows)

    def _deliver(self, which: int) -> bool:
        attempt, samples, incarnation = self.network[which]
        if not has_room(len(self.table), len(self.table.fresh(0, samples, attempt)), CAPACITY):
            return False
        self.network.pop(which)
        self.largest = max(self.largest, len(samples))
        before = {s for s in samples if prompt_of(s) in self.finished}
        arrival = self.table.arrive(0, [(s, incarnation) for s in samples], attempt)
        assert before <= set(arrival.refused), "rows of prompts that have ended are refused"
        assert sorted(arrival.complete + arrival.refused) == sorted(samples)
        return True

    def _work(self, most: int) -> None:
        """Process complete rows. Rows whose bytes died with an earlier sender are taken back and requested again."""
        joined = self.table.take(self.table.next_complete(most))
        lost = [s for s, owner in zip(joined.samples, joined.inputs[0], strict=True) if owner != self.sender_lives]
        self.table.take_back(lost)
        if lost:
            self.network += self.outbox.kept(EDGE)
        self.done.update((s, joined.attempt) for s in joined.samples if s not in lost)

    def _settle_down(self) -> None:
        """Deliver and process until the network and the table are empty."""
        while self.network or self.table.complete:
            moved = any(self._deliver(which) for which in range(len(self.network)))
            if self.table.complete:
                self._work(1)
                moved = True
            assert moved, f"nothing fits: {self.network}, {len(self.table)} held"


TestDelivery = Delivery.TestCase
TestDelivery.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_delivery_is_kept_until_the_last_of_its_prompts_has_ended():
    outbox: Outbox[str] = Outbox()
    outbox.keep(EDGE, [sample_id(1, 0), sample_id(2, 0)], "both")
    outbox.end([1])
    assert outbox.kept(EDGE) == ["both"]
    outbox.end([2])
    assert outbox.kept(EDGE) == []
    outbox.keep(EDGE, [sample_id(1, 1)], "late")
    assert len(outbox) == 0, "rows of ended prompts are not kept"
