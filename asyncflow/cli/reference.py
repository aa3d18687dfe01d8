"""What `asyncflow settings` prints: the reference as text, JSON or markdown."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from rich import box
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid
from rich.text import Text

from asyncflow.cli.console import Form
from asyncflow.recipe.reference import OF_ALGORITHMS, ROOTS, Table, find, markdown_page, tables, to_markdown


def print_reference(key: str, form: Form, console: Console) -> None:
    """Print a key, a table or a file's settings; without a key a recipe's, and as markdown or JSON all files'."""
    match form:
        case Form.TEXT:
            _print_text(find(key or "recipe"), console)
            if not key:
                console.print("\nSettings of the first two steps of RLHF: asyncflow settings sft, reward-model")
        case Form.JSON:
            found = find(key) if key else {root: tables(root) for root in ROOTS}
            text = msgspec.json.format(msgspec.json.encode(found)).decode()
            console.print(text, markup=False, soft_wrap=True)
        case Form.MARKDOWN:
            text = to_markdown(find(key)) if key else markdown_page()
            console.print(text, markup=False, soft_wrap=True)


def _print_text(found: Iterable[Table], console: Console) -> None:
    for number, table in enumerate(found):
        if number:
            console.print()
        name, of, _ = table.key.partition(OF_ALGORITHMS)
        console.print(Text.assemble((f"[{name}]{of}  " if name else "", "bold"), table.meaning))
        grid = Grid(
            Column("key", no_wrap=True),
            Column("type", ratio=3),
            Column("default", ratio=2, overflow="fold", min_width=8),
            Column("meaning", ratio=6),
            box=box.SIMPLE_HEAD,
            expand=True,
            pad_edge=False,
        )
        for setting in table.settings:
            key = setting.key.removeprefix(f"{name}.")
            grid.add_row(*map(Text, (key, setting.type, setting.default or "required", setting.meaning)))
        console.print(grid)
