"""The prompts in flight: admitted, complete, chosen for a batch, finished. Pure bookkeeping, no input or output."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from asyncflow.control.admission.staleness import Admission, CompletePrompt, choose_batch
from asyncflow.control.store.ledger import EndedSample
from protocols.control.notices import PromptSettled


class InFlightPrompts:
    """Every live prompt is here once: it waits for its rows, or it is complete and waits for a batch."""

    def __init__(self, admission: Admission, max_refills: int) -> None:
        self.admission = admission
        self._max_refills = max_refills
        self._min_versions: dict[int, int] = {}  # live prompts -> version at admission
        self._complete: dict[int, PromptSettled] = {}  # prompts whose rows are all at the join
        self._untrained_in_step = 0
        self._finished: list[int] = []

    @property
    def ready(self) -> int:
        """The number of prompts that a batch could take."""
        return len(self._complete)

    @property
    def incomplete(self) -> dict[int, int]:
        """Live prompts with rows that have not reached the join -> version at admission."""
        return {p: min_version for p, min_version in self._min_versions.items() if p not in self._complete}

    def admit(self, prompts: list[int]) -> None:
        """Admit prompts under the current version. Raises ValueError if they exceed the budget."""
        self.admission.admit(len(prompts))
        self._min_versions |= dict.fromkeys(prompts, self.admission.version)

    def complete(self, notice: PromptSettled) -> bool:
        """Record that all rows of a prompt are at the join. A dead or untrainable prompt makes room for another.

        A repeated notice changes nothing. If the rows were regenerated and the notice differs, the last one counts.

        Returns:
            False if the prompt has finished already.
        """
        prompt = notice.prompt_id
        if prompt not in self._min_versions:
            return False
        if prompt not in self._complete:
            self.admission.complete()
        self._complete[prompt] = notice
        if not notice.trains:
            self.drop(prompt)
        return True

    def close(self) -> None:
        """Form no further batch: every later notice comes too late."""
        self._min_versions.clear()
        self._complete.clear()

    def drop(self, prompt: int) -> None:
        """Finish a complete prompt untrained, which makes room for another. Raises KeyError if it is not complete."""
        del self._complete[prompt], self._min_versions[prompt]
        self.admission.end()
        self._untrained_in_step += 1
        self._finished.append(prompt)

    def mark_incomplete(self, training: Collection[int] = ()) -> None:
        """The join lost its memory: every complete prompt waits for its rows again, but for those that train now."""
        lost = [prompt for prompt in self._complete if prompt not in training]
        self.admission.mark_incomplete(len(lost))
        for prompt in lost:
            del self._complete[prompt]

    def rejects(self) -> str | None:
        """Why the step should be given up: more prompts finished untrained than `max_refills` rounds replace."""
        untrained, wanted = self._untrained_in_step, self.admission.prompts_per_step
        if untrained <= self._max_refills * wanted:
            return None
        return (
            f"step {self.admission.version}: {untrained} prompts failed or were dropped, more than max_refills = "
            f"{self._max_refills} rounds of {wanted} (reject rate at least {untrained / (untrained + wanted):.0%})"
        )

    def choose(self) -> list[CompletePrompt] | None:
        """The next batch, or None while it must wait."""
        ready = [CompletePrompt(prompt, _oldest(notice)) for prompt, notice in self._complete.items()]
        admission = self.admission
        return choose_batch(ready, self.incomplete, admission.version, admission.prompts_per_step, admission.staleness)

    def notices_of(self, batch: list[CompletePrompt]) -> list[PromptSettled]:
        """What the join reported about a batch's prompts, in the order of the batch."""
        return [self._complete[prompt.prompt_id] for prompt in batch]

    def commit(self, batch: list[CompletePrompt]) -> None:
        """A batch is trained: its prompts finish and the version rises, at once."""
        self.admission.commit()
        for prompt in batch:
            del self._min_versions[prompt.prompt_id], self._complete[prompt.prompt_id]
            self._finished.append(prompt.prompt_id)
        self._untrained_in_step = 0

    def take_finished(self) -> list[int]:
        """The prompts that finished since the last call: nobody needs their rows any more."""
        finished, self._finished = self._finished, []
        return finished


def failed_samples(notices: Iterable[PromptSettled]) -> list[EndedSample]:
    """How the samples end that failed in prompts whose others are trained."""
    return [(failure.sample_id, "failed", failure.cause) for notice in notices for failure in notice.dead]


def ended_samples(notice: PromptSettled) -> list[EndedSample]:
    """How the samples of a complete prompt end that is not trained: its failures, then what is dropped with them."""
    failed = failed_samples([notice])
    reason = "group_incomplete" if failed and not notice.partial else "no_signal"
    return failed + [(sample, "dropped", reason) for sample in notice.alive]


def _oldest(notice: PromptSettled) -> int:
    """Oldest version among a prompt's tokens and the critic values that its advantage uses."""
    return notice.oldest_version if notice.critic_version < 0 else min(notice.oldest_version, notice.critic_version)
