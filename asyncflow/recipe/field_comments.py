"""Reads what a setting means from its source: the comment beside its field, and the lines of comment right above it."""

from __future__ import annotations

import ast
import inspect
import tokenize
from functools import cache
from io import StringIO
from textwrap import dedent

import msgspec

from workers.settings import Settings


@cache
def comments_of(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Field -> the comment right above it and the one beside it, for inherited fields as well."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Settings) and base is not Settings:
            found |= _own_comments(dedent(inspect.getsource(base)))
    return found


def _own_comments(source: str) -> dict[str, str]:
    lines = source.splitlines()
    above, beside = dict[int, str](), dict[int, str]()
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            alone = not lines[row - 1][:column].strip()
            (above if alone else beside)[row] = token.string.lstrip("# ")
    (struct,) = ast.parse(source).body
    assert isinstance(struct, ast.ClassDef)
    found: dict[str, str] = {}
    for node in struct.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        first = node.lineno
        while first - 1 in above:
            first -= 1
        texts = [above[row] for row in range(first, node.lineno)]
        texts += [beside[row] for row in range(node.lineno, (node.end_lineno or node.lineno) + 1) if row in beside]
        found[node.target.id] = " ".join(texts)
    return found
