"""A run of tiny models on a real server: driven from another process, while the server is killed and started again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asyncflow
from protocols.control.events import RunEnded, RunStarted, StepCommitted
from tests.asyncflow.server.conftest import TOKEN, Server

Serve = Callable[..., Server]


async def test_a_run_is_submitted_followed_and_driven(serve: Serve, served_table: dict[str, Any]):
    server = serve()
    async with asyncflow.connect(server.url, token=TOKEN) as client:
        run = await client.submit(served_table | {"steps": 3}, overrides=["checkpoints.every=1"])
        events = [event async for event in run.events(cursor=0)]
        assert isinstance(events[0], RunStarted)
        assert [event.step for event in events if isinstance(event, StepCommitted)] == [1, 2, 3]
        assert isinstance(events[-1], RunEnded)
        assert (await run.wait()).outcome == "finished"
        assert (await client.runs())[0].state == "finished"
