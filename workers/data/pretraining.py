"""Pretraining text for the ptx loss: which rows each optimizer step gets in addition to its experience.

The rows are a stream of epochs, each a permutation of the file that depends only on (seed, epoch). An optimizer step
takes its own segment of the stream, so its rows are a function of the step's number and need no checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from protocols.data.jagged import Jagged
from protocols.data.messages import Experience
from workers.data.dataset_files import places_of
from workers.data.datasets import DataError, Demonstration, read_rows
from workers.data.hf_folder import config_in
from workers.data.model_config import context_in
from workers.data.overlong import overlong_rows
from workers.data.token_rows import Text, TokenRows, token_pairs, unknown_to_model
from workers.data.tokenizer import Tokenizer, Tokens
from workers.settings import Loss

_FLOAT_COLUMNS = [name for name in Experience.aligned if name not in ("responses", "loss_mask")]
_PTX_STREAM = 0x707478  # "ptx": makes the permutation differ from the prompts' with the same seed and epoch


class PretrainingText:
    """N rows of tokens, of which each optimizer step takes `rows`.

    The loss is taken over the response of a row; the response of a plain text is all but its first token.
    """

    def __init__(self, texts: TokenRows, rows: int, seed: int, left_out: str = "") -> None:
        self._texts, self._rows, self._seed = texts, rows, seed
        self.left_out = left_out  # how many rows are too long and which, "" for none

    @classmethod
    def read(
        cls,
        path: str | Path,
        model: str | Path,
        rows: int,
        seed: int,
        columns: Mapping[str, str] | None = None,
        *,
        skip_overlong: bool = False,
    ) -> PretrainingText:
        """Tokenize the rows of a file with a model folder's tokenizer; each ends with its end token.

        Rows have any of the shapes of supervised fine-tuning. A row without a prompt is a plain text; a text longer
        than the model's context is split into several rows. A prompt and response that exceed the context together are
        left out with `skip_overlong`, else refused. Raises DataError for these, for a file that can't be used, for
        tokens that the model does not have, and if all texts are empty.
        """
        demonstrations = read_rows(path, Demonstration, columns, model)
        tokenizer, context = Tokenizer(model), context_in(config_in(model)) or sys.maxsize
        texts = [Text(row.prompt, row.response, is_chat=row.is_chat) for row in demonstrations]
        prompts: list[Tokens] = []
        responses: list[Tokens] = []
        lengths = np.zeros(len(texts), np.int64)
        for row, (prompt, response) in enumerate(token_pairs(tokenizer, texts)):
            if found := unknown_to_model(tokenizer, (prompt, response)):
                raise DataError(f"{places_of(path, [row])[0]}: {found[1]}")
            lengths[row] = len(prompt) and len(prompt) + len(response)
            if lengths[row] <= context:
                for split_prompt, split_response in _split_to_context(prompt, response, context):
                    prompts.append(split_prompt)
                    responses.append(split_response)
        left_out = ""
        if len(overlong := np.flatnonzero(lengths > context)):
            left_out = f"{overlong_rows(path, overlong, lengths)}: the model's context is {context} tokens"
            if not skip_overlong:
                raise DataError(
                    f"{left_out}; want shorter rows, or data.overlong = 'skip', which leaves these out; a row of text "
                    "alone may be longer"
                )
        if not prompts and left_out:
            raise DataError(f"{path}: no text is left: {left_out}")
        if not prompts:
            raise DataError(f"{path}: all of its {len(demonstrations)} texts are empty: there is nothing to learn")
        return cls(TokenRows.of(prompts, responses), rows, seed, left_out)

    def __len__(self) -> int:
        return len(self._texts)

    def batch(self, step: int) -> TokenRows:
        """The rows of an optimizer step, counted from 0 over the whole run."""
        return self._texts.take(self.row_indices(step))

    def row_indices(self, step: int) -> npt.NDArray[np.int64]:
        """The indices of a step's rows, int64 [rows]."""
        epochs, positions = np.divmod(np.arange(step * self._rows, (step + 1) * self._rows), len(self))
        indices = np.empty(self._rows, np.int64)
        for epoch in np.unique(epochs).tolist():
            order = np.random.default_rng([self._seed, _PTX_STREAM, epoch]).permutation(len(self))
            indices[epochs == epoch] = order[positions[epochs == epoch]]
        return indices


class ReplicaText:
    """A replica's share of each optimizer step's text, as rows of experience that the policy loss ignores."""

    def __init__(self, text: PretrainingText, replica: int, replicas: int) -> None:
        self._text, self._replica, self._replicas = text, replica, replicas
        self._tokens = 1  # response tokens of the current step, over all replicas

    def rows(self, step: int) -> Experience:
        """This replica's rows of an optimizer step, possibly none: their ids are negative, their loss mask is 0."""
        batch = self._text.batch(step)
        self._tokens = len(batch.responses.values)
        own = np.array_split(np.arange(len(batch.prompts)), self._replicas)[self._replica]
        responses = batch.responses.take(own)
        zeros = responses.with_values(np.zeros(len(responses.values), np.float32))
        return Experience(
            sample_ids=-1 - own,
            prompts=batch.prompts.take(own),
            responses=responses,
            loss_mask=responses.with_values(np.zeros(len(responses.values), np.uint8)),
            **dict.fromkeys(_FLOAT_COLUMNS, zeros),
        )

    def weights(self, batch: Experience) -> Jagged:
        """The factor of each token's cross-entropy, float64: 1 / the step's text tokens for text rows, else 0."""
        share = np.where(is_text(batch), 1.0 / self._tokens, 0.0)
        return batch.responses.with_values(np.repeat(share, batch.responses.lengths))


def text_of(loss: Loss, path: str, model: str, seed: int, *, skip_overlong: bool = False) -> PretrainingText | None:
    """The pretraining text of a policy's loss, in a model folder's tokens; None if the loss has no ptx term.

    Raises as `PretrainingText.read` does.
    """
    if not loss.ptx_coefficient:
        return None
    return PretrainingText.read(path, model, loss.ptx_rows, seed, skip_overlong=skip_overlong)


def is_text(batch: Experience) -> npt.NDArray[np.bool_]:
    """[N] which rows are pretraining text."""
    return batch.sample_ids < 0


def _split_to_context(prompt: Tokens, response: Tokens, context: int) -> list[tuple[Tokens, Tokens]]:
    """(prompt, response) of a row, a long text split into several. A text's first token is its prompt."""
    if len(prompt):
        return [(prompt, response)]
    cuts = [response[start : start + context] for start in range(0, len(response), context)]
    return [(cut[:1], cut[1:]) for cut in cuts if len(cut) > 1]
