"""Between an outbox and a table deliveries are dropped, doubled and reordered, and either side dies: no row is lost
or doubled.

A source feeds a sender, which works and sends to a receiver, over a network without manners. What the receiver
works on stays done until it dies itself. Whatever happened: once the network delivers and everybody sends again
what was lost, each row of a prompt that has not ended has been done by the living receiver exactly once.
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

Rows = tuple[int, tuple[int, ...], int]  # attempt, samples, incarnation of the sender that holds their bytes


class Delivery(RuleBasedStateMachine):
    """The world: what is true of the rows, and the real bookkeeping that has to agree with it."""

    @initialize(samples=st.integers(1, 3))
    def begin(self, samples: int) -> None:
        self.per_prompt = samples
        self.patience = 4  # for what goes wrong: where everything dies at once, nothing else is seen
        self.live: dict[int, int] = {}  # prompt -> its attempt
        self.finished: list[int] = []
        self.attempt_made: dict[int, int] = {}  # sample -> attempt that the living sender made
        self.outbox: Outbox[Rows] = Outbox()
        self.sender_lives = 0  # incarnation
        self.network: list[Rows] = []
        self.table: RowTable[int] = RowTable(1)
        self.largest = 0  # delivery that came: it is let into an empty mailbox
        self.done: Counter[tuple[int, int]] = Counter()  # (sample, attempt) -> times the living receiver did it

    # --- what is right

    @precondition(lambda self: len(self.live) < WINDOW)
    @rule(prompts=st.integers(1, WINDOW))
    def admit(self, prompts: int) -> None:
        for _ in range(min(prompts, WINDOW - len(self.live))):
            self.live[len(self.live) + len(self.finished)] = 0

    @precondition(lambda self: self._unmade())
    @rule(data=st.data())
    def make_and_send(self, data: st.DataObject) -> None:
        """The sender makes some rows of one attempt, keeps them and sends them."""
        unmade = self._unmade()
        attempt = self.live[prompt_of(unmade[0])]
        rows = [s for s in unmade if self.live[prompt_of(s)] == attempt]
        self._make(rows[: data.draw(st.integers(1, len(rows)))], attempt)

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """Any of what flies comes, where there is room."""
        self._deliver(data.draw(st.integers(0, len(self.network) - 1)))

    @precondition(lambda self: self.table.settled)
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

    # --- what goes wrong

    @precondition(lambda self: self.patience and self.network)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.patience -= 1
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    @precondition(lambda self: self.patience and self.network)
    @rule()
    def drop_all(self) -> None:
        self.patience -= 1
        self.network.clear()

    @precondition(lambda self: self.patience and self.network)
    @rule(data=st.data())
    def double(self, data: st.DataObject) -> None:
        self.patience -= 1
        self.network.append(data.draw(st.sampled_from(self.network)))

    @precondition(lambda self: self.patience)
    @rule()
    def redeliver(self) -> None:
        """Nobody asked, and it does no harm."""
        self.patience -= 1
        self.network += self.outbox.kept(EDGE)

    @precondition(lambda self: self.patience)
    @rule(draws=st.booleans())
    def sender_dies(self, draws: bool) -> None:
        """The bytes of its rows die with it, and what lives is made anew.

        One that draws makes other rows, under a higher attempt; one that computes makes the same rows again.
        """
        self.patience -= 1
        self.sender_lives += 1
        self.outbox = Outbox()
        self.outbox.end(self.finished)
        self.attempt_made.clear()
        self.live = {prompt: attempt + draws for prompt, attempt in self.live.items()}

    @precondition(lambda self: self.patience)
    @rule()
    def receiver_dies(self) -> None:
        """Its successor is told what is over, and is sent what is kept."""
        self.patience -= 1
        self.table = RowTable(1)
        self.table.end(self.finished)
        self.done.clear()
        self.network += self.outbox.kept(EDGE)

    # --- what must hold

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
        """In the end everything comes: each row is done once, and when all prompts ended nothing is left."""
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

    # --- the parts

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
        assert before <= set(arrival.refused), "what is over is refused"
        assert sorted(arrival.settled + arrival.refused) == sorted(samples)
        return True

    def _work(self, most: int) -> None:
        """Read what is there; what a dead sender holds can't be read and is taken back."""
        joined = self.table.take(self.table.next_settled(most))
        lost = [s for s, owner in zip(joined.samples, joined.inputs[0], strict=True) if owner != self.sender_lives]
        self.table.take_back(lost)
        if lost:
            self.network += self.outbox.kept(EDGE)
        self.done.update((s, joined.attempt) for s in joined.samples if s not in lost)

    def _settle_down(self) -> None:
        """Deliver and work until there is nothing more to do."""
        while self.network or self.table.settled:
            moved = any(self._deliver(which) for which in range(len(self.network)))
            if self.table.settled:
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
    assert len(outbox) == 0, "of prompts that are over nothing is kept"
