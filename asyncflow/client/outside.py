"""`Outside`: a role of the run whose work is done here: by another program, a remote service, or a person."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Protocol

from protocols.control.requests import RowsPut
from protocols.data.columns import Batch
from protocols.data.messages import Rollouts
from protocols.stage import Failure


class OutsideLink(Protocol):
    """The way to the roles of a run that are outside."""

    def take(self, role: str, most: int) -> AsyncGenerator[Batch]:
        """Rows that are asked of this worker, `most` at once."""
        ...

    async def put(self, role: str, answers: Batch | None, failures: Sequence[Failure], seconds: float) -> RowsPut:
        """Hand in values and failures; waits up to `seconds` for those that are not asked yet."""
        ...


class NotAsked(Exception):
    """Rows that nobody asked for in time. They were not taken, and can be put again; the others were taken."""

    def __init__(self, role: str, sample_ids: Sequence[int], seconds: float) -> None:
        ids = ", ".join(map(str, sample_ids[:8])) + (", ..." if len(sample_ids) > 8 else "")
        super().__init__(f"{role}: {len(sample_ids)} rows were not asked for within {seconds:g} s: samples {ids}")
        self.sample_ids = list(sample_ids)


class Outside:
    """A worker of a role with `outside = true`. Several may work side by side: each row goes to one of them.

    async for rollouts in run.outside("reward").rows():
        await run.outside("reward").put(Scores(sample_ids=rollouts.sample_ids, scores=...))
    """

    def __init__(self, link: OutsideLink, role: str) -> None:
        self.role = role
        self._link = link

    async def rows(self, most: int = 64) -> AsyncGenerator[Rollouts]:
        """Rows that wait for an answer, up to `most` at once, until the run is over.

        They are asked of this worker alone, until the recipe's `failures.outside_retake_seconds`; then others may get
        them too, and the first answer counts. Rows without an answer after `failures.outside_timeout_seconds` fail.

        Raises BadInput for a role that is not outside.
        """
        async with aclosing(self._link.take(self.role, most)) as batches:
            async for batch in batches:
                assert isinstance(batch, Rollouts)
                yield batch

    async def put(self, answers: Batch, *, seconds: float = 60.0) -> dict[int, str]:
        """Answer rows, in any order and in as many calls as you like; rows that are not asked yet wait until they are.

        Returns the rows that came too late, each with the reason: answered already, or over. The others were taken.
        Raises BadInput for a message of another type or with values that mean nothing, and takes nothing of it;
        NotAsked, naming them, for rows that were not asked for within `seconds`.
        """
        return await self._put(answers, [], seconds)

    async def fail(self, sample_ids: Iterable[int], cause: str, *, seconds: float = 60.0) -> dict[int, str]:
        """Say that rows can't be answered, and why: they fail with that cause. Returns and raises as `put` does."""
        return await self._put(None, [Failure(int(sample), cause) for sample in sample_ids], seconds)

    async def _put(self, answers: Batch | None, failures: list[Failure], seconds: float) -> dict[int, str]:
        done = await self._link.put(self.role, answers, failures, seconds)
        if done.waiting:
            raise NotAsked(self.role, done.waiting, seconds)
        return done.refused
