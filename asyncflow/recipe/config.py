"""The recipe: a typed TOML file, in one unit (prompts and samples per step).

An unknown key is an error that names the nearest known one. Each table is the settings struct of what it
configures; there is no second list of options anywhere.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import tomli_w

from asyncflow.control.settings import Checkpoints, Deadlines, Evaluation
from asyncflow.dataflow.graph import DataflowError
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.trace import declaration_of
from protocols.layout.topology import Backend
from workers.settings import Failures, Generation, Loss, Model, Optimizer


class BadInput(Exception):
    """Something a user gave can't be used: says what, where, which value, and what to do."""


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prompts in a file or folder of rows (workers.data.dataset_files), and the names of their fields."""

    train: str
    eval: str = ""  # held out; "": no evaluation
    prompt: str = "prompt"
    reference: str = "reference"  # "": rows have none
    pretrain: str = ""  # text of the pretraining loss, as rows of text or of prompt and response; loss.ptx_coefficient


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Devices that its services share, one firing at a time. Pools never overlap."""

    devices: int = 1
    device: str = ""  # a device that `plan` knows, or a calibration's file; "": what is there, GPUs before CPU slots

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"devices = {self.devices}, want 1 or more")


class Placed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a service runs."""

    pool: str
    parallel: str = "1-1-1"  # p-t-d; for a generator p-t
    generation: str = ""  # p-t in which a policy's ranks generate; "": as they train
    backend: Backend = "3d"  # how several ranks share a model
    replicas: int = 1


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a run is told."""

    name: str
    steps: int
    prompts_per_step: int
    data: Data
    models: dict[str, Model]
    algorithm: str = "ppo"  # a name, or "package.module:function"
    samples_per_prompt: int = 1
    staleness: int = 0  # versions; 0 = synchronous, on policy
    seed: int = 0
    deterministic: bool = False  # with staleness 0 and runtime "local": bit-identical to itself
    runtime: Literal["ray", "local"] = "ray"
    ray_address: str = ""  # "" starts a Ray of the run's own
    metrics_host: str = "127.0.0.1"  # of the services' metrics endpoints; "node": each node's own, for a cluster
    folder: str = "runs"  # a run's folder is made below it
    max_refills: int = 4
    threads: int = 1  # of torch, per service
    inline_bytes: int = 8192  # frames up to this size travel inside their message
    store_bytes: int = 0  # memory of the rows in flight, 0: the runtime's choice; what exceeds it spills to disk
    mailbox_rows: int = 0  # of a plain mailbox; 0: one step's samples
    firing_rows: int = 64  # most rows that a stage takes at once
    advantage: dict[str, float | bool | str] = {}  # the batch function's numbers; algorithms may have defaults of these
    loss: Loss = Loss()  # `to_recipe` takes the algorithm's own defaults where the table is silent
    optimizer: Optimizer = Optimizer()
    generation: Generation = Generation()
    failures: Failures = Failures()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    deadlines: Deadlines = Deadlines()
    pools: dict[str, Pool] = msgspec.field(default_factory=lambda: {"main": Pool()})
    placement: dict[str, Placed] = {}
    placed_by: str = ""  # what `placement = "auto"`, or a plan's file, becomes until a check has placed the services
    delays: dict[str, dict[str, float]] = {}  # service -> stage method -> seconds, injected to study timing

    @property
    def samples_per_step(self) -> int:
        """Rows of one batch."""
        return self.prompts_per_step * self.samples_per_prompt


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `a.b=c` overrides. Raises BadInput."""
    try:
        table = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"recipe {path}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {path}: {error}") from error
    for override in overrides:
        _apply(table, override)
    return to_recipe(table, str(path))


def to_recipe(table: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Type a recipe's table, over its algorithm's defaults.

    Raises BadInput, with the nearest known key for an unknown one.
    """
    if isinstance(placed_by := table.get("placement"), str):
        table = {"pools": {}, **table, "placement": {}, "placed_by": placed_by}
    _check_keys(table, Recipe, "", where)
    try:
        recipe = msgspec.convert(_over_the_algorithms_defaults(table, where), Recipe)
    except msgspec.ValidationError as error:
        raise BadInput(f"{where}: {error}") from error
    if not re.fullmatch(r"[\w][\w.-]{0,99}", recipe.name):
        raise BadInput(
            f"{where}: name = {recipe.name!r}: it becomes a folder's name, want letters, digits, '_', '.', '-'"
        )
    for name, least in _LEAST.items():
        value = attrgetter(name)(recipe)
        if not value >= least:  # so written, NaN is refused too
            raise BadInput(f"{where}: {name} = {value}, want {least} or more")
    return _with_fixed_length(recipe)


def _over_the_algorithms_defaults(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table with what its algorithm declares for [loss] and [advantage], wherever it says nothing itself."""
    name = table.get("algorithm", "ppo")
    if not isinstance(name, str):
        return dict(table)  # its type is refused with the others
    try:
        declared = declaration_of(algorithm_named(name))
    except DataflowError as error:
        raise BadInput(f"{where}: {error}") from error
    given = {key: table.get(key, {}) for key in ("loss", "advantage")}
    corrected = _for_stale_samples(declared.loss, given["loss"], table.get("staleness", 0))
    defaults = {"loss": msgspec.to_builtins(declared.loss) | corrected, "advantage": dict(declared.advantage)}
    return {**table, **{k: {**defaults[k], **own} if isinstance(own, Mapping) else own for k, own in given.items()}}


def _for_stale_samples(declared: Loss, own: Any, staleness: Any) -> dict[str, str]:
    """Truncated weights prox / mu where samples may be older than the weights they train.

    Not where the loss divides by mu itself. A recipe that wants another correction, or none, says so.
    """
    old = own.get("old", declared.old) if isinstance(own, Mapping) else declared.old
    stale = isinstance(staleness, int) and staleness > 0
    return {"correction": "tis"} if stale and old == "prox" and not declared.corrects else {}


def _with_fixed_length(recipe: Recipe) -> Recipe:
    """A loss over a fixed length divides by the longest response, where no length is given."""
    loss = recipe.loss
    if loss.aggregation != "sequence-mean-fixed-length" or loss.fixed_length:
        return recipe
    fixed = msgspec.structs.replace(loss, fixed_length=recipe.generation.max_tokens)
    return msgspec.structs.replace(recipe, loss=fixed)


_LEAST = {
    **dict.fromkeys(("steps", "prompts_per_step", "samples_per_prompt", "threads", "firing_rows"), 1),
    **dict.fromkeys(("staleness", "seed", "max_refills", "mailbox_rows", "inline_bytes", "store_bytes"), 0),
    **dict.fromkeys(("generation.max_tokens", "generation.slots", "loss.epochs", "loss.mini_batches"), 1),
    "loss.tokens_per_micro_batch": 1,
    **dict.fromkeys(("generation.max_model_tokens", "evaluation.every", "evaluation.limit"), 0),
    **dict.fromkeys(("checkpoints.every", "checkpoints.keep", "failures.reward_retries", "failures.restarts"), 0),
    **dict.fromkeys(("optimizer.warmup_steps", "optimizer.decay_steps"), 0),
}


def recipe_text(recipe: Recipe) -> str:
    """The recipe as TOML, every value resolved."""
    return tomli_w.dumps(msgspec.to_builtins(recipe))


def _apply(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise BadInput(f"--set {override!r}: want key.path=value")
    try:
        value: Any = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise BadInput(f"--set {override!r}: {parent} is a value, not a table")
    table[last] = value


def _check_keys(table: Mapping[str, Any], kind: type[msgspec.Struct], path: str, where: str) -> None:
    hints = get_type_hints(kind)
    for key, value in table.items():
        if key not in hints:
            raise BadInput(f"{where}: unknown key {path}{key}{nearest(key, hints)}")
        _check_value(value, hints[key], f"{path}{key}.", where)


def _check_value(value: Any, hint: Any, path: str, where: str) -> None:
    if isinstance(value, list) and get_origin(hint) is list:
        for number, inner in enumerate(value):
            _check_value(inner, get_args(hint)[0], f"{path}{number}.", where)
    if not isinstance(value, Mapping):
        return
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        _check_keys(value, hint, path, where)
    elif get_origin(hint) is dict:
        for name, inner in value.items():
            _check_value(inner, get_args(hint)[1], f"{path}{name}.", where)


def nearest(word: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" where something known is close, else the list of what is known."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(words)}"
