"""Generated texts with their rewards, for a person to read. A few of a step's samples, never all."""

from __future__ import annotations

import msgspec


class ShownSample(msgspec.Struct, frozen=True, kw_only=True):
    """A trained sample as text. Special tokens are written out; a long text lacks its middle, and says so."""

    sample: int  # sample id
    prompt: str
    response: str
    reference: str  # the right answer of the data row; "" where it has none
    reward: float | None  # None: it is not finite
    parts: dict[str, float] = {}  # of a mixed reward, before their weights
    cost: float | None = None  # None where the algorithm has none
    advantage: float | None  # mean over the trained tokens; None: it is not finite
    versions: tuple[int, int]  # of the weights that sampled its tokens: the oldest and the newest
    tokens: int  # of the response
    cut: bool  # max_tokens ended it


class SampleLine(msgspec.Struct, frozen=True, kw_only=True):
    """The shown samples of one committed step, the lowest reward first: a line of samples.jsonl."""

    step: int
    rows: list[ShownSample]
