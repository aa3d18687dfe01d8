"""Tokens, hosts and users."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from asyncflow.recipe.config import BadInput
from asyncflow.server.access import Tokens, check_address, host_in, hosts_of, includes, tokens_of
from asyncflow.server.same_user import is_same_user

TOKEN = "0123456789abcdef"


def token_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "tokens"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_a_token_has_the_scope_of_its_line(tmp_path: Path):
    file = token_file(tmp_path, f"# people\nread {TOKEN}r\n\nsubmit {TOKEN}s\n{TOKEN}a\n")
    tokens = tokens_of(TOKEN, file)
    assert [tokens.scope_of(f"{TOKEN}{end}") for end in ("r", "s", "a", "", "x")] == [
        "read",
        "submit",
        "admin",
        "admin",
        None,
    ]
    assert TOKEN not in repr(tokens)


def test_each_scope_includes_those_before_it():
    assert includes("admin", "read")
    assert includes("submit", "submit")
    assert not includes("read", "submit")


@pytest.mark.parametrize(
    ("text", "mode", "error"),
    [
        (TOKEN, 0o640, "others can read it"),
        ("short", 0o600, "16 printable characters"),
        (f"write {TOKEN}", 0o600, "line 1"),
        ("# none\n", 0o600, "has no token"),
    ],
)
def test_a_file_that_protects_nothing_is_refused(tmp_path: Path, text: str, mode: int, error: str):
    with pytest.raises(BadInput, match=error):
        tokens_of("", token_file(tmp_path, text, mode))


def test_an_address_that_others_reach_needs_a_token():
    with pytest.raises(BadInput, match="there is no token"):
        check_address("0.0.0.0", Tokens())
    check_address("0.0.0.0", tokens_of(TOKEN, None))
    check_address("127.0.0.1", Tokens())


@pytest.mark.parametrize(
    ("header", "host"),
    [("a.example:80", "a.example"), ("A.example", "a.example"), ("[::1]:80", "::1"), ("http://b:1", "b"), ("", "")],
)
def test_a_host_is_compared_without_its_port(header: str, host: str):
    assert host_in(header) == host


def test_a_server_answers_for_its_own_names():
    assert hosts_of("0.0.0.0", ["GPU.example"]) == {"127.0.0.1", "localhost", "::1", "gpu.example"}
    assert "10.0.0.1" in hosts_of("10.0.0.1", [])


def test_a_connection_of_this_user_is_known_and_one_that_is_not_there_is_nobodys():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as made:
        assert is_same_user(made.getsockname(), listener.getsockname())
        assert not is_same_user(("127.0.0.1", 1), listener.getsockname())


def test_a_connection_that_its_process_has_closed_is_nobodys():
    """The kernel lists it as root's, and without an inode."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = socket.create_connection(listener.getsockname())
        peer = made.getsockname()
        made.close()
        assert not is_same_user(peer, listener.getsockname())
