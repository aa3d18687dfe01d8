"""What `asyncflow validate` prints of a recipe that is valid: its data, who runs where, and the estimated memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from asyncflow.planner.costs.devices import GB
from asyncflow.planner.rank_memory import RankMemory, pool_bytes, rank_memory
from asyncflow.recipe.checks import Checked
from asyncflow.recipe.config import Recipe


def print_valid(where: str, checked: Checked, console: Console) -> None:
    """Print that the recipe in the file `where` is valid, and what it comes to."""
    recipe, services = checked.recipe, rank_memory(checked)
    first = f"{where} is valid: {recipe.algorithm}, {recipe.steps} steps of {_batch(recipe)}"
    console.print("\n".join([first, *_data(checked)]), markup=False, soft_wrap=True)
    console.print(_services(services))
    console.print("\n".join(_pools(recipe, services)), markup=False, soft_wrap=True)


def _batch(recipe: Recipe) -> str:
    lag = f"staleness {recipe.staleness}" if recipe.staleness else "synchronous"
    return f"{recipe.prompts_per_step} prompts x {recipe.samples_per_prompt} samples, {lag}"


def _data(checked: Checked) -> Iterator[str]:
    epochs = checked.recipe.steps * checked.recipe.prompts_per_step / len(checked.train)
    yield f"train: {len(checked.train)} prompts of up to {checked.train.longest} tokens, {epochs:.1f} epochs"
    for wanted, source in checked.heldout:
        name = f"eval {wanted.name}" if wanted.name else "eval"
        yield f"{name}: {len(source)} prompts of up to {source.longest} tokens, scored by {', '.join(wanted.scorers)}"


def _services(services: list[RankMemory]) -> RenderableType:
    grid = Table(
        "service", "model", "pool", "ranks", "memory of a rank, estimated", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for one in services:
        ranks = one.parallel if one.ranks > 1 else "1"
        grid.add_row(*map(Text, (one.service, one.model, one.pool or "no device", ranks, _memory(one))))
    return grid


def _memory(one: RankMemory) -> str:
    if one.footprint is None:
        return one.why
    parts = {name: getattr(one.footprint, name) for name in one.footprint.__struct_fields__}
    parts["to generate"] = one.cache_bytes
    sizes = [f"{name} {size_text(size)}" for name, size in parts.items() if size]
    return ", ".join([*sizes, *filter(None, [one.why])])


def _pools(recipe: Recipe, services: list[RankMemory]) -> Iterator[str]:
    for name, pool in recipe.pools.items():
        kind = pool.device or ("GPU" if any(Path("/dev").glob("nvidia[0-9]*")) else "CPU slot")
        need = pool_bytes(services, name)
        yield f"pool {name}: {pool.devices} x {kind}, about {size_text(need)} on each"


def size_text(size: float) -> str:
    """Bytes as text: "3.2 GB", "14 MB"."""
    return f"{size / GB:.1f} GB" if size >= 0.1 * GB else f"{size / 1e6:.0f} MB"
