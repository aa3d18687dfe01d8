"""A notebook's cells start a run, follow it and end it, in a real Jupyter kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

import asyncflow

CELL_SECONDS = 120.0  # the first one imports torch
ROOT = str(Path(asyncflow.__file__).parents[1])


class Notebook:
    """Runs cells one after the other, as a user does."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self._manager, self._client = manager, client

    def run(self, cell: str, seen: Callable[[str], None] = lambda text: None) -> tuple[str, str]:
        """The text that a cell printed or gave as its value, and the name of its error. `seen` gets each text."""
        texts: list[str] = []

        def take(message: dict[str, Any]) -> None:
            content = message["content"]
            text = content.get("text") or content.get("data", {}).get("text/plain", "")
            if text and message["msg_type"] in ("stream", "execute_result"):
                texts.append(text)
                seen(text)

        reply = self._client.execute_interactive(cell, timeout=CELL_SECONDS, output_hook=take)
        return "".join(texts), reply["content"].get("ename", "")

    def interrupt(self) -> None:
        """Press the stop button."""
        self._manager.interrupt_kernel()


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    environment = os.environ | {"PYTHONPATH": ROOT, "IPYTHONDIR": str(tmp_path / "ipython"), "OMP_NUM_THREADS": "1"}
    manager, client = start_new_kernel(startup_timeout=CELL_SECONDS, cwd=str(tmp_path), env=environment)
    try:
        yield Notebook(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_cells_start_a_run_follow_it_and_end_it(notebook: Notebook, table: dict[str, Any], tmp_path: Path):
    recipe = table | {"steps": 10_000, "data": table["data"] | {"eval": ""}}
    text, error = notebook.run(
        "import asyncflow\n"
        f"starting = asyncflow.launch({recipe!r}, folder='run')\n"
        "assert 'has not started' in repr(starting)\n"
        "run = await starting\n"
        "run"
    )
    assert (error, "Run('run', " in text) == ("", True), text

    text, error = notebook.run(
        "from protocols.control.events import StepCommitted\n"
        "async for event in run.events():\n"
        "    if isinstance(event, StepCommitted):\n"
        "        print('step', event.step)\n"
        "        if event.step == 3:\n"
        "            break"
    )
    assert (error, text.splitlines()) == ("", ["step 1", "step 2", "step 3"])

    def stop_the_cell(text: str) -> None:
        notebook.interrupt()

    _, error = notebook.run("print('waits', flush=True)\nawait run.wait()", stop_the_cell)
    assert error in ("CancelledError", "KeyboardInterrupt"), "an interrupted cell ends"
    text, error = notebook.run("await run.pause()\nawait run.resume()\nprint((await run.stop()).outcome)")
    assert (error, text) == ("", "stopped\n"), "and its run goes on until another one stops it"

    text, error = notebook.run(
        "step = (await run.wait()).step\n"
        "async with asyncflow.resume(run.folder, overrides=[f'steps={step + 1}']) as run:\n"
        "    print((await run.wait()).outcome)"
    )
    assert (error, text) == ("", "finished\n"), "the ended run has freed its folder"
