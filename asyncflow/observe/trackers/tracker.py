"""Tracker: what a program that shows runs has to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from protocols.control.samples import ShownSample


class TrackedRun(msgspec.Struct, frozen=True, kw_only=True):
    """The run that a tracker shows. A resumed run has the same values, but for `first_step`."""

    id: str  # unique, 16 hexadecimal digits
    name: str  # of the run's folder
    folder: str  # absolute path of the run's folder
    project: str  # groups runs; MLflow calls it an experiment
    first_step: int  # committed steps from which the run goes on; 0: it is new, or starts again
    recipe: Mapping[str, Any]  # the resolved recipe as a nested table, without [observe]


class Tracker(Protocol):
    """One tracker of one run. Its methods are called one after the other, in a thread of their own.

    They may block and raise: what they raise is reported once, and the record counts as dropped. The keyword arguments
    of its constructor are the options that a recipe may give. Heavy imports belong into its methods: a recipe is
    checked without them.
    """

    def start(self, run: TrackedRun) -> int | None:
        """Show a new run, or go on with the one of the same id. It is called again after a failure, and after `close`
        where the run goes on from an earlier step.

        Returns the last step that stays shown: later ones are logged again. None, where a step can't be taken back: no
        step is logged twice, and the steps of an abandoned lineage stay as they were logged.
        """
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show finite metrics of a committed step ("policy/loss"), or of an evaluation ("evaluation/exact_match")."""
        ...

    def texts(self, step: int, rows: Sequence[ShownSample]) -> None:
        """Show a few samples of a step as text, with their rewards."""
        ...

    def close(self) -> None:
        """Send what is pending and end; also after a start that failed."""
        ...
