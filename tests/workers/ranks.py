"""Processes that form a torch.distributed process group on gloo and call one function together.

They are forked from a server that has only imported torch: forking the test process itself would copy its autograd
threads' state, and starting an interpreter for each would take seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

import workers.parallel.model  # noqa: F401 - imported once, by the server, for all that it forks
from workers.generation.engine_devices import cuda_device_of

COLLECTIVE_TIMEOUT = timedelta(seconds=60)  # for each collective and for each answer


class RankFailed(AssertionError):
    """At least one rank raised; the message holds every traceback."""


class Ranks:
    """`size` processes that live between calls. After a failed call they can't be used: peers may hang in a collective.

    A call fails if an answer takes longer than `patience`. Ranks with `children` may start processes. On "cuda" each
    rank uses NCCL and sees only the device with its own number, as under Ray.
    """

    def __init__(
        self, size: int, *, patience: timedelta = COLLECTIVE_TIMEOUT, children: bool = False, device: str = "cpu"
    ) -> None:
        self._patience = patience
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", __name__])
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            own, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, size, store, device), daemon=not children, name=f"rank-{rank}"
            )
            process.start()
            theirs.close()
            self._pipes.append(own)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run `function(*arguments)` on all ranks at once, and return the results by rank. Raises RankFailed."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [self._answer(pipe) for pipe in self._pipes]
        if failed := [f"--- rank {rank}\n{value}" for rank, (good, value) in enumerate(answers) if not good]:
            raise RankFailed("\n".join(failed))
        return [value for _, value in answers]

    def _answer(self, pipe: Connection) -> tuple[bool, Any]:
        try:
            return pipe.recv() if pipe.poll(self._patience.total_seconds()) else (False, f"late: {self._patience}")
        except EOFError:
            return False, "the process died"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pipe in self._pipes:
            pipe.close()  # a rank ends when its pipe is closed
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


class Worlds:
    """Process groups by size, each forked on first use."""

    def __init__(self) -> None:
        self._made: dict[int, Ranks] = {}

    def __getitem__(self, size: int) -> Ranks:
        if size not in self._made:
            self._made[size] = Ranks(size)
        return self._made[size]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failed: Any) -> None:
        for ranks in self._made.values():
            ranks.__exit__(None, None, None)


def own_device(kind: str) -> torch.device:
    """This rank's device of a kind; a rank sees only one CUDA device."""
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, 0)


def _serve(pipe: Connection, rank: int, size: int, store: str, device: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # otherwise gloo resolves the host's name
    backend = "gloo"
    if device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = cuda_device_of("", rank, os.environ.get("CUDA_VISIBLE_DEVICES")).device
        torch.cuda.set_device(0)
        backend = "nccl"
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            answer = (True, function(*arguments))
        except Exception:  # noqa: BLE001 - the test that called raises it
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    dist.destroy_process_group()
