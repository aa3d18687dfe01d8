"""What a server says of its runs, and what a client asks of them: the values of the HTTP interface."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

# queued: it waits for devices; checking: its process reads the recipe; starting: it loads the models.
# killed: its process ended without saying how; refused: its recipe can't be run.
RunState = Literal["queued", "checking", "starting", "running", "finished", "stopped", "failed", "killed", "refused"]
# No process works on the run any more.
OVER: frozenset[RunState] = frozenset({"finished", "stopped", "failed", "killed", "refused"})

Command = Literal["pause", "resume", "checkpoint", "reload", "drain", "cancel"]
Scope = Literal["read", "submit", "admin"]  # each includes those before it

NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"  # of a run, and of a recipe's part of a path
NameOrNone = Annotated[str, Meta(pattern=rf"^$|{NAME_PATTERN}", description="A run's name, which is its folder's")]
Override = Annotated[str, Meta(max_length=4096, description="key.path=value, as `asyncflow run --set` takes it")]


def is_name(text: str) -> bool:
    """Whether a run may have this name. A pattern alone also takes a line feed after it."""
    return re.fullmatch(NAME_PATTERN, text) is not None


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One run, as its folder shows it."""

    name: str  # its folder's
    folder: str
    recipe: str  # the recipe's name
    algorithm: str
    state: RunState
    step: int  # committed steps
    steps: int  # that the recipe asks for
    process: int = 0  # of the controller, while the run is running; 0 also where its lock names none
    host: str = ""  # the machine of that process
    error: str = ""
    reward: float | None = None  # mean of the last step's samples
    seconds_per_step: float | None = None  # mean of the last ten
    evaluations: dict[str, float] = {}  # metric -> its last value
    checkpoint: str = ""  # the newest one's folder; it is not verified here
    samples: dict[str, int] = {}  # "state" or "state: reason" -> count in the ledger


class Submission(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run to start."""

    recipe: str | dict[str, Any]  # the recipe's values; or the name of one in the server's folder `recipes`
    overrides: Annotated[list[Override], Meta(max_length=256)] = []
    run: NameOrNone = ""  # "": named after the recipe and the time


class Restart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a run that is over goes on, from its newest valid checkpoint."""

    overrides: Annotated[list[Override], Meta(max_length=256)] = []
    allow_fresh: bool = False  # from the beginning where all checkpoints are damaged or gone


class Pending(msgspec.Struct, frozen=True):
    """A command that is not done yet: ask again with the same key."""

    key: str


class Answer(msgspec.Struct, frozen=True):
    """The result of a command: of checkpoint the folder, of reload CodeReloaded, of drain and cancel RunEnded."""

    command: Command
    result: Any = None


class Artifact(msgspec.Struct, frozen=True):
    """A file that a run wrote."""

    path: str  # below the run's folder
    nbytes: int
    modified: float  # Unix time


class Sample(msgspec.Struct, frozen=True):
    """A sample's place in the ledger."""

    sample_id: int
    state: str
    reason: str
    attempt: int
    admitted_version: int
    step: int | None  # in which it was trained
    term: int


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a server can do, and what the client's token allows."""

    version: str  # of asyncflow
    scope: Scope
    commands: list[str]
    submits: bool  # false: it serves one run
    devices: int = 0  # that all runs together may use; 0: it starts none


class Endpoint(msgspec.Struct, frozen=True):
    """Where the process of a run answers: endpoint.json in the run folder, readable by its user only."""

    url: str
    token: str
    process: int
