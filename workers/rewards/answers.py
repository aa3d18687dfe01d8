"""What a rule may return, and what becomes of an exception: a score with its named parts, or the cause of its absence.

    a number       bool, int, float, or a numpy or torch value with one element: the score
    a dictionary   with "score": that is the score, and its other numbers are reported as parts. Without: the score is
                   the sum of its values, each of which is a part.

The process of a rule imports this module, so it must stay free of heavy imports: numpy and torch values are known by
their `item()`.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

SCORE = "score"  # the key of the total in a dictionary
_FLOAT32_MAX = 3.4028234663852886e38  # a larger score would be infinite in its column
_CAUSE_CHARACTERS = 300
_WANTED = "a number, or a dictionary of numbers"

Retry = Literal["never", "now", "later"]

# An error in the rule's own text: the next attempt would raise it again.
_OWN_ERRORS = (TypeError, NameError, AttributeError, ImportError, SyntaxError, NotImplementedError)
_NOT_REMOTE = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_REMOTE = ("TransportError", "ClientConnectionError")  # base classes of httpx and aiohttp, which are no OSErrors
_BUSY = (408, 409, 425, 429)  # HTTP statuses below 500 after which the same request may succeed


class RuleAnswer(msgspec.Struct, frozen=True):
    """A score and its parts, or the cause of their absence."""

    score: float | None = None
    parts: dict[str, float] = {}
    error: str = ""  # continues "rule NAME ..."
    retry: Retry = "now"  # whether another attempt makes sense, and whether only after a while
    wait_seconds: float = 0.0  # what a busy server asked for


def answer_of(value: object) -> RuleAnswer:
    """The answer in what a rule returned; one whose type or value is no score is refused and not tried again."""
    try:
        return _answer_of(value)
    except _NoScore as refused:
        return refusal(f"returned {refused}", "never")


def refusal(cause: str, retry: Retry = "now", wait_seconds: float = 0.0) -> RuleAnswer:
    """The answer of a rule that gave no score."""
    text = cause[:_CAUSE_CHARACTERS].encode(errors="backslashreplace").decode()
    return RuleAnswer(error=text, retry=retry, wait_seconds=wait_seconds)


def late_answer(timeout_seconds: float) -> RuleAnswer:
    """The answer of a rule that missed its deadline."""
    return refusal(f"gave no answer within {timeout_seconds:g} s")


def refusal_of(error: BaseException) -> RuleAnswer:
    """The answer for what a rule raised. A failed connection and a busy server are tried again later."""
    cause = f"raised {type(error).__name__}: {error}"
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:  # client libraries wrap what their transport raised
        seen.add(id(link))
        if (status := _http_status(link)) is not None:
            busy = status >= 500 or status in _BUSY
            return refusal(cause, "later" if busy else "never", _retry_after(link))
        if _is_remote(link):
            return refusal(cause, "later")
        link = link.__cause__
    return refusal(cause, "never" if isinstance(error, _OWN_ERRORS) else "now")


class _NoScore(Exception):
    """A value is no score; the message says what it is and what is wanted."""


def _answer_of(value: object) -> RuleAnswer:
    if not isinstance(value, Mapping):
        return RuleAnswer(_number(value))
    if not value:
        raise _NoScore(f"an empty dictionary, want {_WANTED}")
    named: Mapping[Any, Any] = value
    if wrong := [name for name in named if not isinstance(name, str) or not name or "\n" in name]:
        raise _NoScore(f"a dictionary with the key {wrong[0]!r}, want names of one line")
    if SCORE not in named:
        parts = {name: _number(part, name) for name, part in named.items()}
        return RuleAnswer(_finite(sum(parts.values()), "the sum of its parts"), parts)
    others = {name: part for name, part in named.items() if name != SCORE and _is_number(part)}
    return RuleAnswer(_number(named[SCORE], SCORE), {name: _number(part, name) for name, part in others.items()})


def _is_number(value: object) -> bool:
    """Whether a value beside a dictionary's score is to be reported; texts, lists and None are not."""
    return isinstance(_plain(value), numbers.Real)


def _plain(value: Any) -> object:
    """The Python number in a numpy or torch value of one element; other values as they are."""
    if isinstance(value, numbers.Real) or not callable(getattr(value, "item", None)):
        return value
    try:
        return value.item()
    except (ValueError, RuntimeError):  # it has several elements
        return value


def _number(value: object, name: str = "") -> float:
    plain, where = _plain(value), f"{name} = " if name else ""
    if not isinstance(plain, numbers.Real):
        raise _NoScore(f"{where}{value!r:.100}, want {'a number' if name else _WANTED}")
    return _finite(float(plain), name)


def _finite(number: float, name: str) -> float:
    if not abs(number) <= _FLOAT32_MAX:
        where = f"{name} = " if name else ""
        raise _NoScore(f"{where}{number}, want a finite number that float32 holds")
    return number


def _http_status(error: BaseException) -> int | None:
    """The HTTP status in an exception of httpx, requests, aiohttp, urllib or a client library; None without one."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            if type(status := getattr(holder, name, None)) is int and 100 <= status < 600:
                return status
    return None


def _retry_after(error: BaseException) -> float:
    """The seconds in a Retry-After header; 0 without one, or where it is a date."""
    for holder in (getattr(error, "response", None), error):
        headers: Any = getattr(holder, "headers", None) or {}
        try:
            return max(0.0, float(headers["retry-after"]))
        except (KeyError, TypeError, ValueError):
            continue
    return 0.0


def _is_remote(error: BaseException) -> bool:
    if isinstance(error, OSError):  # includes ConnectionError, TimeoutError and the exceptions of requests and urllib
        return not isinstance(error, _NOT_REMOTE)
    return any(kind.__name__ in _REMOTE for kind in type(error).__mro__)
