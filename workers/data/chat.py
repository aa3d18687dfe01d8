"""Renders conversations as text with the tokenizer's chat template.

A reply is the text that the template adds to the conversation before it. So prompt + response is exactly the template's
text of the whole conversation, up to the end of the reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.data.messages import BadChat, Message, rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTemplate:
    """The chat template of a transformers folder, loaded when the first conversation is rendered."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to the start of the assistant's reply. Raises BadChat."""
        if not messages:
            raise BadChat("the conversation has no message before the reply")
        return self._render(messages, reply_next=True)

    def reply(self, messages: Sequence[Message], answer: Sequence[Message]) -> str:
        """The text that an answer adds to `prompt(messages)`; its last message is the assistant's. Raises BadChat.

        The end-of-sequence token, which tokenization adds, and whatever the template writes after it are cut off.
        """
        if not answer or answer[-1].get("role") != "assistant":
            raise BadChat("the conversation does not end with a message of the assistant")
        prompt, whole = self.prompt(messages), self._render([*messages, *answer], reply_next=False)
        if not whole.startswith(prompt):
            raise BadChat(
                f"the chat template of {self._folder} writes a conversation differently once it is answered: "
                f"{whole[: len(prompt)][-40:]!r} where the prompt ends with {prompt[-40:]!r}"
            )
        reply = whole[len(prompt) :]
        end = str(self._tokenizer.eos_token or "")
        return reply[: reply.rindex(end)] if end and end in reply else reply

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self._folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise BadChat(f"the tokenizer of {self._folder} can't be read: {error}") from error
        if not tokenizer.chat_template:
            raise BadChat(f"the row is a conversation and the tokenizer of {self._folder} has no chat template")
        return tokenizer

    def _render(self, messages: Sequence[Message], *, reply_next: bool) -> str:
        return rendered(messages, lambda given: self._apply(given, reply_next=reply_next))

    def _apply(self, messages: list[dict[str, Any]], *, reply_next: bool) -> str:
        from jinja2 import TemplateError

        tokenizer = self._tokenizer
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_next)
        except (TemplateError, TypeError, ValueError) as error:
            raise BadChat(f"the chat template of {self._folder} refuses it: {error}") from error
        assert isinstance(text, str)
        return text
