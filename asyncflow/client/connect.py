"""connect: a client of `asyncflow serve`, or of a run that was started with `--serve`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from asyncflow.client.http import HttpConnection, new_key
from asyncflow.client.remote_link import RemoteLink
from asyncflow.client.run import Run
from protocols.control.errors import BadInput
from protocols.control.runs import OVER, Artifact, Capabilities, Restart, RunStatus, Sample, Submission

LONG_POLL_SECONDS = 20.0


def connect(url: str, token: str | None = None, *, patience: float = 120.0) -> Client:
    """Connect to a server: `async with asyncflow.connect("http://127.0.0.1:8642") as client:`.

    Args:
        url: of the server.
        token: by default that of the environment's ASYNCFLOW_TOKEN.
        patience: seconds without an answer after which a call, or a stream of events, raises Unavailable. Until then
            lost connections and a restart of the server only delay it.
    """
    return Client(HttpConnection(url, token, patience=patience), patience)


class Client:
    """The runs of one server. Every call raises what `protocols.control.problems` lists."""

    def __init__(self, connection: HttpConnection, patience: float) -> None:
        self._connection, self._patience = connection, patience

    async def __aenter__(self) -> Client:
        await self._connection.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._connection.__aexit__(*error)

    async def capabilities(self) -> Capabilities:
        """What the server can do, and what this client's token allows."""
        return await self._connection.get("/v1/capabilities", Capabilities)

    async def submit(
        self,
        recipe: str | Path | Mapping[str, Any],
        overrides: Iterable[str] = (),
        *,
        run: str = "",
        key: str | None = None,
    ) -> RemoteRun:
        """Start a run on the server.

        Args:
            recipe: a recipe's table; the path of a recipe's file here, which ends with ".toml"; or the name of one in
                the server's folder `recipes`. Its relative paths start at the server's root.
            overrides: `key.path=value`, applied by the server.
            run: the run's name; by default the recipe's name and the time.
            key: sent again, it gives the run that it has started, also to another client and after any crash.

        Returns as soon as the recipe is checked, while the models load, or where the run waits for devices. Raises
        BadInput for a recipe that can't be run.
        """
        submission = Submission(recipe=_given(recipe), overrides=list(overrides), run=run)
        status = await self._connection.post("/v1/runs", submission, RunStatus, key or new_key())
        return await self._checked(status)

    async def resume(
        self, run: str, overrides: Iterable[str] = (), *, allow_fresh: bool = False, key: str | None = None
    ) -> RemoteRun:
        """Go on with a run that is over, from its newest valid checkpoint, as `asyncflow resume` does."""
        restart = Restart(overrides=list(overrides), allow_fresh=allow_fresh)
        status = await self._connection.post(f"/v1/runs/{run}/start", restart, RunStatus, key or new_key())
        return await self._checked(status)

    async def runs(self) -> list[RunStatus]:
        """Every run of the server, the one that was started last first."""
        return await self._connection.get("/v1/runs", list[RunStatus])

    async def run(self, name: str) -> RemoteRun:
        """A run by its name. Raises NotFound."""
        return self._handle(await self._connection.get(f"/v1/runs/{name}", RunStatus))

    async def _checked(self, status: RunStatus) -> RemoteRun:
        run = self._handle(status)
        while status.state == "checking":
            status = await run.status(unlike="checking", seconds=LONG_POLL_SECONDS)
        if status.state == "refused":
            raise BadInput(status.error)
        return run

    def _handle(self, status: RunStatus) -> RemoteRun:
        link = RemoteLink(self._connection, status.name, self._patience)
        return RemoteRun(link, status.name, Path(status.folder))


class RemoteRun(Run):
    """A run of a server: `Run`, and what its folder there says."""

    _link: RemoteLink

    async def status(self, *, unlike: str = "", seconds: float = 0.0) -> RunStatus:
        """How the run stands. `unlike`: wait up to `seconds` until its state is another one."""
        query = {"unlike": unlike, "seconds": seconds} if unlike else {}
        return await self._link.connection.get(self._link.path, RunStatus, **query)

    async def is_over(self) -> bool:
        """Whether no process works on the run any more."""
        return (await self.status()).state in OVER

    async def recipe(self) -> dict[str, Any]:
        """The recipe, resolved."""
        return await self._link.connection.get(f"{self._link.path}/recipe", dict[str, Any])

    async def artifacts(self) -> list[Artifact]:
        """The files that the run has written: journals, logs, checkpoints, the trained policy."""
        return await self._link.connection.get(f"{self._link.path}/artifacts", list[Artifact])

    async def artifact(self, path: str, to: str | Path) -> Path:
        """Copy a file of the run into a file here."""
        import asyncio

        async with self._link.connection.stream(f"{self._link.path}/artifacts/{path}") as answer:
            with await asyncio.to_thread(Path(to).open, "wb") as file:
                async for data in answer.aiter_bytes(1 << 20):
                    await asyncio.to_thread(file.write, data)
        return Path(to)

    async def log(self, service: str = "controller", *, last_bytes: int = 1 << 16) -> str:
        """The end of a service's log."""
        query = {"last_bytes": last_bytes}
        return (await self._link.connection.get_bytes(f"{self._link.path}/logs/{service}", **query)).decode(
            "utf-8", "replace"
        )

    async def samples(self, state: str = "", *, after: int = -1, limit: int = 1000) -> list[Sample]:
        """Samples in the ledger by rising id: those in a state, those after an id."""
        query = {"state": state, "after": after, "limit": limit}
        return await self._link.connection.get(f"{self._link.path}/samples", list[Sample], **query)

    async def sample(self, sample_id: int) -> Sample:
        """One sample's place in the ledger. Raises NotFound."""
        return await self._link.connection.get(f"{self._link.path}/samples/{sample_id}", Sample)


def _given(recipe: str | Path | Mapping[str, Any]) -> str | dict[str, Any]:
    if isinstance(recipe, Mapping):
        return dict(recipe)
    if isinstance(recipe, str) and not recipe.endswith(".toml"):
        return recipe  # the server has it
    try:
        return tomllib.loads(Path(recipe).read_text("utf-8-sig"))
    except OSError as error:
        raise BadInput(f"recipe {recipe}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {recipe}: {error}") from error
