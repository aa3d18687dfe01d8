"""The recipe: a typed TOML file. Sizes are in one unit: prompts and samples per step.

Each table is the settings struct of what it configures, so a key, its default and its bounds stand in one place. An
unknown key is an error that names the nearest known one; a value out of bounds is an error that names the bound.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import tomli_w
from msgspec.inspect import DictType, FloatType, IntType, ListType, StructType, Type, UnionType, type_info

from asyncflow.control.settings import Checkpoints, Deadlines, Evaluation, EvaluationData, Pace
from asyncflow.dataflow.graph import DataflowError
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.trace import declaration_of
from asyncflow.observe.settings import Observe
from protocols.control.errors import BadInput
from protocols.layout.topology import Backend
from workers.settings import (
    Chat,
    Failures,
    FinitePositive,
    Generation,
    Loss,
    Model,
    NonNegativeInt,
    Optimizer,
    PositiveInt,
    Settings,
    violated_bound,
)
from workers.user_code import here, search_in

S = TypeVar("S", bound=Settings)


class TrainSet(Settings, frozen=True):
    """One of several sets of prompts to train on. Each has epochs of its own, in which every row comes once."""

    path: str  # a file or folder of rows
    weight: FinitePositive = 1.0  # its prompts relative to those of the other sets, whatever the number of rows
    prompt: str = ""  # as data.prompt; "": that one
    reference: str = ""  # as data.reference; "": that one


class Data(Settings, frozen=True):
    """Prompts in a file or folder of rows (workers.data.dataset_files), and the names of their fields.

    A dotted name leads into a column: "reward_model.ground_truth", "conversations.1.value".
    """

    # The prompts to train on: a file or folder, or a split of it (folder/train, x.json/train); or sets mixed by weight.
    train: str | list[TrainSet]
    # Held-out rows: a file or folder; or a table of sets by name, each a path or a table of its own; "": no evaluation.
    eval: str | dict[str, str | EvaluationData] = ""
    prompt: str = "prompt"  # name of the field with the prompt, a text or chat messages
    reference: str = "reference"  # name of the field with the right answer, for rules; "": rows have none
    chat: Chat = Chat()  # of the rows of train and eval
    pretrain: str = ""  # text of the pretraining loss (loss.ptx_coefficient): rows of text, or of prompt and response
    # Rows that exceed the policy's context, a prompt together with generation.max_tokens: "skip" leaves them out.
    overlong: Literal["refuse", "skip"] = "refuse"

    @property
    def sets(self) -> list[TrainSet]:
        """The sets of prompts to train on, with their columns' names."""
        given = [TrainSet(self.train)] if isinstance(self.train, str) else self.train
        return [
            msgspec.structs.replace(s, prompt=s.prompt or self.prompt, reference=s.reference or self.reference)
            for s in given
        ]


class Pool(Settings, frozen=True):
    """Devices that its services share, one firing at a time. Pools never overlap."""

    devices: PositiveInt = 1  # GPUs, or shares of a CPU core where there is none
    device: str = ""  # a device that `plan` knows, or a calibration file; "": what is there, GPUs before CPU slots


class Placed(Settings, frozen=True):
    """Where a service runs."""

    pool: str  # a name of [pools]
    parallel: str = "1-1-1"  # p-t-d: pipeline stages, tensor shards, data-parallel replicas; for a generator p-t
    generation: str = ""  # p-t in which a policy's ranks generate; "": as they train
    backend: Backend = "3d"  # what data-parallel ranks divide; a model that only answers has "3d" or "fsdp"
    recompute: bool = False  # in training keep one activation per layer and recompute the others: less memory
    replicas: int = 1  # copies of a service; this version runs one


class Recipe(Settings, frozen=True, kw_only=True):
    """The settings of a run. Relative paths start at the working directory, wherever the recipe's file is."""

    name: str  # of the run; it becomes a folder's name
    steps: PositiveInt  # committed steps at which the run ends
    prompts_per_step: PositiveInt  # a step trains on prompts_per_step x samples_per_prompt samples
    data: Data
    models: dict[str, Model]  # role -> its model; the algorithm says which roles there are
    algorithm: str = "ppo"  # a name, or "package.module:function"
    samples_per_prompt: PositiveInt = 1  # responses to each prompt
    staleness: NonNegativeInt = 0  # versions that generation may be ahead of training; 0: synchronous, on policy
    seed: NonNegativeInt = 0  # of the order of the prompts, of sampling, and of the cut into mini-batches
    deterministic: bool = False  # with staleness 0 and runtime "local": bit-identical to itself
    runtime: Literal["ray", "local"] = "ray"  # "ray": a process for each service; "local": one process for all
    ray_address: str = ""  # "": the run starts its own Ray
    metrics_host: str = "127.0.0.1"  # of the services' metrics endpoints; "node": each node's own, for a cluster
    folder: str = "runs"  # the run's folder is created below it
    # Folders in which your own modules and files ("module:function", "file.py:function") are searched, after Python's
    # own path. Default: the recipe's folder, then the working directory.
    code: list[str] = msgspec.field(default_factory=list)
    max_refills: NonNegativeInt = 4  # rounds of replaced prompts in one step before the run ends
    threads: PositiveInt = 1  # of torch, per service
    inline_bytes: NonNegativeInt = 8192  # frames up to this size travel inside their message
    store_bytes: NonNegativeInt = 0  # memory for rows in flight; 0: the runtime's choice. The rest spills to disk
    mailbox_rows: NonNegativeInt = 0  # of a plain mailbox; 0: one step's samples
    firing_rows: PositiveInt = 64  # most rows that a stage takes at once
    # Keyword arguments of the batch function; the defaults are the algorithm's.
    advantage: dict[str, float | bool | str] = msgspec.field(default_factory=dict)
    loss: Loss = Loss()  # default: the algorithm's, see `to_recipe`
    optimizer: Optimizer = Optimizer()
    generation: Generation = Generation()
    failures: Failures = Failures()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    deadlines: Deadlines = Deadlines()
    observe: Observe = Observe()
    # name -> a pool of devices
    pools: dict[str, Pool] = msgspec.field(default_factory=lambda: {"main": Pool()})
    # service -> where it runs; or "auto", or a plan's file. A service that is left out runs in the first pool.
    placement: dict[str, Placed] = msgspec.field(default_factory=dict)
    placed_by: str = ""  # "auto" or a plan file, given as `placement`; "" once the services are placed
    # service -> stage method -> seconds, injected to study timing
    delays: dict[str, dict[str, float]] = msgspec.field(default_factory=dict)

    @property
    def samples_per_step(self) -> int:
        """Rows of one batch."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def compares_samples(self) -> bool:
        """Whether the algorithm compares the samples of a prompt with each other."""
        return declaration_of(algorithm_named(self.algorithm)).least_samples > 1

    @property
    def pace(self) -> Pace:
        """The sizes of the run."""
        return msgspec.convert(self, Pace, from_attributes=True)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `a.b=c` overrides. Raises BadInput."""
    table = read_table(path, "recipe", overrides)
    table.setdefault("code", list(dict.fromkeys([str(Path(path).absolute().parent), *here()])))
    return to_recipe(table, str(path))


def read_table(path: str | Path, what: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a TOML file and apply `a.b=c` overrides. Raises BadInput, which names `what` the file is."""
    try:
        table = tomllib.loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise BadInput(f"{what} {path}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{what} {path}: {error}") from error
    for override in overrides:
        apply_override(table, override)
    return table


def to_recipe(table: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Convert a recipe's table; [loss] and [advantage] default to what the algorithm declares. Raises BadInput."""
    if not here():
        raise BadInput(f"{where}: the working directory was removed: change to one that exists")
    table = {"code": here(), **with_placed_by(table)}
    if isinstance(table["code"], list):  # before the algorithm is imported; `to_settings` refuses another type
        search_in(str(Path(folder).absolute()) for folder in table["code"] if isinstance(folder, str))
    recipe = to_settings(_with_algorithm_defaults(table, where), Recipe, where)
    if not re.fullmatch(r"[\w][\w.-]{0,99}", recipe.name):
        raise BadInput(
            f"{where}: name = {recipe.name!r}: it becomes a folder's name, want letters, digits, '_', '.', '-'"
        )
    return _with_fixed_length(recipe)


def with_placed_by(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table of a recipe, in which a placement that is "auto" or a plan's file stands under `placed_by`."""
    by = table.get("placement")
    return {"pools": {}, **table, "placement": {}, "placed_by": by} if isinstance(by, str) else table


def to_settings(table: Mapping[str, Any], kind: type[S], where: str) -> S:
    """Convert a table to settings. Raises BadInput, which names the full key of what is unknown or out of bounds."""
    _check_value(table, type_info(kind), "", where)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise BadInput(f"{where}: {error}") from error


def _check_value(value: Any, kind: Type, path: str, where: str) -> None:
    """Refuse unknown keys and values out of bounds; other types are left to msgspec, which names the key as well."""
    kind = _alternative(kind, value)
    if bound := violated_bound(kind, value):
        raise BadInput(f"{where}: {path} = {value}: want {bound}")
    below = f"{path}." if path else ""
    match kind, value:
        case StructType(fields=fields), Mapping():
            known = {field.name: field.type for field in fields}
            for key, inner in value.items():
                if key not in known:
                    raise BadInput(f"{where}: unknown key {below}{key}{nearest(key, known)}")
                _check_value(inner, known[key], f"{below}{key}", where)
        case DictType(value_type=inner_kind), Mapping():
            for key, inner in value.items():
                _check_value(inner, inner_kind, f"{below}{key}", where)
        case ListType(item_type=inner_kind), list():
            for number, inner in enumerate(value):
                _check_value(inner, inner_kind, f"{below}{number}", where)
        case _:
            pass


def _alternative(kind: Type, value: Any) -> Type:
    """The member of a union that a value can be, by its shape; any other type itself."""
    shapes = {Mapping: StructType | DictType, list: ListType, int | float: IntType | FloatType}
    wanted = next((types for shape, types in shapes.items() if isinstance(value, shape)), ())
    return next((t for t in kind.types if isinstance(t, wanted)), kind) if isinstance(kind, UnionType) else kind


def _with_algorithm_defaults(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table, with the algorithm's defaults for the keys of [loss] and [advantage] that it leaves out."""
    name = table.get("algorithm", "ppo")
    if not isinstance(name, str):
        return dict(table)  # `to_settings` refuses its type
    try:
        declared = declaration_of(algorithm_named(name))
    except DataflowError as error:
        raise BadInput(f"{where}: {error}") from error
    given = {key: table.get(key, {}) for key in ("loss", "advantage")}
    corrected = _staleness_correction(declared.loss, given["loss"], table.get("staleness", 0))
    defaults = {"loss": msgspec.to_builtins(declared.loss) | corrected, "advantage": dict(declared.advantage)}
    return {**table, **{k: {**defaults[k], **own} if isinstance(own, Mapping) else own for k, own in given.items()}}


def _staleness_correction(declared: Loss, own: Any, staleness: Any) -> dict[str, str]:
    """Truncated weights prox / mu, as a default, where samples may be older than the weights that they train.

    Not where the loss itself divides by mu, nor where the algorithm declares a correction.
    """
    old = own.get("old", declared.old) if isinstance(own, Mapping) else declared.old
    stale = isinstance(staleness, int) and staleness > 0
    return {"correction": "tis"} if stale and old == "prox" and not declared.corrects else {}


def _with_fixed_length(recipe: Recipe) -> Recipe:
    """Set loss.fixed_length, where the aggregation needs it and the recipe leaves it out, to the longest response."""
    loss = recipe.loss
    if loss.aggregation != "sequence-mean-fixed-length" or loss.fixed_length:
        return recipe
    fixed = msgspec.structs.replace(loss, fixed_length=recipe.generation.max_tokens)
    return msgspec.structs.replace(recipe, loss=fixed)


def recipe_text(recipe: Recipe) -> str:
    """The recipe as TOML, with every default written out."""
    return tomli_w.dumps(msgspec.to_builtins(recipe))


def apply_override(table: dict[str, Any], override: str) -> None:
    """Apply one `--set key.path=value` in place. Raises BadInput."""
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


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: ", did you mean ...?" where a known word is close, else the known words."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(words)}"
