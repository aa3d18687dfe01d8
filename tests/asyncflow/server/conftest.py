"""A real server in a process of its own, over a folder with models and data, and recipes of runs that it can start."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.asyncflow.pipeline.runs import ASYNCFLOW

TOKEN = "a token that only the tests know".replace(" ", "-")


class Server:
    """`asyncflow serve`, which can be killed and started again on its port."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.root, self._arguments, self.port = root, arguments, 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [*ASYNCFLOW, "serve", "--root", str(self.root), "--port", str(self.port), *self._arguments]
        environment = {**os.environ, "ASYNCFLOW_TOKEN": TOKEN}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serves "), line
        self.port = int(line.split(" for ")[0].rpartition(":")[2])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture
def root(tmp_path: Path, models: Path, data: Path) -> Path:
    """The root of a server: models/ and data/ are below it."""
    root = tmp_path / "root"
    shutil.copytree(models, root / "models")
    shutil.copytree(data, root / "data")
    return root


@pytest.fixture
def serve(root: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers, and ends them and the runs that are left."""
    servers: list[Server] = []

    def start(*arguments: str) -> Server:
        servers.append(Server(root, *arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
    for lock in root.glob("*/run.lock"):
        process = lock.read_text().partition(" ")[0]
        if process.isdigit() and Path(f"/proc/{process}").exists():
            os.kill(int(process), signal.SIGKILL)


@pytest.fixture
def served_table(table: dict[str, Any]) -> dict[str, Any]:
    """The recipe of `table`, with paths below the root."""
    models = {role: {**model, "path": f"models/{Path(model['path']).name}"} for role, model in table["models"].items()}
    data = {"train": "data/train.jsonl", "eval": "data/heldout.jsonl"}
    return {key: value for key, value in table.items() if key != "folder"} | {"models": models, "data": data}
