"""External workers compute a stage's rows outside the run: in another program, or by a person.

    RowStage ──call──> pending rows <──TakeRows── workers, each of which reads the rows it took
                                    <──PutRows─── answers, in several puts and any order

Each row is given to one worker. A row without an answer for a while is given to another, and the first answer counts.
`PendingRows` decides which rows to give; `ExternalRank` waits and checks the answers; `take_rows` is the worker's end.
The service stores the answers again as its own, so none is lost with the process that sent it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from asyncflow.services.channels.endpoint import Frame, Payload, Requestable, ServiceGone, Store, ask, get_or_none
from asyncflow.services.channels.finished_prompts import FinishedPrompts
from asyncflow.services.channels.prompt_join import gather
from asyncflow.services.channels.shard_refs import Partitioning, RankCallPlan, RowRef, ShardRef, parts_of, plan_calls
from asyncflow.services.ranks.row_reader import RowReader
from asyncflow.services.ranks.spec import ModelSettings
from asyncflow.services.stage_context import StageContext
from protocols.control.delivery import RankCall, RankReply, Shard
from protocols.control.replies import RankAnswer, Reply, RowsPut, RowsTaken
from protocols.control.requests import PutRows, RankRequest, TakeRows
from protocols.data import codec
from protocols.data.columns import Batch
from protocols.data.ids import prompt_of
from protocols.data.messages import SCHEMAS
from protocols.layout.topology import Topology
from protocols.roles import ROLES
from protocols.stage import Failure, contract_of

LONGEST_WAIT_SECONDS = 600.0  # of one request
POLL_SECONDS = 1.0  # of `take_rows`: how long it may take to see that the run has ended
MOST_REMEMBERED = 100_000  # answered rows; a put for an older one waits until its timeout, like an unknown row
ANSWERED = "it was answered already"
OVER = "its prompt is over"

RowAnswer = tuple[Batch, int] | Failure | None  # a row of a batch, a tombstone, or None: its bytes were gone


class PendingCall:
    """The rows of one firing: when each may be given to a worker, and the answers so far."""

    def __init__(self, call: RankCall, payloads: Sequence[Payload]) -> None:
        self.call = call
        self.free_at = dict.fromkeys(call.sample_ids, 0.0)  # rows without an answer -> seconds of the clock
        self.answers: dict[int, RowAnswer] = {}
        self._position = {sample: i for i, sample in enumerate(call.sample_ids)}
        sources = [ShardRef(Shard([], 0), payload) for payload in payloads]
        self._inputs: list[list[RowRef]] = [
            [(sources[s.source], row) for s in reading.segments for row in range(s.start, s.stop)]
            for reading in call.readings
        ]

    def cut(self, samples: Sequence[int]) -> RankCallPlan:
        """A call for some of its rows, which names only the payloads it needs."""
        call = self.call
        inputs = [[refs[self._position[s]] for s in samples] for refs in self._inputs]
        schemas = [reading.schema for reading in call.readings]
        (planned,) = plan_calls(
            call.stage, call.method, Partitioning("DP_PROTO"), samples, inputs, schemas, Topology(), step=call.step
        )
        return planned


class PendingRows:
    """The rows that wait for external workers. Pure: the caller passes the time, in seconds of any steady clock."""

    def __init__(self, retake_seconds: float) -> None:
        """`retake_seconds`: after this time without an answer, a row is given to another worker."""
        self._retake = retake_seconds
        self._open: list[PendingCall] = []  # oldest first
        self._past: dict[int, str] = {}  # row -> what became of it
        self._finished = FinishedPrompts()

    def ask(self, call: RankCall, payloads: Sequence[Payload]) -> PendingCall:
        """Request answers for rows, also for those that were answered before."""
        opened = PendingCall(call, payloads)
        self._open.append(opened)
        return opened

    def close(self, opened: PendingCall, cause: str) -> None:
        """Stop waiting for a call: rows without an answer have failed with a cause."""
        self._open.remove(opened)
        answered = [sample for sample, answer in opened.answers.items() if answer is not None]  # others come again
        self._past |= dict.fromkeys(answered, ANSWERED) | dict.fromkeys(opened.free_at, cause)
        while len(self._past) > MOST_REMEMBERED:
            del self._past[next(iter(self._past))]

    def take(self, most: int, now: float) -> RankCallPlan | None:
        """Give a worker up to `most` free rows of the oldest call that has some; None if there are none."""
        for opened in self._open:
            free = [sample for sample, at in opened.free_at.items() if at <= now][:most]
            if free:
                opened.free_at |= dict.fromkeys(free, now + self._retake)
                return opened.cut(free)
        return None

    def next_free(self) -> float | None:
        """When the next row without an answer is free; None if all are answered."""
        return min((at for opened in self._open for at in opened.free_at.values()), default=None)

    def answer(self, answers: dict[int, RowAnswer]) -> dict[int, str]:
        """Accept answers, removing them from `answers`; unrequested rows stay. Returns the refused rows, and why."""
        refused = {}
        for sample in list(answers):
            opened = next((opened for opened in self._open if sample in opened.free_at), None)
            if opened is not None:
                del opened.free_at[sample]
                opened.answers[sample] = answers.pop(sample)
            elif why := self._why_late(sample):
                refused[sample] = why
                del answers[sample]
        return refused

    def end(self, prompts: Iterable[int]) -> None:
        """These prompts are finished: refuse answers for their rows."""
        for prompt in prompts:
            self._finished.add(prompt)

    def _why_late(self, sample: int) -> str:
        if any(sample in opened.answers for opened in self._open):
            return ANSWERED
        return self._past.get(sample) or (OVER if prompt_of(sample) in self._finished else "")


class ExternalRank:
    """The single rank of a service with external workers. Implements `Ranks`."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        assert isinstance(context.spec.settings, ModelSettings)
        failures = context.spec.settings.failures
        self._seconds, self._retake = failures.outside_timeout_seconds, failures.outside_retake_seconds
        self._pending = PendingRows(self._retake)
        self._changed = asyncio.Condition()
        self._stopped = False
        role = ROLES[context.spec.role]
        (self._kind,) = {contract_of(role, stage.method).produces for stage in context.spec.stages}

    async def start(self) -> None:
        """Nothing is loaded here."""

    def begin_term(self, context: StageContext) -> None:
        """Serve a new term, which asks for rows of the old one again: their late answers wait for that."""
        self._context, self._pending = context, PendingRows(self._retake)

    async def stop(self) -> None:
        """Wake all that wait."""
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()

    async def ask(self, rank: int, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        """Raises ValueError: the run keeps no state of an external model."""
        raise ValueError(f"{type(request).__name__}: an external worker has the model of this service")

    async def call(self, rank: int, call: RankCall, payloads: list[Payload]) -> tuple[RankReply, list[Payload]]:
        """Request answers for the rows and wait; rows without an answer in time fail with that cause."""
        start = time.time()
        self._context.reports.wait(call.stage, "answers", "external workers")
        cause = f"no answer from an external worker within {self._seconds:g} s"
        pending = self._pending
        opened = pending.ask(call, payloads)
        try:
            async with self._changed:
                self._changed.notify_all()
                await self._until(lambda: not opened.free_at, self._seconds)
        finally:
            pending.close(opened, cause)
            self._context.reports.wait(call.stage)
        answers = opened.answers | {sample: Failure(sample, cause) for sample in opened.free_at}
        rows = [answer for s in call.sample_ids if isinstance(answer := answers[s], tuple)]
        parts = await self._context.pack(gather(rows)) if rows else []
        reply = RankReply(
            start=start,
            end=time.time(),
            read_bytes=[],  # the external workers read the rows
            shards=[part.shard for part in parts],
            failures=[answer for answer in answers.values() if isinstance(answer, Failure)],
            lost=[i for i, sample in enumerate(call.sample_ids) if answers[sample] is None],
        )
        return reply, [part.payload for part in parts]

    async def answer(self, request: TakeRows | PutRows, payloads: Sequence[Payload]) -> tuple[Reply, list[Payload]]:
        """Carry out a worker's request."""
        match request:
            case TakeRows():
                taken = await self.take(request.most, request.seconds)
                return RowsTaken(taken.call if taken else None), taken.payloads if taken else []
            case PutRows():
                return await self.put(request, parts_of(request.shards, payloads)), []

    async def take(self, most: int, seconds: float) -> RankCallPlan | None:
        """Rows for a worker, as soon as there are some; None if there were none for `seconds`.

        Raises ValueError for less than one row.
        """
        if most < 1:
            raise ValueError(f"most = {most}: a worker takes 1 row or more")
        deadline = time.monotonic() + min(seconds, LONGEST_WAIT_SECONDS)
        async with self._changed:
            while not self._stopped:
                now = time.monotonic()
                if taken := self._pending.take(most, now):
                    return taken
                if now >= deadline:
                    break
                free_at = self._pending.next_free()
                await self._wait(min(deadline, free_at) - now if free_at is not None else deadline - now)
        return None

    async def put(self, request: PutRows, parts: Sequence[ShardRef]) -> RowsPut:
        """Accept answers; waits for rows that were not requested yet.

        Raises ValueError, and accepts nothing, for a message of another type, a bad frame, or a row that occurs twice;
        PayloadLost for a lost frame.
        """
        answers = await self._answers(request, parts)
        refused: dict[int, str] = {}

        def all_placed() -> bool:
            before = len(answers)
            refused.update(self._pending.answer(answers))
            if len(answers) < before:
                self._changed.notify_all()
            return not answers

        async with self._changed:
            await self._until(all_placed, min(request.seconds, LONGEST_WAIT_SECONDS))
        return RowsPut(refused, list(answers))

    async def end(self, prompts: Iterable[int]) -> None:
        """These prompts are finished: wake the puts that wait for their rows, which refuse them."""
        async with self._changed:
            self._pending.end(prompts)
            self._changed.notify_all()

    async def _answers(self, request: PutRows, parts: Sequence[ShardRef]) -> dict[int, RowAnswer]:
        answers: list[tuple[int, RowAnswer]] = [(f.sample_id, f) for f in request.failures]
        answers += [(sample, None) for sample in request.lost]
        for part in parts:
            batch = await asyncio.to_thread(self._decode, await self._context.store.get(part.payload))
            answers += [(sample, (batch, row)) for row, sample in enumerate(batch.sample_ids.tolist())]
        found = dict(answers)
        if len(found) < len(answers):
            twice = sorted(s for s, count in Counter(s for s, _ in answers).items() if count > 1)
            raise ValueError(f"samples {twice[:8]} are put twice at once; nothing was taken")
        return found

    def _decode(self, frame: Frame) -> Batch:
        wanted = self._kind.__name__
        try:
            batch = codec.decode(frame, schemas=SCHEMAS)
        except codec.BadFrame as error:
            raise ValueError(f"{wanted} that can't be read, nothing was taken: {error.reason}") from error
        if type(batch) is not self._kind:
            raise ValueError(f"wants {wanted}, got {type(batch).__name__}; nothing was taken")
        return batch

    async def _until(self, reached: Callable[[], bool], seconds: float) -> None:
        """Wait, inside the condition, until `reached`, the rank is stopped, or the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait_for(lambda: reached() or self._stopped)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()


async def take_rows(endpoint: Requestable, store: Store, most: int, over: Callable[[], bool]) -> AsyncGenerator[Batch]:
    """Yield rows for this worker until the run ends; rows that can't be read are answered as failed or lost.

    While the service is gone, it polls until the service is replaced or the run ends. Raises ServiceError if the
    service refuses.
    """
    while not over():
        try:
            reply, payloads = await ask(endpoint, TakeRows(most, POLL_SECONDS))
        except ServiceGone:
            await asyncio.sleep(POLL_SECONDS)  # the controller sees the same, and replaces it or ends the run
            continue
        assert isinstance(reply, RowsTaken)
        if reply.call is None:
            continue
        frames = [await get_or_none(store, payload) for payload in payloads]
        read = await asyncio.to_thread(RowReader, reply.call, frames)
        samples = reply.call.sample_ids
        if read.damaged or read.lost:
            damaged = [Failure(samples[row], d.cause) for d in read.damaged for row in d.rows]
            await ask(endpoint, PutRows(failures=damaged, lost=[samples[row] for row in read.lost]))
        if read.rows:
            yield read.inputs[0]
