"""Finds the texts that end a response while its tokens are sampled. Both engines use it, so both stop alike."""

from __future__ import annotations

from collections.abc import Sequence

from protocols.roles import Sampling
from workers.data.tokenizer import Tokenizer
from workers.data.vocabulary import Vocabulary


class StopTexts:
    """The search for stop texts in one response, token by token.

    The text is the tokens' own, with special tokens written out, so "<|im_end|>" is found as well. A text may be spread
    over any number of tokens, and may begin or end inside one. One that is complete before the response has more than
    `min_tokens` tokens does not count.
    """

    @classmethod
    def of(cls, sampling: Sampling, vocabulary: Vocabulary) -> StopTexts | None:
        """The search in one response; None where no text ends it. Raises ValueError without a tokenizer."""
        if not sampling.stop:
            return None
        if vocabulary.tokenizer is None:
            raise ValueError(
                f"stop = {list(sampling.stop)}: the model's folder has no tokenizer.json to find them with"
            )
        return cls(vocabulary.tokenizer, sampling.stop, sampling.min_tokens)

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], min_tokens: int = 0) -> None:
        self._stop, self._min_tokens = tuple(stop), min_tokens
        self._overlap = max((len(text) for text in stop), default=1) - 1
        self._text_of = tokenizer.stream()
        self._tail = ""  # the last characters, in which a text may have begun
        self._tokens = 0

    def completed_by(self, token: int) -> bool:
        """Add the response's next token; whether it completes a stop text."""
        self._tokens += 1
        chunk = self._text_of(token)
        if not chunk:  # the token ends inside a character
            return False
        before, text = len(self._tail), self._tail + chunk
        self._tail = text[-self._overlap :] if self._overlap else ""
        # Only what ends in this chunk: a text that did not count must not be found again in the tail.
        found = any(text.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in self._stop)
        return found and self._tokens > self._min_tokens
