"""What a client of a run is told when something can't be done."""

from __future__ import annotations


class BadInput(Exception):
    """The user gave something that can't be used. The message says what, where, which value, and what to do."""


class RunFailed(Exception):
    """The run can't go on, or is over: the message says what happened, where, and what to try."""
