"""Runs that were started by hand, which a server finds below its root."""

from __future__ import annotations

import asyncio
import fcntl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from asyncflow.recipe.config import BadInput
from asyncflow.server.catalog import Catalog
from asyncflow.server.serve import Options, serve
from protocols.control.errors import RunFailed
from protocols.control.runs import Submission, is_name
from tests.asyncflow.server.folders import ended_run

SMALL: dict[str, Any] = {
    "name": "small",
    "steps": 1,
    "prompts_per_step": 1,
    "data": {"train": "train.jsonl"},
    "models": {"policy": {"path": "models/policy"}, "reward": {"rule": "exact_match"}},
}
# Holds the lock of a run; writes a line for each SIGTERM, and ends a second after the first one.
HOLDER = """
import fcntl, os, pathlib, signal, socket, sys, time
folder = pathlib.Path(sys.argv[1])
lock = (folder / "run.lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX)
print(os.getpid(), socket.gethostname(), end="", file=lock, flush=True)
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append("SIGTERM"))
print("holds", flush=True)
while not signals:
    time.sleep(0.05)
time.sleep(1)
(folder / "signals").write_text(" ".join(signals))
"""


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[Catalog]:
    ended_run(tmp_path)
    made = Catalog(tmp_path, 1, frozenset(), [])
    yield made
    await made.close()


async def test_a_run_without_an_endpoint_gets_one_signal_for_a_command(catalog: Catalog):
    folder = catalog.root / "done"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert await catalog.command("done", "drain", "the-key", 20.0) is not None
    assert (folder / "signals").read_text() == "SIGTERM"


async def test_a_process_of_another_machine_gets_no_signal(catalog: Catalog):
    with (catalog.root / "done" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("1 elsewhere", end="", file=lock, flush=True)
        with pytest.raises(RunFailed, match="is on 'elsewhere'"):
            await catalog.command("done", "cancel", "the-key", 20.0)


async def test_a_start_that_the_disk_refuses_is_tried_again(catalog: Catalog, caplog: pytest.LogCaptureFixture):
    (catalog.root / ".server" / "recipes").touch()  # where a folder is wanted
    assert (await catalog.submit(Submission(recipe=SMALL), "the-key")).state == "queued"
    looking = asyncio.create_task(catalog.run())
    async with asyncio.timeout(20):
        while len(caplog.records) < 2:
            await asyncio.sleep(0.01)
    assert not looking.done()
    looking.cancel()
    assert "can't be started now" in caplog.text


async def test_a_run_has_a_name_that_a_path_can_have(catalog: Catalog):
    (catalog.root / ".server" / "recipes").touch()  # none of them starts
    for name in ("größe", "x" * 90):
        found = await catalog.submit(Submission(recipe=SMALL | {"name": name}), f"the-key-of-{name}")
        assert is_name(found.name), found.name
    with pytest.raises(BadInput, match="want at most 100 letters"):
        await catalog.submit(Submission(recipe=SMALL, run="one\n"), "another-key")


def test_tokens_below_the_root_of_the_runs_are_refused(tmp_path: Path):
    file = tmp_path / "tokens"
    file.touch(mode=0o600)
    file.write_text("0123456789abcdef")
    with pytest.raises(BadInput, match="is below --root"):
        serve(Options(root=tmp_path, token_file=file), print)
