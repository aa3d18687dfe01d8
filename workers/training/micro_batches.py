"""A batch is cut into micro-batches, each a padded tensor that one forward takes.

Rows are right-padded inside a micro-batch, sorted by length, and cut by a budget of padded tokens. The cut depends on
the rows and the budget alone, never on which process runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocols.data.jagged import Jagged
from workers.data.token_rows import Sequences

HOST = torch.device("cpu")


class MicroBatch:
    """Some rows of a batch, right-padded: tokens and mask [n, L] where L is the longest prompt + response.

    `device` is the model's; all tensors are on it.
    """

    __slots__ = ("device", "lengths", "mask", "prompt_lengths", "response_lengths", "rows", "tokens")

    def __init__(self, data: Sequences, rows: npt.NDArray[np.int64], device: torch.device = HOST) -> None:
        self.rows = rows
        self.device = device
        self.prompt_lengths = data.prompts.lengths[rows]
        self.response_lengths = data.responses.lengths[rows]
        self.lengths = self.prompt_lengths + self.response_lengths
        width = int(self.lengths.max())
        tokens = np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            tokens[i, : self.prompt_lengths[i]] = data.prompts[row]
            tokens[i, self.prompt_lengths[i] : self.lengths[i]] = data.responses[row]
        self.tokens = self.tensor(tokens)
        self.mask = self.tensor((np.arange(width) < self.lengths[:, None]).astype(np.int64))

    def before_response(self, outputs: Tensor) -> Tensor:
        """[n, L, ...] -> [sum of T_i, ...]: the outputs at the position before each response token, row by row."""
        row, position = self._response_positions()
        return outputs[row, position - 1]

    def response_tokens(self) -> Tensor:
        """Token ids of all responses, row by row: int64 [sum of T_i]."""
        return self.tokens[self._response_positions()]

    def response_indices(self) -> Tensor:
        """The place of each response token in its response, from 0, row by row: int64 [sum of T_i]."""
        row, position = self._response_positions()
        return position - self.tensor(self.prompt_lengths)[row]

    def at_end(self, outputs: Tensor) -> Tensor:
        """[n, L, ...] -> [n, ...]: the outputs at the last token of each row."""
        return outputs[self.tensor(np.arange(len(self.rows))), self.tensor(self.lengths - 1)]

    def column(self, column: Jagged) -> Tensor:
        """The values of a per-response-token column for these rows: [sum of T_i]. A copy, safe to write to."""
        return self.tensor(np.array(column.take(self.rows).values))

    def tensor(self, values: npt.NDArray) -> Tensor:
        """An array on the model's device."""
        return torch.from_numpy(values).to(self.device)

    def _response_positions(self) -> tuple[Tensor, Tensor]:
        """Row and position of every response token, row by row."""
        if bool((self.prompt_lengths[self.response_lengths > 0] == 0).any()):
            row = int(self.rows[np.flatnonzero((self.prompt_lengths == 0) & (self.response_lengths > 0))[0]])
            raise ValueError(f"row {row} has an empty prompt: nothing stands before its first response token")
        ends = np.cumsum(self.response_lengths)
        starts = self.prompt_lengths - ends + self.response_lengths  # of a row's response, less the tokens before it
        within = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts, self.response_lengths)
        rows = np.repeat(np.arange(len(self.rows)), self.response_lengths)
        return self.tensor(rows), self.tensor(within)


def micro_batches(data: Sequences, budget: int, device: torch.device = HOST, together: int = 1) -> Iterator[MicroBatch]:
    """The micro-batches of some rows, see `micro_batch_rows`."""
    for rows in micro_batch_rows(data, budget, together):
        yield MicroBatch(data, rows, device)


def micro_batch_rows(data: Sequences, budget: int, together: int = 1) -> list[npt.NDArray[np.int64]]:
    """Cut rows so that rows x longest stays within `budget` padded tokens, the longest rows first.

    Rows of similar length come together, so little is computed for padding; rows of equal length, and those inside a
    micro-batch, keep their order. `together` is the number of successive rows that are never separated: a micro-batch
    has at least so many.
    """
    lengths = data.prompts.lengths + data.responses.lengths
    starts = np.arange(0, len(lengths), together)
    longest = np.maximum.reduceat(lengths, starts) if len(starts) else starts
    order = np.argsort(-longest, kind="stable")
    cut: list[npt.NDArray[np.int64]] = []
    while len(order):
        most = max(int(budget // max(longest[order[0]], 1)) // together, 1)
        groups, order = np.sort(order[:most]), order[most:]
        rows = (starts[groups, None] + np.arange(together)).ravel()
        cut.append(rows[rows < len(lengths)])
    return cut


def in_row_order(parts: Sequence[Tensor], data: Sequences, budget: int, *, per_row: bool = False) -> Tensor:
    """Join what was read of each micro-batch of `micro_batch_rows`, one or more, in the order of the rows.

    A part has a value, or several, for each response token, row by row; with `per_row` for each row.
    """
    rows, lengths = np.concatenate(micro_batch_rows(data, budget)), data.responses.lengths
    sizes = np.ones_like(lengths) if per_row else lengths
    starts, ends = np.cumsum(sizes) - sizes, np.cumsum(sizes[rows])
    places = np.arange(ends[-1]) + np.repeat(starts[rows] - ends + sizes[rows], sizes[rows])
    together = torch.cat([*parts])
    ordered = torch.empty_like(together)
    ordered[torch.from_numpy(places).to(together.device)] = together
    return ordered
