"""The order in which the rows of one or several data sets become prompts: a pure function of (seed, cursor).

Each set is permuted anew in every epoch of its own, and the sets take turns by their weights. So one number, the
cursor, says where a run stands, and no random generator has to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from protocols.data.ids import EVALUATION_EPOCH, place_of, prompt_id


class PromptOrder:
    """Which row each cursor means; a cursor counts admitted prompts from 0.

    Of the first n prompts a set with the share w of the weights has w n, give or take half the number of sets, and
    exactly w n where all of these are whole numbers: 3 in every 4 with the weights 3 and 1. A prompt's id is its row in
    an epoch of its set. Where epochs exceed their bits of an id, ordinals go on counting behind the last row: `total`
    of them for each round of epochs.
    """

    def __init__(self, seed: int, sets: Sequence[npt.NDArray[np.int64]], weights: Sequence[float], total: int) -> None:
        """`sets` has the rows of each set, [N >= 1], and `total` is the number of all rows, with those of no set."""
        self._seed, self._sets, self._total = seed, sets, total
        exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.1 is a tenth
        unit = math.lcm(*(weight.denominator for weight in exact))
        parts = [int(weight * unit) for weight in exact]
        self._turns = [(part, sum(parts[number:])) for number, part in enumerate(parts)]
        self._permutations = [(-1, np.zeros(1, np.int64)) for _ in sets]

    def prompt_at(self, cursor: int) -> int:
        """The id of the prompt at a cursor. Raises ValueError beyond 10^14 prompts."""
        number, before = self._turn(cursor)
        rows = self._sets[number]
        epoch, position = divmod(before, len(rows))
        round_of_epochs, epoch_in_id = divmod(epoch, EVALUATION_EPOCH)
        row = int(rows[self._permutation(number, epoch)[position]])
        return prompt_id(epoch_in_id, row + self._total * round_of_epochs)

    def row_of(self, prompt: int) -> int:
        """The row of a prompt, counted over all sets."""
        return place_of(prompt)[1] % self._total

    def _turn(self, cursor: int) -> tuple[int, int]:
        """Whose turn it is, and how many prompts of this set came before.

        The first set takes its rounded share of the cursors, the next its share of those that are left, and so on.
        """
        for number, (part, left) in enumerate(self._turns[:-1]):
            before = _share(cursor, part, left)
            if _share(cursor + 1, part, left) > before:
                return number, before
            cursor -= before
        return len(self._turns) - 1, cursor

    def _permutation(self, number: int, epoch: int) -> npt.NDArray[np.int64]:
        if self._permutations[number][0] != epoch and len(self._sets[number]) > 1:
            draw = np.random.default_rng([self._seed, epoch, number])
            self._permutations[number] = epoch, draw.permutation(len(self._sets[number]))
        return self._permutations[number][1]


def _share(count: int, part: int, whole: int) -> int:
    """count * part / whole, rounded half up; it grows by 0 or 1 from one count to the next."""
    return (2 * count * part + whole) // (2 * whole)
