"""Runs of tiny models on a real server: driven from other processes, while server and clients are killed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import asyncflow
from asyncflow.client.connect import Client, RemoteRun
from asyncflow.client.http import HttpConnection
from asyncflow.observe.event_file import read_events
from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import BadInput
from protocols.control.errors import RunFailed
from protocols.control.events import Event, RunStarted, StepCommitted, WaitsChanged
from protocols.control.problems import Conflict, Unauthenticated
from protocols.control.runs import Answer
from tests.asyncflow.server.conftest import TOKEN, Server

Serve = Callable[..., Server]
EXAMPLE = str(Path(__file__).parents[3] / "deploy" / "examples" / "drive_a_run.py")
SLOW = ["steps=10000", "checkpoints.every=0", "data.eval=''", "delays.critic.update=0.1"]
FOLLOWER = """
import asyncio, sys
sys.modules |= dict.fromkeys(["torch", "ray", "vllm", "transformers", "numpy"])  # a client has none of them
import asyncflow
async def main():
    async with asyncflow.connect(sys.argv[1]) as client:
        run = await client.run(sys.argv[2])
        async for cursor, event in run.follow(0):
            print(cursor, flush=True)
asyncio.run(main())
"""


def connected(server: Server) -> Client:
    return asyncflow.connect(server.url, token=TOKEN)


async def steps_made(run: RemoteRun, steps: int) -> None:
    """Wait until the run has committed so many steps, without its server."""
    async with asyncio.timeout(120):
        while len(read_lines(run.folder / "metrics.jsonl")) < steps:
            await asyncio.sleep(0.05)


def in_file(folder: Path) -> list[int]:
    """The cursors of all events of a run."""
    cursors, lines = [0], read_events(folder, 0)
    while lines:
        cursors += [line.cursor for line in lines]
        lines = read_events(folder, cursors[-1])
    return cursors[1:]


async def test_a_run_is_checked_submitted_and_driven_by_the_example(
    serve: Serve, served_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ASYNCFLOW_TOKEN", TOKEN)
    server = serve()
    async with connected(server) as client:
        with pytest.raises(BadInput, match=r"models\.policy"):
            await client.submit(served_table, overrides=["models.policy.path='models/none'"])
        with pytest.raises(BadInput, match="below the server's root"):
            await client.submit(served_table, overrides=["data.train='/etc/passwd'"])
        with pytest.raises(BadInput, match="registered functions only"):
            await client.submit(served_table, overrides=["models.reward={rule='os:system'}"])
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(tomli_w.dumps(served_table | {"steps": 10_000, "data": {"train": "data/train.jsonl"}}))
        command = [sys.executable, EXAMPLE, server.url, str(recipe)]
        example = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=200)
        *steps, end = example.stdout.splitlines()
        assert [line.partition(":")[0] for line in steps][:2] == ["step 1", "step 2"], example.stderr
        assert end.endswith(": stopped")
        (status,) = (found for found in await client.runs() if found.state != "refused")
        run = await client.run(status.name)
        assert [event.step for event in [e async for e in run.events()] if isinstance(event, StepCommitted)][:2] == [
            1,
            2,
        ]
        assert (await run.wait()).step == status.step
        with pytest.raises(RunFailed, match="is over, it is stopped"):
            await run.pause()
        assert "step 1/10000" in await run.log()
        assert (await run.artifact("recipe.toml", tmp_path / "copy.toml")).read_text() == (
            run.folder / "recipe.toml"
        ).read_text()
    async with asyncflow.connect(server.url, token="not-the-token-0123") as stranger:
        with pytest.raises(Unauthenticated, match="not known"):
            await stranger.runs()


async def test_nothing_is_lost_or_done_twice_when_server_and_client_are_killed(
    serve: Serve, served_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ASYNCFLOW_TOKEN", TOKEN)
    server = serve()
    seen: list[tuple[int, Event]] = []

    async def follow(run: RemoteRun) -> None:
        seen.extend([item async for item in run.follow(0) if not isinstance(item[1], WaitsChanged)])

    async with connected(server) as client:
        run = await client.submit(served_table, overrides=SLOW, run="one", key="the-key-of-the-run")
        await steps_made(run, 1)
        command = [sys.executable, "-c", FOLLOWER, server.url, "one"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
            assert follower.stdout is not None
            cursor = [int(await asyncio.to_thread(follower.stdout.readline)) for _ in range(3)][-1]
            follower.send_signal(signal.SIGKILL)
        following = asyncio.create_task(follow(run))
        process = (await run.status()).process
        written = Path(await checkpoint(server, "the-key-of-it"))

        server.kill()
        await steps_made(run, len(read_lines(run.folder / "metrics.jsonl")) + 2)
        server.start()

        assert (await client.submit(served_table, overrides=SLOW, run="one", key="the-key-of-the-run")).name == "one"
        assert [(status.name, status.process) for status in await client.runs()] == [("one", process)]
        with pytest.raises(Conflict, match="another request"):
            await client.submit(served_table, overrides=["steps=7"], run="one", key="the-key-of-the-run")
        assert Path(await checkpoint(server, "the-key-of-it")) == written
        await run.pause()
        await run.resume()
        assert {statistics.service for statistics in await run.statistics()} >= {"policy", "critic"}
        assert (await run.drain()).outcome == "stopped"
        await following
        rest = [at async for at, event in run.follow(cursor) if not isinstance(event, WaitsChanged)]

    everything = in_file(run.folder)
    assert [at for at, _ in seen] == everything
    assert rest == everything[everything.index(cursor) + 1 :]
    assert len(list((run.folder / "checkpoints").iterdir())) == 2, "the one that was asked for, and that of the drain"


async def checkpoint(server: Server, key: str) -> str:
    async with HttpConnection(server.url, TOKEN) as connection:
        return (await connection.post("/v1/runs/one/checkpoint", {}, Answer, key)).result


async def test_a_killed_run_says_so_to_its_followers_and_goes_on(serve: Serve, served_table: dict[str, Any]):
    server = serve("--devices", "1")
    async with connected(server) as client:
        run = await client.submit(served_table, overrides=[*SLOW, "checkpoints.every=1"], run="one")
        waiting = await client.submit(served_table, overrides=["steps=1"], run="two")
        await steps_made(run, 2)
        assert (await waiting.status()).state == "queued"
        assert (await waiting.cancel()).error == "it was cancelled while it waited for devices"
        subprocess.run(["kill", "-9", str((await run.status()).process)], check=True)
        ended = await run.wait()
        assert (ended.outcome, ended.exit_code) == ("failed", 137)
        assert "was killed" in ended.error
        again = await client.resume("one")
        assert (await again.drain()).outcome == "stopped"
        started = [event async for event in again.events(0) if isinstance(event, RunStarted)]
        assert [event.term for event in started] == [0, 1]
        assert started[1].first_step >= 1
