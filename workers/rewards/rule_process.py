"""The program of a rule's process: loads the rule, then answers calls until their stream ends.

A rule runs in the main thread, so it may use signals; an async rule runs in one event loop, which lives as long as the
process, so its clients and semaphores may be made once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any, BinaryIO

import msgspec

from workers.rewards.answers import RuleAnswer, answer_of, late_answer, refusal, refusal_of
from workers.rewards.arguments import RuleArguments
from workers.rewards.exchange import LENGTH, OUT_OF_MEMORY, Answers, Call, Ready, Setup, framed
from workers.user_code import BadCode, function_in, install, new_module

_setups, _calls = msgspec.msgpack.Decoder(Setup), msgspec.msgpack.Decoder(Call)


def main(name: str) -> None:
    """Serve the rule of that name over the process's own stdin and stdout."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a service blocks signals, which processes of the rule need
    requests, answers = _take_over_pipes()
    setup = _setups.decode(_next(requests))
    if most := setup.limits.memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        rule = _loaded(name, setup)
        arguments = RuleArguments(rule)
    except (BadCode, LookupError) as refused:
        _end_if_out_of_memory(refused.__cause__ or refused)
        _send(answers, Ready(error=refusal(str(refused.args[0])).error))
        return
    _send(answers, Ready(arguments.needs))
    if arguments.needs.concurrent:
        asyncio.run(_serve_concurrently(rule, arguments, setup.limits.timeout_seconds, requests, answers))
        return
    while body := _next(requests):
        call = _calls.decode(body)
        _send(answers, _answers_to(rule, arguments, call))


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the pipes to descriptors that no subprocess inherits; the rule's stdin is empty, its stdout is stderr."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def _next(requests: BinaryIO) -> bytes:
    """The next message's body; empty at the end of the stream."""
    head = requests.read(LENGTH.size)
    return requests.read(LENGTH.unpack(head)[0]) if head else b""


def _loaded(name: str, setup: Setup) -> Callable[..., Any]:
    """The rule, loaded from its module's text if there is one. Raises BadCode or LookupError."""
    if setup.source is None:
        from workers.rewards.rules import rule_named

        return rule_named(name)
    with new_module(setup.source) as module:
        rule = function_in(module, name)
    install(module)
    return rule


def _answers_to(rule: Callable[..., Any], arguments: RuleArguments, call: Call) -> Answers:
    try:
        positional, named = arguments.of(call.rows)
        value = rule(*positional, **named)
        if inspect.isawaitable(value):  # of a function that does not say it is async
            value = asyncio.run(_wait_for(value))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever user code raises is the row's cause of failure
        _end_if_out_of_memory(error)
        return _failed(call, refusal_of(error))
    return Answers(call.number, _answers_in(value, arguments, len(call.rows)))


def _failed(call: Call, cause: RuleAnswer) -> Answers:
    return Answers(call.number, [cause] * len(call.rows), raised=True)


async def _wait_for(value: Awaitable[object]) -> object:
    return await value


def _answers_in(value: object, arguments: RuleArguments, rows: int) -> list[RuleAnswer]:
    """The answers in what a call returned: of one row the value itself, of a batch each of its items."""
    try:
        if not arguments.needs.batch:
            return [answer_of(value)]
        if isinstance(value, str | dict) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
            return [refusal(f"returned {value!r:.100} for a batch, want a list of {rows} numbers", "never")] * rows
        items = list(value)  # type: ignore[call-overload]
        if len(items) != rows:
            return [refusal(f"returned {len(items)} values for a batch of {rows}", "never")] * rows
        return [answer_of(item) for item in items]
    except Exception as error:  # noqa: BLE001 - a value's own methods are user code, too
        return [refusal_of(error)] * rows


async def _serve_concurrently(
    rule: Callable[..., Any], arguments: RuleArguments, seconds: float, requests: BinaryIO, answers: BinaryIO
) -> None:
    stream = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), requests)
    tasks: set[asyncio.Task[None]] = set()

    async def answer(call: Call) -> None:
        _send(answers, await _answers_within(rule, arguments, call, seconds))

    while True:
        try:
            (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
            call = _calls.decode(await stream.readexactly(length))
        except asyncio.IncompleteReadError:
            return  # the loop cancels what still runs
        task = asyncio.create_task(answer(call), name=f"call {call.number}")
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _answers_within(rule: Callable[..., Any], arguments: RuleArguments, call: Call, seconds: float) -> Answers:
    limit = asyncio.timeout(seconds)
    try:
        positional, named = arguments.of(call.rows)
        async with limit:
            value = await rule(*positional, **named)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
        _end_if_out_of_memory(error)
        late = isinstance(error, TimeoutError) and limit.expired()
        return _failed(call, late_answer(seconds) if late else refusal_of(error))
    return Answers(call.number, _answers_in(value, arguments, len(call.rows)))


def _end_if_out_of_memory(error: BaseException) -> None:
    """A process at its limit fails every later row, too: the next one has room again."""
    refused = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if refused or "can't allocate memory" in str(error):  # of torch
        os._exit(OUT_OF_MEMORY)


def _send(answers: BinaryIO, message: Ready | Answers) -> None:
    with contextlib.suppress(Exception):  # a rule may have closed or replaced it
        sys.stdout.flush()  # what was printed comes before the answer
    answers.write(framed(message))
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
