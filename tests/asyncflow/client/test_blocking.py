"""The client without an event loop reads what a real web server serves of a run's folder."""

from __future__ import annotations

import asyncio
import inspect
import signal
import threading
from collections.abc import AsyncGenerator
from importlib.metadata import version
from pathlib import Path

import pytest

from asyncflow.client import blocking
from asyncflow.client.blocking import SyncClient, SyncRun
from asyncflow.client.connect import Client, RemoteRun
from asyncflow.server.access import Tokens, hosts_of
from asyncflow.server.app import application, guarded
from asyncflow.server.catalog import Catalog
from asyncflow.server.uvicorn_server import in_thread, listen
from protocols.control.errors import BadInput, RunFailed
from protocols.control.problems import NotFound
from tests.asyncflow.server.folders import EVENTS, ended_run

NOT_REMOTE = {"channel", "outside", "released_by", "outcome", "is_over", "metrics", "evaluations"}


def test_events_files_and_problems_come_as_they_do_to_the_asynchronous_client(tmp_path: Path):
    cursors = ended_run(tmp_path)
    with listen("127.0.0.1", 0) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"

        def made() -> object:
            return guarded(
                application(Catalog(tmp_path, 1, frozenset(), []), version("asyncflow")),
                Tokens(),
                hosts_of("127.0.0.1", []),
            )

        with in_thread(made, bound, "server") as stop, blocking.connect(url) as client:
            assert client.capabilities().scope == "admin", "a connection of the user who started it"
            run = client.run("done")
            assert list(run.follow()) == list(zip(cursors, EVENTS, strict=True))
            assert run.cursor == cursors[-1]
            assert next(iter(run.events(cursors[1]))) == EVENTS[2]
            assert run.wait() == EVENTS[-1]
            assert run.artifact("recipe.toml", tmp_path / "copy").read_text().startswith("name")
            with pytest.raises(RunFailed, match="it is stopped"):
                run.checkpoint()
            with pytest.raises(BadInput, match="cursor 1 is none"):
                list(run.events(1))
            with pytest.raises(NotFound, match="'other'"):
                client.run("other")
            stop()


def test_an_interrupt_while_it_waits_for_an_event_comes_as_it_is():
    closed: list[str] = []

    async def events() -> AsyncGenerator[int]:
        yield 1
        try:
            main = threading.main_thread().ident
            assert main is not None
            asyncio.get_running_loop().call_later(0.05, signal.pthread_kill, main, signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            closed.append("closed")

    loop = blocking._Loop(None)
    loop.start()
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(loop.each(events()))
    loop.stop()
    assert (seen, closed) == ([1], ["closed"])


@pytest.mark.parametrize(("waits", "awaited"), [(SyncClient, Client), (SyncRun, RemoteRun)])
def test_every_call_is_there_with_the_same_arguments(waits: type, awaited: type):
    names = {name for name, _ in inspect.getmembers(awaited, callable) if not name.startswith("_")} - NOT_REMOTE
    for name in names:
        theirs = list(inspect.signature(getattr(awaited, name)).parameters.values())
        ours = list(inspect.signature(getattr(waits, name)).parameters.values())
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs], name
