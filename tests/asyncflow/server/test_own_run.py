"""A run answers clients from its own process, until it ends."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import asyncflow
from asyncflow.server.endpoint_file import ENDPOINT, read_endpoint
from asyncflow.server.own_run import served
from protocols.control.events import RunEnded, StateChanged
from protocols.control.problems import NotAllowed, NotFound, Unauthenticated
from tests.asyncflow.conftest import MakeRecipe


async def test_a_run_is_driven_through_its_own_endpoint(make_recipe: MakeRecipe, tmp_path: Path):
    recipe = make_recipe(steps=10_000, checkpoints={"every": 0}, data={"eval": ""})
    async with served(asyncflow.launch(recipe, folder=tmp_path / "own")) as own:
        endpoint = read_endpoint(own.folder, os.getpid())
        assert endpoint is not None
        assert stat.S_IMODE((own.folder / ENDPOINT).stat().st_mode) == 0o600
        async with asyncflow.connect(endpoint.url, token="another-0123456789") as stranger:
            with pytest.raises(Unauthenticated):
                await stranger.runs()
        async with asyncflow.connect(endpoint.url, token=endpoint.token) as client:
            run = await client.run("own")
            await run.pause()
            assert (await run.checkpoint()).parent == own.folder / "checkpoints"
            await run.resume()
            with pytest.raises(NotAllowed):
                await client.submit({"name": "another"})
            with pytest.raises(NotFound):
                await client.run("another")
            assert (await run.drain()).outcome == "stopped"
            events = [event async for event in run.events()]
    assert [event.state for event in events if isinstance(event, StateChanged)] == ["paused", "running", "draining"]
    assert isinstance(events[-1], RunEnded)
    assert not (tmp_path / "own" / ENDPOINT).exists()
