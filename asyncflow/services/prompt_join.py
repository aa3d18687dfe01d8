"""The join before the batch: rows by sample, samples by prompt. A prompt settles when all of its rows have arrived."""

from __future__ import annotations

from collections import defaultdict

from asyncflow.services.mailbox import RowTable
from protocols.columns import Batch
from protocols.control import Settled
from protocols.ids import prompt_of
from protocols.messages import Costs, Rollouts, Scores, Values
from protocols.stage import Failure


class PromptJoin:
    """Holds joined rows from the first arrival until the batch takes them or the prompt dies."""

    def __init__(self, edges: int, samples_per_prompt: int) -> None:
        self._table = RowTable(edges)
        self._edges = edges
        self._samples = samples_per_prompt
        self._settled: defaultdict[int, list[int]] = defaultdict(list)
        self.peak = 0

    @property
    def depth(self) -> int:
        """Samples held, complete or not."""
        return len(self._table)

    def arrive(self, position: int, batch: Batch | None, failures: list[Failure]) -> list[Settled]:
        """Take rows of one edge; the prompts that settled by it. Rows of dead prompts are let go at once."""
        settled = self._table.arrive(position, batch, failures)
        self.peak = max(self.peak, self.depth)
        self._table.next_settled(len(settled))
        complete = []
        for sample in settled:
            samples = self._settled[prompt_of(sample)]
            samples.append(sample)
            if len(samples) == self._samples:
                complete.append(self._close(prompt_of(sample)))
        return complete

    def take(self, samples: list[int]) -> tuple[Batch, ...]:
        """Take joined rows out, each input in the order of `samples`."""
        columns = tuple(self._table.column(p, samples) for p in range(self._edges))
        self._table.remove(samples)
        return columns

    def _close(self, prompt: int) -> Settled:
        samples = sorted(self._settled.pop(prompt))
        dead = [f for s in samples if (f := self._table.failure_of(s)) is not None]
        if dead:
            # A group that lost a member is not trained: its baseline and its count would be another's.
            self._table.remove(samples)
            return Settled(prompt, [s for s in samples if s not in {f.sample_id for f in dead}], dead)
        return self._summary(prompt, samples)

    def _summary(self, prompt: int, samples: list[int]) -> Settled:
        oldest, critic, tokens, reward = 0, -1, 0, 0.0
        for position in range(self._edges):
            rows = self._table.column(position, samples)
            match rows:
                case Rollouts():
                    oldest, tokens = int(rows.versions.values.min()), len(rows.responses.values)
                case Values():
                    critic = int(rows.versions.min()) if critic < 0 else min(critic, int(rows.versions.min()))
                case Scores():
                    reward += float(rows.scores.sum())
                case Costs():
                    pass
        return Settled(prompt, samples, [], oldest, critic, tokens, reward)
