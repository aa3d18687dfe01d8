"""The gate before the application: every request, to whatever path, passes it or gets a problem.

    Host, Origin -> token or user -> rate -> size of the body -> the application, which reads a body that is late or
    grows too large no further

It is an ASGI application around another one, so that a path that no route has is guarded as well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from asyncflow.server.access import Tokens, bearer, host_in
from asyncflow.server.same_user import is_same_user
from protocols.control.problems import (
    MEDIA_TYPE,
    Forbidden,
    ServerError,
    TooLarge,
    TooMany,
    TooSlow,
    Unauthenticated,
    WrongHost,
    problem_of,
)
from protocols.control.runs import Scope

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

SCOPE = "asyncflow.scope"  # what the token allows, in the ASGI scope
_log = logging.getLogger(__name__)


class RequestLimits(msgspec.Struct, frozen=True):
    """How much one client may ask for."""

    body_bytes: int = 1 << 20
    body_seconds: float = 20.0  # in which a body has to arrive
    requests_per_second: float = 500.0  # of one token, in the long run
    burst: int = 5000  # more at once
    failures_per_minute: int = 30  # tokens of one address that are not known


class Gate:
    """Guards an application."""

    def __init__(
        self,
        application: Application,
        tokens: Tokens,
        hosts: frozenset[str],
        limits: RequestLimits = RequestLimits(),  # noqa: B008 - it is frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._application, self._tokens, self._hosts, self._limits = application, tokens, hosts, limits
        self._requests = Buckets(limits.requests_per_second, limits.burst, clock)
        self._failures = Buckets(limits.failures_per_minute / 60.0, limits.failures_per_minute, clock)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._application(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            scope[SCOPE] = await self._admit(scope)
        except ServerError as error:
            return await _refuse(error, scope, send)
        body = _Body(receive, self._limits)
        try:
            return await self._application(scope, body.receive, send)
        except (TooLarge, TooSlow) as error:  # only where the application has not made it an answer
            return await _refuse(error, scope, send)

    async def _admit(self, scope: MutableMapping[str, Any]) -> Scope:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if host_in(headers.get("host", "")) not in self._hosts:
            raise WrongHost(f"Host {headers.get('host', '')!r} is none of {', '.join(sorted(self._hosts))}")
        if (origin := headers.get("origin")) and origin.partition("://")[2].lower() != headers["host"].lower():
            raise Forbidden(f"a page of {origin!r} may not use this server")
        peer: tuple[str, int] = scope.get("client") or ("", 0)
        own: tuple[str, int] = scope.get("server") or ("", 0)
        name, allowed = await self._who(headers, peer, own)
        if not self._requests.take(name):
            raise TooMany(f"more than {self._limits.requests_per_second:g} requests a second")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._limits.body_bytes:
            raise TooLarge(f"a body of {length[:20]} bytes: want at most {self._limits.body_bytes}")
        return allowed

    async def _who(self, headers: dict[str, str], peer: tuple[str, int], own: tuple[str, int]) -> tuple[str, Scope]:
        """A name for the client, and what it may do."""
        if not self._tokens.scopes:
            # Asked for every request: another user's connection may have the port of one that is closed.
            if not await asyncio.to_thread(is_same_user, peer, own):
                raise Unauthenticated("this server has no token, and answers the user who started it")
            return peer[0], "admin"
        token = bearer(headers)
        if (allowed := self._tokens.scope_of(token)) is not None:
            return self._tokens.name_of(token), allowed
        # One that is missing is no attempt to guess it.
        if token and not self._failures.take(peer[0]):
            raise TooMany("too many wrong tokens from this address")
        raise Unauthenticated("the token is not known" if token else "no token was sent")


class _Body:
    """A request's body: an end to what comes late or is too large."""

    def __init__(self, receive: Receive, limits: RequestLimits) -> None:
        self._receive, self._limits = receive, limits
        self._bytes, self._whole = 0, False
        self._until = time.monotonic() + limits.body_seconds

    async def receive(self) -> Message:
        if self._whole:  # what follows is the client's leaving
            return await self._receive()
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise TooSlow(f"the body did not arrive within {self._limits.body_seconds:g} s") from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._limits.body_bytes:
            raise TooLarge(f"the body is larger than {self._limits.body_bytes} bytes")
        self._whole = not message.get("more_body", False)
        return message


class Buckets:
    """How often each of many clients may do something: `burst` at once, `rate` a second in the long run."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float], most: int = 4096) -> None:
        """`most`: clients that are remembered; the one that was seen longest ago is forgotten first."""
        self._rate, self._burst, self._clock, self._most = rate, burst, clock, most
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (left, at)

    def take(self, client: str) -> bool:
        """Count one; whether it was allowed."""
        left = self._now(client)
        self._left[client] = (left - 1.0 if left >= 1.0 else left, self._clock())
        self._left.move_to_end(client)
        while len(self._left) > self._most:
            self._left.popitem(last=False)
        return left >= 1.0

    def _now(self, client: str) -> float:
        left, at = self._left.get(client, (float(self._burst), self._clock()))
        return min(float(self._burst), left + (self._clock() - at) * self._rate)


async def _refuse(error: ServerError, scope: MutableMapping[str, Any], send: Send) -> None:
    problem = problem_of(error, scope["path"])
    headers = [(b"content-type", MEDIA_TYPE.encode())]
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, TooMany):
        headers.append((b"retry-after", b"1"))
    if isinstance(error, TooLarge | TooSlow):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    _log.info("%s %s refused: %s", scope["method"], scope["path"], problem.type)
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode(problem)})
