"""Pretraining text beside the experience (ptx): which of its rows an optimizer step is given.

The rows are a stream of epochs, each a permutation of the file drawn from (seed, epoch) alone, and an optimizer step
has its own stretch of it. So the draw is a function of the step's number: a resumed run has nothing to remember.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from protocols.data.columns import Jagged
from protocols.data.messages import Experience
from workers.data.datasets import DataError, Demonstration, read_rows
from workers.data.hf_folder import context_of, end_of_sequence
from workers.settings import Loss

_NUMBERS = [name for name in Experience.aligned[0] if name not in ("responses", "loss_mask")]  # a float32 a token
_DRAW = 0x707478  # "ptx": a permutation of its own, beside the prompts' of the same seed and epoch


class Drawn(NamedTuple):
    """The rows of one optimizer step (the `Sequences` of workers.training.models)."""

    prompts: Jagged  # int32
    responses: Jagged  # int32


class PretrainingText:
    """N rows of tokens, of which `drawn` gives `rows` at a time.

    The response of a row is what the loss is taken of; of a text that is all but its first token.
    """

    __slots__ = ("_prompts", "_responses", "_rows", "_seed")

    def __init__(self, prompts: Jagged, responses: Jagged, rows: int, seed: int) -> None:
        self._prompts, self._responses = prompts, responses
        self._rows, self._seed = rows, seed

    @classmethod
    def read(
        cls, path: str | Path, model: str | Path, rows: int, seed: int, columns: Mapping[str, str] | None = None
    ) -> PretrainingText:
        """The rows of a file as tokens of a model folder's tokenizer, each ended by its end of sequence.

        Rows are those of supervised fine-tuning, in any of their shapes; one without a prompt is a text, of which
        what is longer than the model's context becomes further rows. Raises DataError for a file that can't be used,
        for a prompt and response that don't fit the context together, and where all texts are empty.
        """
        given = read_rows(path, Demonstration, columns, model)
        tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        end, context = end_of_sequence(model), context_of(model)
        prompts: list[npt.NDArray[np.int32]] = []  # arrays, since a list takes nine times the memory
        responses: list[npt.NDArray[np.int32]] = []
        for number, row in enumerate(given, 1):
            for prompt, response in _pieces(row, tokenizer, end, context, f"{path}: row {number}"):
                prompts.append(np.array(prompt, np.int32))
                responses.append(np.array(response, np.int32))
        if not prompts:
            raise DataError(f"{path}: all of its {len(given)} texts are empty: there is nothing to learn")
        return cls(Jagged.from_rows(prompts, np.int32), Jagged.from_rows(responses, np.int32), rows, seed)

    def __len__(self) -> int:
        return len(self._prompts)

    def drawn(self, step: int) -> Drawn:
        """The rows of an optimizer step, counted from 0 over the whole run."""
        rows = self.places(step)
        return Drawn(self._prompts.take(rows), self._responses.take(rows))

    def places(self, step: int) -> npt.NDArray[np.int64]:
        """Which of the N rows they are, int64 [rows]."""
        epochs, positions = np.divmod(np.arange(step * self._rows, (step + 1) * self._rows), len(self))
        places = np.empty(self._rows, np.int64)
        for epoch in np.unique(epochs).tolist():
            order = np.random.default_rng([self._seed, _DRAW, epoch]).permutation(len(self))
            places[epochs == epoch] = order[positions[epochs == epoch]]
        return places


class ReplicaText:
    """A replica's share of each optimizer step's text, as rows of experience that no policy loss counts."""

    def __init__(self, text: PretrainingText, replica: int, replicas: int) -> None:
        self._text, self._replica, self._replicas = text, replica, replicas
        self._tokens = 1  # of the step that was drawn last, all replicas' together

    def rows(self, step: int) -> Experience:
        """The own rows of an optimizer step, perhaps none: their ids are negative, their loss mask is 0."""
        drawn = self._text.drawn(step)
        self._tokens = len(drawn.responses.values)
        own = np.array_split(np.arange(len(drawn.prompts)), self._replicas)[self._replica]
        responses = drawn.responses.take(own)
        zeros = responses.with_values(np.zeros(len(responses.values), np.float32))
        return Experience(
            sample_ids=-1 - own,
            prompts=drawn.prompts.take(own),
            responses=responses,
            loss_mask=responses.with_values(np.zeros(len(responses.values), np.uint8)),
            **dict.fromkeys(_NUMBERS, zeros),
        )

    def weights(self, batch: Experience) -> Jagged:
        """What each token's cross-entropy is multiplied by, float64: one over the step's tokens in the text, else 0."""
        share = np.where(is_text(batch), 1.0 / self._tokens, 0.0)
        return batch.responses.with_values(np.repeat(share, batch.responses.lengths))


def text_of(loss: Loss, path: str, model: str, seed: int) -> PretrainingText | None:
    """What a policy's loss wants of a file of text, in a model folder's tokens; None where it has no such term.

    Raises as `PretrainingText.read` does.
    """
    return PretrainingText.read(path, model, loss.ptx_rows, seed) if loss.ptx_coefficient else None


def is_text(batch: Experience) -> npt.NDArray[np.bool_]:
    """[N] which rows are a text beside the experience."""
    return batch.sample_ids < 0


def _pieces(
    row: Demonstration, tokenizer: Tokenizer, end: int, context: int, where: str
) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each piece of a row, as tokens. Of a text the first token is the prompt."""
    prompt, response = _encode(tokenizer, row.prompt), [*_encode(tokenizer, row.response), end]
    if not prompt:
        cuts = [response[start : start + context] for start in range(0, len(response), context)]
        return [(cut[:1], cut[1:]) for cut in cuts if len(cut) > 1]
    if len(prompt) + len(response) > context:
        raise DataError(f"{where}: has {len(prompt) + len(response)} tokens, the model's context is {context}")
    return [(prompt, response)]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
