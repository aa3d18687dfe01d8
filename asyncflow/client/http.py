"""One server over HTTP: its token, retries with jitter, and its problems as exceptions.

Every call may be repeated: reading changes nothing, and a command carries a key by which the server answers a repeat
with the first result. So a call goes on over lost connections and a restart of the server, until it has had no answer
for `patience` seconds.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from protocols.control.problems import MEDIA_TYPE, Problem, TooMany, Unavailable, error_of, problem_of_status
from protocols.control.runs import Pending

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

TOKEN = "ASYNCFLOW_TOKEN"
KEY = "Idempotency-Key"
POLL_SECONDS = 20.0  # a command that takes longer is asked for again
FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0
HEARTBEAT_SECONDS = 10.0  # of the server's streams; three that are missing mean that the connection is dead


def delays(rng: random.Random) -> Iterator[float]:
    """Seconds to wait before each retry: uniform below a bound that doubles, so that clients do not return at once."""
    bound = FIRST_DELAY
    while True:
        yield rng.uniform(0, bound)
        bound = min(2 * bound, LONGEST_DELAY)


def new_key() -> str:
    """A key for one command, however often it is sent."""
    return uuid.uuid4().hex


class HttpConnection:
    """The requests of one client to one server. Use it inside `async with`."""

    def __init__(self, url: str, token: str | None = None, *, patience: float = 120.0, trust_proxies: bool = True):
        """Args:

        url: of the server, "http://host:port".
        token: by default that of the environment's ASYNCFLOW_TOKEN.
        patience: seconds without an answer, over all retries, after which a call raises Unavailable.
        trust_proxies: use the proxies of the environment, except for this machine.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url {url!r}: want http://host:port or https://host:port")
        self.url = url.rstrip("/")
        self._token = os.environ.get(TOKEN, "") if token is None else token
        self._patience, self._rng = patience, random.Random()
        self._proxies = trust_proxies and parts.hostname not in ("localhost", "127.0.0.1", "::1")
        self._http: httpx.AsyncClient | None = None

    async def __aenter__(self) -> HttpConnection:
        import httpx

        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=headers, limits=limits, trust_env=self._proxies, timeout=POLL_SECONDS + 20.0
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def get(self, path: str, kind: type[T], **query: Any) -> T:
        """Read something."""
        return msgspec.json.decode(await self.get_bytes(path, **query), type=kind)

    async def get_bytes(self, path: str, **query: Any) -> bytes:
        """Read something as it is."""
        return (await self._request("GET", path, query=query)).content

    async def post(self, path: str, body: Any, kind: type[T], key: str) -> T:
        """Send a command and wait for its result, however long that takes."""
        while True:
            answer = await self._request(
                "POST",
                path,
                content=msgspec.json.encode(body),
                headers={KEY: key, "Content-Type": "application/json", "Prefer": f"wait={POLL_SECONDS:g}"},
            )
            if answer.status_code != 202:
                return msgspec.json.decode(answer.content, type=kind)
            msgspec.json.decode(answer.content, type=Pending)

    @asynccontextmanager
    async def stream(self, path: str, **query: Any) -> AsyncIterator[httpx.Response]:
        """Open a stream. Raises what the server refuses; a connection that is lost raises Unavailable."""
        import httpx

        timeout = httpx.Timeout(POLL_SECONDS, read=3 * HEARTBEAT_SECONDS)
        try:
            async with self._open.stream("GET", path, params=query, timeout=timeout) as answer:
                if answer.is_error:
                    await answer.aread()
                    raise _error(answer)
                yield answer
        except httpx.TransportError as error:
            raise _unreachable(self.url, error) from error

    @property
    def _open(self) -> httpx.AsyncClient:
        if self._http is None:
            raise RuntimeError("this connection is closed: use the client inside its `async with` block")
        return self._http

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        import httpx

        patience = Patience(self._patience, self._rng)
        while True:
            try:
                answer = await self._open.request(method, path, params=query, content=content, headers=headers)
                if not answer.is_error:
                    return answer
                error = _error(answer)
            except httpx.TransportError as lost:
                error = _unreachable(self.url, lost)
            if not isinstance(error, Unavailable | TooMany):
                raise error
            await patience.wait_after(error)


class Patience:
    """How long one call, or one stream, goes on without an answer."""

    def __init__(self, seconds: float, rng: random.Random) -> None:
        self._seconds, self._rng = seconds, rng
        self.answered()

    def answered(self) -> None:
        """The server has answered: the time starts again."""
        self._until, self._delays = time.monotonic() + self._seconds, delays(self._rng)

    async def wait_after(self, error: Unavailable | TooMany) -> None:
        """Wait before the next try. Raises the error where there is none."""
        delay = next(self._delays)
        if time.monotonic() + delay > self._until:
            raise error
        await asyncio.sleep(delay)


def _error(answer: httpx.Response) -> Exception:
    if answer.headers.get("content-type", "").startswith(MEDIA_TYPE):
        try:
            return error_of(msgspec.json.decode(answer.content, type=Problem))
        except msgspec.DecodeError:
            pass
    status, where = answer.status_code, str(answer.request.url)
    return error_of(problem_of_status(status, f"{where} answered {status}: {answer.text[:200]}", where))


def _unreachable(url: str, error: Exception) -> Unavailable:
    return Unavailable(f"{url} can't be reached: {type(error).__name__}: {error}; is `asyncflow serve` running there?")
