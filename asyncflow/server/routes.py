"""The routes: thin, from a request's values to `Runs` and the run's folder, and back. Reading needs the scope read."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, get, post
from litestar.datastructures import State
from litestar.handlers import HTTPRouteHandler
from litestar.params import Dependency, Parameter
from litestar.response import File, Stream

from asyncflow.observe.event_file import read_events
from asyncflow.server import folder_views
from asyncflow.server.event_stream import Feeds, frames
from asyncflow.server.gate import SCOPE
from asyncflow.server.runs import Runs
from protocols.control.errors import BadInput
from protocols.control.runs import (
    NAME_PATTERN,
    Answer,
    Artifact,
    Capabilities,
    Command,
    Pending,
    Restart,
    RunStatus,
    Sample,
    Scope,
    Submission,
)

LONGEST_WAIT_SECONDS = 30.0  # of one request

TheRuns = Annotated[Runs, Dependency(skip_validation=True)]
TheFeeds = Annotated[Feeds, Dependency(skip_validation=True)]
Name = Annotated[str, Parameter(pattern=NAME_PATTERN, description="a run's name")]
Key = Annotated[
    str,
    Parameter(
        header="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{8,128}$",
        required=False,
        description="sent again, it gives the first answer",
    ),
]
Prefer = Annotated[
    str, Parameter(header="Prefer", required=False, description="wait=SECONDS: the answer is 202 after that")
]


@get("/healthz", summary="Whether the server answers", tags=["server"])
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@get("/v1/capabilities", summary="What the server can do, and the token's scope", tags=["server"])
async def capabilities(runs: TheRuns, request: Request[Any, Any, State]) -> Capabilities:
    return runs.capabilities(request.scope[SCOPE])  # type: ignore[literal-required]


@get("/v1/runs", summary="All runs, the last one first", tags=["runs"])
async def list_runs(runs: TheRuns) -> list[RunStatus]:
    return await runs.list()


@post("/v1/runs", summary="Start a run", tags=["runs"], opt={"needs": "submit"})
async def submit(runs: TheRuns, data: Submission, key: Key = "") -> RunStatus:
    return await runs.submit(data, key or uuid.uuid4().hex)


@get("/v1/runs/{run:str}", summary="How a run stands", tags=["runs"])
async def status(
    runs: TheRuns,
    run: Name,
    unlike: Annotated[str, Parameter(max_length=20, description="wait until the state is another one")] = "",
    seconds: Annotated[float, Parameter(ge=0, le=LONGEST_WAIT_SECONDS, description="at most so long")] = 0.0,
) -> RunStatus:
    until = time.monotonic() + seconds
    while True:
        found = await runs.status(run)
        if found.state != unlike or time.monotonic() >= until:
            return found
        await asyncio.sleep(0.1)  # processes and folders tell nobody


@get("/v1/runs/{run:str}/recipe", summary="Its resolved recipe", tags=["runs"])
async def recipe(runs: TheRuns, run: Name) -> dict[str, Any]:
    return await asyncio.to_thread(folder_views.recipe_of, await runs.folder(run))


@get(
    "/v1/runs/{run:str}/events",
    summary="Its events, from a cursor on, as server-sent events",
    tags=["runs"],
    media_type="text/event-stream",
)
async def events(
    runs: TheRuns,
    feeds: TheFeeds,
    run: Name,
    cursor: Annotated[int, Parameter(ge=0, le=2**62, description="0: the first event")] = 0,
    last: Annotated[str, Parameter(header="Last-Event-ID", required=False, description="goes before the cursor")] = "",
) -> Stream:
    if last and not (last.isascii() and last.isdigit() and len(last) < 19):
        raise BadInput(f"Last-Event-ID: {last[:40]!r}: want the id of an event")
    folder, start = await runs.folder(run), int(last) if last else cursor
    try:
        await asyncio.to_thread(read_events, folder, start, 1)
    except ValueError as error:
        raise BadInput(str(error)) from error
    stream = frames(feeds, folder, start, lambda: runs.ended(run))
    return Stream(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@get("/v1/runs/{run:str}/artifacts", summary="The files that it has written", tags=["files"])
async def artifacts(runs: TheRuns, run: Name) -> list[Artifact]:
    return await asyncio.to_thread(folder_views.artifacts_of, await runs.folder(run))


@get("/v1/runs/{run:str}/artifacts/{path:path}", summary="One of them", tags=["files"])
async def artifact(runs: TheRuns, run: Name, path: str) -> File:
    found = await asyncio.to_thread(folder_views.file_in, await runs.folder(run), path.lstrip("/"))
    return File(found, filename=found.name, content_disposition_type="attachment")


@get("/v1/runs/{run:str}/logs/{service:str}", summary="The end of a service's log", tags=["files"])
async def log(
    runs: TheRuns,
    run: Name,
    service: Annotated[str, Parameter(pattern=NAME_PATTERN)],
    last_bytes: Annotated[int, Parameter(ge=1, le=1 << 22)] = 1 << 16,
) -> Response[bytes]:
    text = await asyncio.to_thread(folder_views.log_of, await runs.folder(run), service, last_bytes)
    return Response(text, media_type="text/plain; charset=utf-8")


@get("/v1/runs/{run:str}/samples", summary="Samples in its ledger, by rising id", tags=["samples"])
async def samples(
    runs: TheRuns,
    run: Name,
    sample_state: Annotated[str, Parameter(query="state", max_length=20)] = "",
    after: Annotated[int, Parameter(ge=-1, le=2**62)] = -1,
    limit: Annotated[int, Parameter(ge=1, le=10_000)] = 1000,
) -> list[Sample]:
    return await asyncio.to_thread(folder_views.samples_of, await runs.folder(run), sample_state, after, limit)


@get("/v1/runs/{run:str}/samples/{sample_id:int}", summary="One sample", tags=["samples"])
async def sample(runs: TheRuns, run: Name, sample_id: Annotated[int, Parameter(ge=0, le=2**62)]) -> Sample:
    return await asyncio.to_thread(folder_views.sample_of, await runs.folder(run), sample_id)


@get("/v1/runs/{run:str}/statistics", summary="Channels and waits of its services, now", tags=["runs"])
async def statistics(runs: TheRuns, run: Name) -> Response[bytes]:
    return Response(msgspec.json.encode(await runs.statistics(run)), media_type="application/json")


@post("/v1/runs/{run:str}/start", summary="Go on with a run that is over", tags=["runs"], opt={"needs": "submit"})
async def start(runs: TheRuns, run: Name, data: Restart, key: Key = "") -> RunStatus:
    return await runs.start(run, data, key or uuid.uuid4().hex)


def _drives(command: Command, needs: Scope, summary: str) -> HTTPRouteHandler:
    """The route of a command."""

    async def drive(runs: TheRuns, run: Name, key: Key = "", prefer: Prefer = "") -> Response[Answer | Pending]:
        named = key or uuid.uuid4().hex
        answer = await runs.command(run, command, named, _seconds_of(prefer))
        return Response(answer or Pending(named), status_code=200 if answer else 202)

    path, opt = f"/v1/runs/{{run:str}}/{command}", {"needs": needs}
    return post(path, summary=summary, tags=["commands"], opt=opt, status_code=200, operation_id=command)(drive)


COMMANDS = [
    _drives("pause", "submit", "Stop admitting, generating and forming batches"),
    _drives("resume", "submit", "Go on after a pause"),
    _drives("checkpoint", "submit", "Write a checkpoint at the next boundary between steps"),
    _drives("reload", "admin", "Load the changed files of the user's own code"),
    _drives("drain", "submit", "Finish the step, write a checkpoint, end"),
    _drives("cancel", "admin", "Give up the step, save the last finished one, end"),
]
ROUTES = [
    *(healthz, capabilities, list_runs, submit, status, recipe, events, artifacts, artifact, log, samples, sample),
    *(statistics, start),
    *COMMANDS,
]


def _seconds_of(prefer: str) -> float:
    """How long a request may wait, of `Prefer: wait=SECONDS`."""
    for part in prefer.split(","):
        name, _, value = part.strip().partition("=")
        if name.lower() == "wait" and value.isascii() and value.isdigit():
            return min(float(value), LONGEST_WAIT_SECONDS)
    return LONGEST_WAIT_SECONDS
