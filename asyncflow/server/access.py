"""Who may ask a server, for what: tokens with scopes, and the hosts that it answers for. Pure but for reading files."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

import msgspec

from protocols.control.errors import BadInput
from protocols.control.runs import Scope

SCOPES: tuple[Scope, ...] = get_args(Scope)  # each includes those before it
LEAST_CHARACTERS = 16
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Tokens(msgspec.Struct, frozen=True):
    """The digests of the tokens that a server knows, each with its scope. None: everybody may do everything."""

    scopes: dict[bytes, Scope] = {}

    def scope_of(self, token: str) -> Scope | None:
        """The scope of a token; None for one that is not known.

        It compares digests, all of them and in constant time: the time tells nothing of a token.
        """
        given, found = _digest(token), None
        for digest, scope in self.scopes.items():
            if hmac.compare_digest(digest, given):
                found = scope
        return found

    def name_of(self, token: str) -> str:
        """A name for who sends the token, for limits; it can't be turned back into the token."""
        return _digest(token).hex()[:12]


def includes(given: Scope, needed: Scope) -> bool:
    """Whether a scope allows what needs another."""
    return SCOPES.index(given) >= SCOPES.index(needed)


def tokens_of(token: str, file: Path | None) -> Tokens:
    """The tokens of the environment, which may do everything, and of a file.

    The file is readable by its owner only, and has a token in each line, behind its scope unless that is admin.
    Raises BadInput.
    """
    scopes: dict[bytes, Scope] = {}
    if token:
        scopes[_digest(_checked(token, "ASYNCFLOW_TOKEN"))] = "admin"
    if file is not None:
        for number, line in enumerate(_private_text(file).splitlines(), start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            *scope, word = words
            if len(scope) > 1 or (scope and scope[0] not in SCOPES):
                raise BadInput(f"{file}, line {number}: want a token, or one of {', '.join(SCOPES)} and a token")
            scopes[_digest(_checked(word, f"{file}, line {number}"))] = _scope(scope[0]) if scope else "admin"
        if not scopes:
            raise BadInput(f"{file} has no token: want one in each line")
    return Tokens(scopes)


def check_address(host: str, tokens: Tokens) -> None:
    """Refuse an address that other machines reach where no token protects it. Raises BadInput."""
    if host not in LOOPBACK and not tokens.scopes:
        raise BadInput(
            f"--host {host}: other machines reach it, and there is no token: set ASYNCFLOW_TOKEN, or give --token-file "
            "with a file that only you can read; without a token a server answers on 127.0.0.1"
        )


def hosts_of(host: str, also: Iterable[str]) -> frozenset[str]:
    """The names that a request may give for this server. A web page that lets its name point here has another one."""
    wild = host in ("0.0.0.0", "::", "")
    return frozenset(name.lower() for name in (*LOOPBACK, *(() if wild else (host,)), *also))


def host_in(header: str) -> str:
    """The host of a Host or Origin header, without scheme and port."""
    rest = header.partition("://")[2] or header
    if rest.startswith("["):
        return rest[1:].partition("]")[0].lower()
    return rest.rpartition(":")[0].lower() if rest.count(":") == 1 else rest.lower()


def bearer(headers: Mapping[str, str]) -> str:
    """The token of a request; "" where there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _scope(word: str) -> Scope:
    return next(scope for scope in SCOPES if scope == word)


def _checked(token: str, where: str) -> str:
    if len(token) < LEAST_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise BadInput(f"{where}: want a token of {LEAST_CHARACTERS} printable characters or more, without spaces")
    return token


def _private_text(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            found = os.fstat(opened.fileno())
            if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                mode = stat.S_IMODE(found.st_mode)
                raise BadInput(f"{file}: others can read it (mode {mode:03o}): chmod 600 {file}")
            return opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: can't be read: {error}") from error


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
