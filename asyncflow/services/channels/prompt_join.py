"""PromptJoin joins rows by sample, and samples by prompt. A prompt settles when all of its rows have arrived.

An edge has a grain. A sample edge brings one row per sample. A prompt edge brings one row per prompt, such as a greedy
baseline's score, which the batch repeats for every sample of the prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from msgspec.structs import replace

from asyncflow.services.channels.finished_prompts import FinishedPrompts
from asyncflow.services.channels.row_table import Arrival, RowTable
from protocols.control.notices import PromptSettled
from protocols.data.columns import Batch, concat, take
from protocols.data.ids import BASELINE_INDEX, prompt_of, sample_id
from protocols.data.messages import Costs, Rollouts, Scores, Values
from protocols.stage import Failure, Grain

Held = tuple[Batch, int]  # a row inside a batch that arrived
LEAST_OF_GROUP = 2  # samples: one alone has nothing that it could be compared with
IsTrainable = Callable[[Mapping[int, Batch]], bool]  # of one prompt's rows, by the position of their sample edge


class PromptJoin:
    """Holds rows from their arrival until the batch takes them, or their prompt fails or is not trainable."""

    def __init__(
        self,
        grains: Sequence[Grain],
        samples_per_prompt: int,
        finished: FinishedPrompts | None = None,
        trainable: IsTrainable | None = None,
        *,
        partial: bool = False,
    ) -> None:
        """Args:

        trainable: decides whether a prompt that may be trained is; None: all are.
        partial: whether a prompt may be trained without the samples that failed, if `LEAST_OF_GROUP` are left.
        """
        self._by_prompt = [grain == "prompt" for grain in grains]
        self._place = [self._by_prompt[:p].count(by_prompt) for p, by_prompt in enumerate(self._by_prompt)]
        self._samples: RowTable[Held] = RowTable(self._by_prompt.count(False), finished)
        self._baselines: RowTable[Held] = RowTable(self._by_prompt.count(True), finished)
        self._complete: defaultdict[int, set[int]] = defaultdict(set)
        self._closed: dict[int, list[int]] = {}  # prompts that are complete without a failure -> their samples
        self._per_prompt = samples_per_prompt
        self._trainable = trainable
        self._partial = partial
        self.peak = 0

    @property
    def depth(self) -> int:
        """The number of rows held, complete or not: samples and baselines."""
        return len(self._samples) + len(self._baselines)

    def arrive(
        self, position: int, batch: Batch | None, failures: list[Failure], attempt: int = 0
    ) -> tuple[list[PromptSettled], Arrival]:
        """Take rows of one edge. Returns the prompts that this settles, and which rows were refused."""
        table = self._baselines if self._by_prompt[position] else self._samples
        rows: list[tuple[int, Held | Failure]] = [(f.sample_id, f) for f in failures]
        if batch is not None:
            rows += [(sample, (batch, row)) for row, sample in enumerate(batch.sample_ids.tolist())]
        late = [s for s, _ in rows if prompt_of(s) in self._closed]
        fresh = [(s, value) for s, value in rows if prompt_of(s) not in self._closed]
        arrival = table.arrive(self._place[position], fresh, attempt)
        self.peak = max(self.peak, self.depth)
        touched = dict.fromkeys(map(prompt_of, arrival.complete))
        if table is self._samples:
            for sample in arrival.complete:
                self._complete[prompt_of(sample)].add(sample)
        closed = [self._close(p) for p in touched if self._is_complete(p)]
        return closed, Arrival(arrival.complete, arrival.refused + late)

    def holds(self, samples: list[int]) -> bool:
        """Whether `take` can have these samples."""
        return all(prompt_of(sample) in self._closed for sample in samples)

    def take(self, samples: list[int]) -> tuple[Batch, ...]:
        """Take joined rows out, each input in the order of `samples`; a prompt's row is repeated for its samples."""
        prompts = dict.fromkeys(map(prompt_of, samples))
        baselines = [self._baseline_of(s) for s in samples]
        columns = tuple(
            _broadcast(self._baselines.column(self._place[p], baselines), samples)
            if self._by_prompt[p]
            else gather(self._samples.column(self._place[p], samples))
            for p in range(len(self._place))
        )
        self._samples.take(samples)
        self._baselines.take([sample_id(p, BASELINE_INDEX) for p in prompts] if any(self._by_prompt) else [])
        return columns

    def end(self, prompts: Sequence[int]) -> None:
        """These prompts are finished: drop their rows, and refuse those that still arrive."""
        self._samples.end(prompts)
        self._baselines.end(prompts)
        for prompt in prompts:
            self._closed.pop(prompt, None)
            self._complete.pop(prompt, None)

    def _is_complete(self, prompt: int) -> bool:
        samples = self._complete.get(prompt, set())
        if len(samples) < self._per_prompt or not all(map(self._samples.is_complete, samples)):
            return False
        return not any(self._by_prompt) or self._baselines.is_complete(sample_id(prompt, BASELINE_INDEX))

    def _close(self, prompt: int) -> PromptSettled:
        samples = sorted(self._complete.pop(prompt))
        dead = self._failures(prompt, samples)
        lost = {failure.sample_id for failure in dead}
        alive = [sample for sample in samples if sample not in lost]
        if dead and not (self._partial and len(alive) >= LEAST_OF_GROUP):
            self.end([prompt])
            return PromptSettled(prompt, alive, dead)
        self._samples.take(sorted(lost))
        summary = self._summary(prompt, alive, dead)
        if summary.trainable:
            self._closed[prompt] = alive
        else:
            # Drop its rows before the controller learns that its place is free, so that the next prompt finds room.
            self.end([prompt])
        return summary

    def _failures(self, prompt: int, samples: list[int]) -> list[Failure]:
        dead = [f for s in samples if (f := self._samples.failure_of(s)) is not None]
        if dead or not any(self._by_prompt):
            return dead
        baseline = self._baselines.failure_of(sample_id(prompt, BASELINE_INDEX))
        return [Failure(s, f"its prompt's baseline: {baseline.cause}") for s in samples] if baseline else []

    def _summary(self, prompt: int, samples: list[int], dead: list[Failure]) -> PromptSettled:
        oldest, critic, tokens, reward, cost = 0, -1, 0, 0.0, None
        columns = {
            position: gather(self._samples.column(self._place[position], samples))
            for position, by_prompt in enumerate(self._by_prompt)
            if not by_prompt
        }
        for rows in columns.values():
            match rows:
                case Rollouts():
                    oldest, tokens = int(rows.versions.values.min()), len(rows.responses.values)
                case Values():
                    critic = int(rows.versions.min()) if critic < 0 else min(critic, int(rows.versions.min()))
                case Scores():
                    reward += float(rows.scores.sum())
                case Costs():
                    cost = (cost or 0.0) + float(rows.costs.sum())
        trainable = self._trainable is None or self._trainable(columns)
        return PromptSettled(prompt, samples, dead, oldest, critic, tokens, reward, cost, trainable, partial=bool(dead))

    @staticmethod
    def _baseline_of(sample: int) -> int:
        return sample_id(prompt_of(sample), BASELINE_INDEX)


def gather(held: Sequence[Held]) -> Batch:
    """Rows of several batches as one batch, in order; consecutive rows of a batch are taken together."""
    parts: list[Batch] = []
    start = 0
    for end in range(1, len(held) + 1):
        if end == len(held) or held[end][0] is not held[start][0]:
            parts.append(take(held[start][0], np.array([row for _, row in held[start:end]])))
            start = end
    return concat(parts)


def _broadcast(held: Sequence[Held], samples: Sequence[int]) -> Batch:
    return replace(gather(held), sample_ids=np.array(samples, np.int64))
