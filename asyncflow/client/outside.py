"""Outside: an external worker of a role. Another program, a remote service or a person computes its answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the client of a remote run starts without numpy
    from protocols.control.replies import RowsPut
    from protocols.data.columns import Batch
    from protocols.data.messages import Rollouts
    from protocols.stage import Failure


class OutsideLink(Protocol):
    """The connection to a run's external roles."""

    def take(self, role: str, most: int) -> AsyncGenerator[Batch]:
        """Yield rows for this worker to answer, at most `most` at once."""
        ...

    async def put(self, role: str, answers: Batch | None, failures: Sequence[Failure], seconds: float) -> RowsPut:
        """Put values and failures; waits up to `seconds` for rows that were not requested yet."""
        ...


class NotAsked(Exception):
    """Rows that the run did not request in time. They were not accepted and can be put again; the others were."""

    def __init__(self, role: str, sample_ids: Sequence[int], seconds: float) -> None:
        ids = ", ".join(map(str, sample_ids[:8])) + (", ..." if len(sample_ids) > 8 else "")
        super().__init__(f"{role}: {len(sample_ids)} rows were not asked for within {seconds:g} s: samples {ids}")
        self.sample_ids = list(sample_ids)


class Outside:
    """A worker of a role with `outside = true`. Several can run concurrently: each row goes to one of them.

    async for rollouts in run.outside("reward").rows():
        await run.outside("reward").put(Scores(sample_ids=rollouts.sample_ids, scores=...))
    """

    def __init__(self, link: OutsideLink, role: str) -> None:
        self.role = role
        self._link = link

    async def rows(self, most: int = 64) -> AsyncGenerator[Rollouts]:
        """Yield rows that wait for an answer, at most `most` at once, until the run ends.

        A row goes to this worker alone. After the recipe's `failures.outside_retake_seconds` without an answer, another
        worker may get it too, and the first answer counts. After `failures.outside_timeout_seconds` it fails.

        Raises BadInput for a role that is not external.
        """
        from protocols.data.messages import Rollouts

        async with aclosing(self._link.take(self.role, most)) as batches:
            async for batch in batches:
                assert isinstance(batch, Rollouts)
                yield batch

    async def put(self, answers: Batch, *, seconds: float = 60.0) -> dict[int, str]:
        """Answer rows, in any order and number of calls. Waits for rows that the run has not requested yet.

        Returns the rows that came too late, each with the reason; the others were accepted. Raises BadInput, and
        accepts nothing, for a message of another type or with invalid values; NotAsked, with their ids, for rows that
        were not requested within `seconds`.
        """
        return await self._put(answers, [], seconds)

    async def fail(self, sample_ids: Iterable[int], cause: str, *, seconds: float = 60.0) -> dict[int, str]:
        """Let rows that can't be answered fail with a cause. Returns and raises as `put` does."""
        from protocols.stage import Failure

        return await self._put(None, [Failure(int(sample), cause) for sample in sample_ids], seconds)

    async def _put(self, answers: Batch | None, failures: list[Failure], seconds: float) -> dict[int, str]:
        done = await self._link.put(self.role, answers, failures, seconds)
        if done.waiting:
            raise NotAsked(self.role, done.waiting, seconds)
        return done.refused
