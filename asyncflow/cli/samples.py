"""What `asyncflow samples` prints: the generated texts that a run has kept, with their rewards."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncflow.observe.journal import read_lines
from asyncflow.observe.texts import facts_of
from asyncflow.run.run_folder import RECIPE
from protocols.control.errors import BadInput

Sample = dict[str, Any]  # a row of samples.jsonl with its step


def print_samples(
    folder: Path, step: int | None, worst: int, best: int, prompt: str, as_json: bool, console: Console
) -> None:
    """Print a run's samples as a table or as JSON. Raises BadInput where there is none, or none of that step."""
    found = samples_of(folder, step=step, worst=worst, best=best, prompt=prompt)
    if as_json:
        text = msgspec.json.format(msgspec.json.encode(found), indent=2).decode()
        return console.print(text, markup=False, highlight=False, soft_wrap=True)
    table = Table("step", "sample", "prompt and response", "reference", box=box.SIMPLE, show_lines=True, pad_edge=False)
    for row in found:
        facts = Text(facts_of(row).replace("  ", "\n"), style="dim")
        texts = Text(visible(row["prompt"])).append(visible(row["response"]), style="green")
        table.add_row(Text(str(row["step"])), facts, texts, Text(visible(row["reference"])))
    return console.print(table)


def samples_of(folder: Path, *, step: int | None, worst: int, best: int, prompt: str) -> list[Sample]:
    """The samples that a run has kept and that are asked for, by step. Raises BadInput where there is none.

    Args:
        step: of this step alone; None: of the newest, or with another condition of all.
        worst, best: so many with the lowest and the highest rewards; 0 and 0: all.
        prompt: only those whose prompt has this text.
    """
    if not (folder / RECIPE).exists():
        raise BadInput(f"{folder} is no run folder: it has no {RECIPE}")
    try:
        tables = read_lines(folder / "samples.jsonl")
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadInput(f"run {folder}: samples.jsonl can't be read: {error}") from error
    if not tables:
        raise BadInput(
            f"run {folder} has no samples yet: observe.samples.every says at which steps they are kept, 0 at none"
        )
    steps = [table["step"] for table in tables]
    if step is not None and step not in steps:
        raise BadInput(f"run {folder} has no samples of step {step}: of {_listed(steps)}")
    wanted = step if step is not None or worst or best or prompt else steps[-1]
    rows: list[Sample] = [
        {"step": table["step"], **row}
        for table in tables
        if wanted in (None, table["step"])
        for row in table["rows"]
        if prompt in row["prompt"]
    ]
    if not rows:
        raise BadInput(f"run {folder} has no sample whose prompt has {prompt!r}")
    return list(_ends(rows, worst, best)) if worst or best else rows


def visible(text: str) -> str:
    """A text that can't change a terminal: control characters become their pictures, line breaks and tabs stay."""
    return "".join(_picture(c) if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t" else c for c in text)


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"


def _ends(rows: list[Sample], worst: int, best: int) -> Iterator[Sample]:
    """The rows with the lowest rewards, then those with the highest, each once; one that is no number is lowest."""
    ranked = sorted(rows, key=lambda row: (row["reward"] is not None, row["reward"] or 0.0))
    yield from ranked[:worst]
    yield from ranked[max(worst, len(ranked) - best) :] if best else ()


def _listed(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[-8:]))
    return f"..., {shown}" if len(steps) > 8 else shown
