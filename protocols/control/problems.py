"""What a server answers where it can't do what it was asked: RFC 9457's problem+json, and the exceptions they become.

One table serves both ends: a server turns an exception into a problem, a client turns the problem into the exception.
"""

from __future__ import annotations

import msgspec

from protocols.control.errors import BadInput, RunFailed

MEDIA_TYPE = "application/problem+json"


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of an answer that is an error."""

    type: str  # a key of `KINDS`
    title: str  # what went wrong, the same for every problem of the type
    status: int
    detail: str = ""  # this one: which value, which limit
    instance: str = ""  # where: the path that was asked
    remedy: str = ""  # what to do


class ServerError(Exception):
    """A server refused a request, or could not be reached. The message says what, where, and what to do."""

    def __init__(self, detail: str, instance: str = "") -> None:
        super().__init__(detail)
        self.detail, self.instance = detail, instance


class Unauthenticated(ServerError):
    """The token is missing, or none of the server's."""


class Forbidden(ServerError):
    """The token's scope does not allow it, or the request came from a web page of another site."""


class NotFound(ServerError):
    """There is no such run, file, sample or path."""


class NotAllowed(ServerError):
    """The path exists, and knows no such method."""


class Conflict(ServerError):
    """The idempotency key belongs to another request, or the name to another run."""


class TooLarge(ServerError):
    """The request's body is larger than the server reads."""


class TooSlow(ServerError):
    """The request's body did not arrive in time."""


class WrongHost(ServerError):
    """The request names a host that the server does not answer for."""


class TooMany(ServerError):
    """The client has made more requests than it may; it tries again by itself."""


class Unavailable(ServerError):
    """The server, or the process of the run, can't be reached now; the client tries again by itself."""


class InternalError(ServerError):
    """The server's own mistake; its log has the stack trace."""


class Kind(msgspec.Struct, frozen=True):
    """One type of problem."""

    status: int
    title: str
    remedy: str
    raises: type[Exception]


KINDS: dict[str, Kind] = {
    "bad-input": Kind(422, "The request can't be used", "correct it", BadInput),
    "run-failed": Kind(409, "The run can't do that any more", "see the run's state and error", RunFailed),
    "unauthenticated": Kind(
        401, "A token is needed", "send `Authorization: Bearer TOKEN` with the server's token", Unauthenticated
    ),
    "forbidden": Kind(403, "Not allowed", "use a token with the scope that is named", Forbidden),
    "not-found": Kind(404, "There is no such thing", "list what there is: GET /v1/runs", NotFound),
    "not-allowed": Kind(405, "The path has no such method", "see /schema/openapi.json", NotAllowed),
    "too-slow": Kind(408, "The request took too long to arrive", "send it at once", TooSlow),
    "conflict": Kind(409, "It is taken", "use another one", Conflict),
    "too-large": Kind(413, "The request is too large", "send less", TooLarge),
    "wrong-host": Kind(421, "The host is not this server's", "start it with --allow-host", WrongHost),
    "too-many": Kind(429, "Too many requests", "wait as long as Retry-After says", TooMany),
    "internal": Kind(500, "The server failed", "see its log", InternalError),
    "unavailable": Kind(503, "It can't be reached now", "try again", Unavailable),
}

_BY_CLASS = {kind.raises: name for name, kind in KINDS.items()}
_BY_STATUS = {kind.status: name for name, kind in reversed(KINDS.items())} | {400: "bad-input"}


def problem_of(error: Exception, instance: str = "") -> Problem:
    """The problem that tells of an exception; one that is in no table is "internal", and its text stays here."""
    name = next((_BY_CLASS[kind] for kind in type(error).__mro__ if kind in _BY_CLASS), "internal")
    return problem(name, "" if name == "internal" else str(error), instance)


def problem_of_status(status: int, detail: str, instance: str = "") -> Problem:
    """The problem of a status code, by which a web framework refuses a request."""
    return problem(_BY_STATUS.get(status, "bad-input" if status < 500 else "internal"), detail, instance)


def problem(name: str, detail: str, instance: str = "") -> Problem:
    """A problem of one of the kinds."""
    kind = KINDS[name]
    return Problem(name, kind.title, kind.status, detail, instance, kind.remedy)


def error_of(found: Problem) -> Exception:
    """The exception of a problem that a server answered with."""
    kind = KINDS.get(found.type) or KINDS[_BY_STATUS.get(found.status, "internal")]
    text = found.detail or f"{found.title}: {found.remedy or found.status}"
    return kind.raises(text, found.instance) if issubclass(kind.raises, ServerError) else kind.raises(text)
