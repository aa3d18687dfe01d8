"""The runs below a server's root: those that it was asked for and those that were started by hand, while and after
they run.

    submit ──> records ──> starts (as devices allow) ──> a process of its own: `asyncflow run --serve`
    commands ──────────────────────────────────────────> its endpoint, found by endpoint.json and the folder's lock
    status, files, samples, events <──────────────────── its folder

The server holds no state of a run. So it may be killed and started again at any time, and a run too.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import sqlite3
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import msgspec

from asyncflow.client.http import HttpConnection
from asyncflow.control.store.run_log import read_end
from asyncflow.recipe.config import read_table, recipe_text
from asyncflow.run.run_folder import RECIPE
from asyncflow.run.run_status import holder_of
from asyncflow.run.terms import TERM
from asyncflow.server import processes
from asyncflow.server.capacity import devices_of, to_start
from asyncflow.server.endpoint_file import read_endpoint
from asyncflow.server.operations import Operations
from asyncflow.server.records import Records, RunRecord, digest_of
from asyncflow.server.run_states import end_of, state_of
from asyncflow.server.submissions import checked_recipe, restarted_recipe
from protocols.control.errors import BadInput, RunFailed
from protocols.control.events import RunEnded
from protocols.control.problems import Conflict, NotFound, ServerError, Unauthenticated, Unavailable
from protocols.control.runs import OVER, Answer, Capabilities, Command, Restart, RunStatus, Scope, Submission, is_name

if TYPE_CHECKING:
    from protocols.control.delivery import ServiceStatistics

STATE = ".server"  # the folder of the server's own files, below its root
RECIPES = "recipes"  # below the root: those that a submission names
LOOK_SECONDS, IDLE_SECONDS = 0.25, 2.0
PATIENCE_SECONDS = 5.0  # with a run's endpoint; then it is looked for again
_log = logging.getLogger(__name__)


class Catalog:
    """Implements `Runs` for a server. `run` starts what waits, until it is cancelled."""

    def __init__(self, root: Path, devices: int, functions: frozenset[str], code: list[str]) -> None:
        """`functions`: names "package.module:function" that recipes may have, searched in the folders `code`."""
        self.root, self._devices, self._functions, self._code = root, devices, functions, code
        (root / STATE).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._records = Records(root / STATE / "server.db")
        self._operations = Operations(self._records)
        self._known: dict[str, RunRecord] = {}
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._exits: dict[str, int] = {}  # of processes that this server has started
        self._unnoted: dict[str, tuple[int, str]] = {}  # processes that the records don't have yet: a write failed
        self._signals: set[tuple[int, str, Command]] = set()  # sent: process, when it started, for what
        self._starting = asyncio.Lock()

    # --- what is there

    def capabilities(self, scope: Scope) -> Capabilities:
        return Capabilities(
            version=version("asyncflow"),
            scope=scope,
            commands=list(get_args(Command)),
            submits=True,
            devices=self._devices,
        )

    async def list(self) -> list[RunStatus]:
        folders = await asyncio.to_thread(lambda: {path.parent.name for path in self.root.glob(f"*/{RECIPE}")})
        found: list[tuple[float, RunStatus]] = []
        for name in folders | self._known.keys():
            try:
                found.append((await asyncio.to_thread(self._started_at, name), await self.status(name)))
            except (BadInput, NotFound) as error:  # a damaged folder hides no other
                _log.warning("run %s: %s", name, error)
        return [status for _, status in sorted(found, key=lambda item: item[0], reverse=True)]

    def _started_at(self, name: str) -> float:
        paths = [path for file in (RECIPE, TERM) if (path := self.root / name / file).exists()]
        created = self._known[name].created if name in self._known else 0.0
        return max([created, *(path.stat().st_mtime for path in paths)])

    async def status(self, name: str) -> RunStatus:
        return await asyncio.to_thread(self._status, name)

    def _status(self, name: str) -> RunStatus:
        found = state_of(self.root / name, self._known.get(name), self._exits.get(name))
        if found.state == "refused":
            error = processes.last_error(self._log_of(name)) or "its process ended before it had begun"
            return msgspec.structs.replace(found, error=error)
        return found

    async def ended(self, name: str) -> RunEnded | None:
        folder, record = self.root / name, self._known.get(name)
        if record is not None and processes.lives(record.process, record.process_start):
            return None
        if await asyncio.to_thread(holder_of, folder) is not None:
            return None
        return end_of(await self.status(name))

    async def folder(self, name: str) -> Path:
        folder = self.root / name
        if not (await asyncio.to_thread((folder / RECIPE).is_file)) and name not in self._known:
            raise NotFound(f"there is no run {name!r}")
        return folder

    # --- starts

    async def submit(self, submission: Submission, key: str) -> RunStatus:
        request = digest_of("submit", msgspec.json.encode(submission))
        if name := await self._records.run_of(key, request):
            return await self.status(name)
        recipe = await asyncio.to_thread(self._recipe, submission)
        text, devices = recipe_text(recipe).encode(), devices_of(recipe)
        stem = submission.run or stem_of(recipe.name)
        if not is_name(stem):
            raise BadInput(f"run {stem!r}: want at most 100 letters, digits, '_', '.', '-'")
        names = [stem] if submission.run else [stem, *(f"{stem}-{number}" for number in range(1, 100))]
        for candidate in names:
            if candidate == RECIPES or await asyncio.to_thread((self.root / candidate).exists):
                continue
            record = RunRecord(candidate, time.time(), text, devices, "start", ["run", "RECIPE", "--serve"], 0, "")
            if name := await self._records.add(record, key, request):
                await self._start_waiting()
                return await self.status(name)
        raise Conflict(f"run {stem!r}: there is one of this name: choose another")

    def _recipe(self, submission: Submission):
        given = submission.recipe
        if isinstance(given, str):
            path = (self.root / RECIPES / f"{given}.toml").resolve()
            if not path.is_relative_to((self.root / RECIPES).resolve()) or not path.is_file():
                raise BadInput(f"recipe {given!r}: the server has no such recipe in its folder {RECIPES}")
            given = read_table(path, "recipe")
        return checked_recipe(given, submission.overrides, self.root, self._functions, self._code)

    async def start(self, name: str, restart: Restart, key: str) -> RunStatus:
        await self.folder(name)
        request = digest_of("start", name, msgspec.json.encode(restart))
        if not await self._records.run_of(key, request):
            found = await self.status(name)
            if found.state not in OVER:
                raise Conflict(f"run {name!r} is {found.state}: only one that is over can be started again")
            path = self.root / name / RECIPE
            recipe = await asyncio.to_thread(restarted_recipe, path, restart.overrides, self.root, self._functions)
            arguments = ["resume", "FOLDER", "--serve"]
            arguments += [part for override in restart.overrides for part in ("--set", override)]
            arguments += ["--allow-fresh"] if restart.allow_fresh else []
            self._exits.pop(name, None)
            await self._records.restart(name, devices_of(recipe), arguments, key, request)
            await self._start_waiting()
        return await self.status(name)

    async def run(self) -> None:
        """Start the runs that wait, in their order, as devices become free; also those of before a restart."""
        while True:
            looked = await self._start_waiting()
            busy = self._children or any(record.wanted == "start" for record in self._known.values())
            await asyncio.sleep(LOOK_SECONDS if looked and busy else IDLE_SECONDS)  # processes tell nobody of their end

    async def _start_waiting(self) -> bool:
        """Start those that fit; False where the machine refuses it, as with a full disk: the next look tries again."""
        try:
            await self._start_what_fits()
        except (OSError, sqlite3.Error) as error:
            _log.error("the runs that wait can't be started now: %s: %s", type(error).__name__, error)
            return False
        return True

    async def _start_what_fits(self) -> None:
        async with self._starting:
            for name, child in list(self._children.items()):
                if child.returncode is not None:
                    self._exits[name] = child.returncode
                    del self._children[name]
            await self._read_records()
            records = list(self._known.values())
            waiting = [(record.name, record.devices) for record in records if record.wanted == "start"]
            alive = [r for r in records if r.wanted != "start" and processes.lives(r.process, r.process_start)]
            for name in to_start(waiting, sum(record.devices for record in alive), self._devices):
                await self._start(self._known[name])
            await self._read_records()

    async def _start(self, record: RunRecord) -> None:
        if record.name not in self._unnoted:
            self._unnoted[record.name] = await self._process_of(record)
        await self._records.started(record.name, *self._unnoted[record.name])
        del self._unnoted[record.name]

    async def _process_of(self, record: RunRecord) -> tuple[int, str]:
        """Start the process of a run: its number, and when it started."""
        folder = self.root / record.name
        places = {"RECIPE": str(self._recipe_file(record)), "FOLDER": str(folder)}
        arguments = [places.get(argument, argument) for argument in record.arguments]
        if record.arguments[0] == "run":
            arguments += ["--folder", str(folder)]
        child = await processes.start(arguments, self.root, self._log_of(record.name))
        self._children[record.name] = child
        return child.pid, processes.start_of(child.pid)

    def _recipe_file(self, record: RunRecord) -> Path:
        path = self.root / STATE / "recipes" / f"{record.name}.toml"
        if record.recipe:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(record.recipe)
        return path

    def _log_of(self, name: str) -> Path:
        return self.root / STATE / "logs" / f"{name}.log"

    async def _read_records(self) -> None:
        self._known = {record.name: record for record in await self._records.runs()}

    # --- commands

    async def command(self, name: str, command: Command, key: str, seconds: float) -> Answer | None:
        folder = await self.folder(name)
        term = await asyncio.to_thread(_term_of, folder)
        request = digest_of("command", name, command)
        return await self._operations.run(key, request, term, lambda: self._carry_out(name, command, key), seconds)

    async def _carry_out(self, name: str, command: Command, key: str) -> Answer:
        ends = command in ("drain", "cancel")
        while True:
            found = await self.status(name)
            if found.state in OVER:
                if not ends:
                    raise RunFailed(f"{command}: run {name!r} is over, it is {found.state}: start it again first")
                ended = await asyncio.to_thread(read_end, self.root / name) or end_of(found)
                return Answer(command, msgspec.to_builtins(ended))
            if found.process and found.host != socket.gethostname():
                raise RunFailed(f"{command}: run {name!r} is on {found.host!r}: send it to a server of that machine")
            if found.state == "queued" and ends:
                await self._records.forget_start(name)
                await self._read_records()
            elif (endpoint := read_endpoint(self.root / name, found.process)) is not None:
                try:
                    async with HttpConnection(endpoint.url, endpoint.token, patience=PATIENCE_SECONDS) as connection:
                        return await connection.post(f"/v1/runs/{name}/{command}", {}, Answer, key)
                except (Unavailable, NotFound, Unauthenticated) as error:  # it has ended, or another process is there
                    _log.info("run %s: %s: %s", name, command, error)
                except ServerError as error:
                    raise RunFailed(f"{command}: the process of run {name!r} refuses it: {error}") from error
            elif ends and found.process and (command == "cancel" or found.state == "running"):
                self._signal(found, command)  # it takes the signal as the command; one that holds no lock yet would not
            elif found.state == "running":
                raise RunFailed(f"{command}: run {name!r} was started without --serve: it takes drain and cancel only")
            await asyncio.sleep(LOOK_SECONDS)

    def _signal(self, found: RunStatus, command: Command) -> None:
        """Ask a process to end, once for each command: it takes a second signal as the wish to end sooner."""
        sent = (found.process, processes.start_of(found.process), command)
        if sent not in self._signals:
            self._signals.add(sent)
            try:
                processes.end(found.process)
            except OSError as error:
                raise RunFailed(f"{command}: the process {found.process} of run {found.name!r}: {error}") from error

    async def statistics(self, name: str) -> list[ServiceStatistics]:
        from protocols.control.delivery import ServiceStatistics

        found = await self.status(name)
        endpoint = read_endpoint(self.root / name, found.process) if found.state == "running" else None
        if endpoint is None:
            raise RunFailed(f"statistics: run {name!r} is {found.state}: only a running one with an endpoint has them")
        async with HttpConnection(endpoint.url, endpoint.token, patience=PATIENCE_SECONDS) as connection:
            return await connection.get(f"/v1/runs/{name}/statistics", list[ServiceStatistics])

    async def close(self) -> None:
        """Leave the runs alone, and close the records."""
        await self._operations.close()
        self._records.close()


def stem_of(recipe: str) -> str:
    """A name for a run of a recipe, which a path may have, and which has room for a number behind it."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', recipe)[:80]}-{time.strftime('%Y%m%d-%H%M%S')}"


def _term_of(folder: Path) -> int:
    try:
        return int((folder / TERM).read_text())
    except (OSError, ValueError):
        return -1
