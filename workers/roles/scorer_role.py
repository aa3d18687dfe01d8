"""What rewards and costs have in common: a scorer, the code it calls, and the device of its models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from protocols.control.requests import CodeSource
from workers.rewards.scoring import Scorer

if TYPE_CHECKING:
    from workers.training.offload import Offloader


class ScorerRole:
    """One rank of a role whose answers are a scorer's numbers."""

    def __init__(self, scorer: Scorer, offloader: Offloader | None = None) -> None:
        """`offloader`: of the scorer's models; None where it has none."""
        self._scorer = scorer
        self.offloader = offloader

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Make the scorer's rules anew from their files. Raises BadCode."""
        self._scorer.prepare_code(sources)

    def switch_code(self, take: bool) -> None:
        """Take what was prepared from the next row on, or drop it."""
        self._scorer.switch_code(take)

    def close(self) -> None:
        """Free what the scorer holds."""
        self._scorer.close()
