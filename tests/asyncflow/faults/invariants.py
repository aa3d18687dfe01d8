"""What must hold of a run's folder after any fault, read from its ledger, its journals and its events."""

from __future__ import annotations

import itertools
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

from asyncflow.control.store.ledger import Ledger
from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import Recipe


def check_finished(folder: Path, recipe: Recipe) -> dict[str, int]:
    """Check the invariants of a run that has made all of its steps; what was counted, for a table."""
    with closing(Ledger(folder / "ledger.db")) as ledger:
        totals, version = ledger.totals(), ledger.version
    assert version == recipe.steps
    assert totals.imbalance == 0, f"created = trained + dropped + failed + live does not hold: {totals}"
    assert totals.live == 0, f"a finished run has live samples: {totals}"
    with closing(sqlite3.connect(folder / "ledger.db")) as database:
        by_step = Counter(step for (step,) in database.execute("SELECT step FROM samples WHERE state = 'trained'"))
    size = recipe.prompts_per_step * recipe.samples_per_prompt
    assert by_step == dict.fromkeys(range(recipe.steps), size), "each step trained a batch, and no sample twice"
    steps = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, recipe.steps + 1)), "each step is reported once"
    assert max(line["staleness_max"] for line in steps) <= recipe.staleness
    return {"samples": totals.created, "trained": totals.trained, "steps": version}


def check_versions(versions: list[tuple[int, int]]) -> None:
    """Check that the published (term, step) only ever rose."""
    assert all(before < after for before, after in itertools.pairwise(versions)), versions
