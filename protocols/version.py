"""Versions of weights, and the receipt of one that was installed."""

from __future__ import annotations

import msgspec


class Version(msgspec.Struct, frozen=True, order=True):
    """The version of weights after `step` committed steps of lineage `term`, ordered by (term, step)."""

    term: int
    step: int

    def __str__(self) -> str:
        return f"{self.term}.{self.step}"


class InstallReceipt(msgspec.Struct, frozen=True):
    """A receiver's confirmation that it has a version's tensors and answers the probe as the trainer does."""

    version: Version
    tensors: int
    probe_difference: float  # root mean square of the log-prob differences over the probe, nats
    seconds: float
