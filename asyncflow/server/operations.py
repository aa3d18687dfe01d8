"""Commands that take their time: each runs once under its key, and whoever asks with the key again gets its result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from asyncflow.server.records import Records
from protocols.control.errors import BadInput, RunFailed
from protocols.control.problems import Conflict, Problem, TooMany, error_of, problem_of
from protocols.control.runs import Answer

MOST_AT_ONCE = 1024


class _Outcome(msgspec.Struct):
    """What is kept under a key: an answer, or the problem that came instead."""

    answer: Answer | None = None
    problem: Problem | None = None


class Operations:
    """The commands of one server, or of one run."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._tasks: dict[str, asyncio.Task[Answer]] = {}

    async def run(
        self, key: str, request: str, term: int, work: Callable[[], Awaitable[Answer]], seconds: float
    ) -> Answer | None:
        """The answer of a command, which starts unless its key is known; None if that takes longer than `seconds`.

        Raises what the command raises; Conflict for a key of another request, and for a command that was not done when
        its server was killed, if the run has been started anew since.
        """
        kept, asked_in = await self._records.ask(key, request, term)
        if kept is not None:
            outcome = msgspec.json.decode(kept, type=_Outcome)
            if outcome.problem is not None:
                raise error_of(outcome.problem)
            assert outcome.answer is not None
            return outcome.answer
        if key not in self._tasks:
            if asked_in != term:
                raise Conflict(
                    f"the command was sent in term {asked_in} of the run, which is in {term} now: look, decide anew"
                )
            if len(self._tasks) >= MOST_AT_ONCE:
                raise TooMany(f"{MOST_AT_ONCE} commands are not done yet")
            self._tasks[key] = asyncio.create_task(self._carry_out(key, work), name=f"command {key}")
            self._tasks[key].add_done_callback(lambda task: self._forget(key, task))
        done, _ = await asyncio.wait({task := self._tasks[key]}, timeout=seconds)
        return task.result() if done else None

    async def close(self) -> None:
        """End what is not done; it starts again when it is asked for again."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry_out(self, key: str, work: Callable[[], Awaitable[Answer]]) -> Answer:
        try:
            outcome = _Outcome(answer=await work())
        except (BadInput, RunFailed) as error:  # the same for a repeat; other errors leave the command to be done
            await self._records.answer(key, msgspec.json.encode(_Outcome(problem=problem_of(error))))
            raise
        await self._records.answer(key, msgspec.json.encode(outcome))
        assert outcome.answer is not None
        return outcome.answer

    def _forget(self, key: str, task: asyncio.Task[Answer]) -> None:
        self._tasks.pop(key, None)
        if not task.cancelled():
            task.exception()  # whoever asked has it, or has left
