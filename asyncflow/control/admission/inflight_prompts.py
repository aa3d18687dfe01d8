"""The prompts in flight: admitted, settled, chosen for a batch, ended. Pure bookkeeping over the rules of time."""

from __future__ import annotations

from asyncflow.control.admission.staleness import Admission, Ready, choose_batch
from protocols.control.notices import PromptSettled


class InFlightPrompts:
    """Every live prompt is here once: waiting for its rows, or settled and ready to be trained."""

    def __init__(self, admission: Admission, max_refills: int) -> None:
        self.admission = admission
        self._max_refills = max_refills
        self._min_versions: dict[int, int] = {}  # live prompts -> version at admission
        self._settled: dict[int, PromptSettled] = {}  # those whose rows are all at the join
        self._ended_in_step = 0
        self._ended: list[int] = []

    @property
    def ready(self) -> int:
        """Prompts that a batch could take."""
        return len(self._settled)

    @property
    def unsettled(self) -> dict[int, int]:
        """Live prompts that have not all of their rows at the join -> version at admission."""
        return {
            prompt: min_version for prompt, min_version in self._min_versions.items() if prompt not in self._settled
        }

    def admit(self, prompts: list[int]) -> None:
        """Prompts go out under the current version. Raises ValueError where there is no room for them."""
        self.admission.admit(len(prompts))
        self._min_versions |= dict.fromkeys(prompts, self.admission.version)

    def settle(self, settled: PromptSettled) -> bool:
        """All rows of a prompt are at the join; one that is dead, or not worth training, makes room for another.

        Told again it changes nothing; told otherwise (rows were made anew) the last word counts. False: it is over.
        """
        prompt = settled.prompt_id
        if prompt not in self._min_versions:
            return False
        if prompt not in self._settled:
            self.admission.settle()
        self._settled[prompt] = settled
        if settled.dead or not settled.trainable:
            self.drop(prompt)
        return True

    def close(self) -> None:
        """No further batch is formed: whatever is still told of a prompt comes too late."""
        self._min_versions.clear()
        self._settled.clear()

    def drop(self, prompt: int) -> None:
        """A settled prompt ends untrained, which makes room for another. Raises KeyError where it is not settled."""
        del self._settled[prompt], self._min_versions[prompt]
        self.admission.end()
        self._ended_in_step += 1
        self._ended.append(prompt)

    def unsettle(self) -> None:
        """The join lost its memory between two steps: every settled prompt waits for its rows again."""
        self.admission.unsettle(len(self._settled))
        self._settled.clear()

    def rejects(self) -> str | None:
        """Why the step should be given up: more prompts ended untrained than `max_refills` rounds replace."""
        ended, wanted = self._ended_in_step, self.admission.prompts_per_step
        if ended <= self._max_refills * wanted:
            return None
        return (
            f"step {self.admission.version}: {ended} prompts failed or were dropped, more than max_refills = "
            f"{self._max_refills} rounds of {wanted} (reject rate at least {ended / (ended + wanted):.0%})"
        )

    def choose(self) -> list[Ready] | None:
        """The next batch, or None while it must wait."""
        ready = [Ready(prompt, _oldest(settled)) for prompt, settled in self._settled.items()]
        admission = self.admission
        return choose_batch(ready, self.unsettled, admission.version, admission.prompts_per_step, admission.staleness)

    def settled(self, batch: list[Ready]) -> list[PromptSettled]:
        """What the join knows of a batch's prompts, in its order."""
        return [self._settled[prompt.prompt_id] for prompt in batch]

    def commit(self, batch: list[Ready]) -> None:
        """A batch is trained: its prompts leave and the version rises, at once."""
        self.admission.commit()
        for prompt in batch:
            del self._min_versions[prompt.prompt_id], self._settled[prompt.prompt_id]
            self._ended.append(prompt.prompt_id)
        self._ended_in_step = 0

    def take_ended(self) -> list[int]:
        """The prompts that ended since the last call: nobody needs their rows any more."""
        ended, self._ended = self._ended, []
        return ended


def _oldest(settled: PromptSettled) -> int:
    """Oldest version among a prompt's tokens and the critic values that its advantage uses."""
    return settled.oldest_version if settled.critic_version < 0 else min(settled.oldest_version, settled.critic_version)
