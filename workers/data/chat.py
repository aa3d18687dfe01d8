"""Renders conversations as text with the tokenizer's chat template: prompts, and the replies that follow them.

A reply is the text that the template adds to the conversation before it. So prompt + response is exactly the template's
text of the whole conversation, up to the end of the reply. Templates of reasoning models need more: see `exchange`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from workers.data.chat_template import TemplateFiles, tools_of
from workers.data.hf_folder import added_tokens_of, special_tokens_of
from workers.data.messages import BadChat, Message
from workers.settings import Chat

_PROBES = ("0", "x")  # replies that begin differently


class ChatTemplate:
    """The chat template of a transformers folder, with the settings of a recipe."""

    def __init__(self, folder: str | Path, settings: Chat = Chat()) -> None:  # noqa: B008 - frozen
        self._folder, self._settings = Path(folder), settings
        self._files = TemplateFiles(folder)

    def takes(self, prompt: str) -> bool:
        """Whether a prompt that is a text becomes the user's message of a conversation. Raises BadChat.

        A text that stays one has no place for a system message.
        """
        if self._settings.system and not self._settings.from_text and prompt:
            raise BadChat(
                "the prompt is a text, and chat.system is for conversations: want chat.from_text = true, which makes "
                "the text the user's message, or no chat.system"
            )
        return self._settings.from_text and bool(prompt)

    def arguments_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The template's arguments for a row of a file: the settings', the row's own, and its tools.

        Raises BadChat for tools that are no list, and where the template leaves tools out.
        """
        arguments: dict[str, Any] = dict(self._settings.arguments)
        if isinstance(own := row.get("chat_template_kwargs"), Mapping):
            arguments |= cast(Mapping[str, Any], own)
        column = self._settings.tools
        if column and (tools := row.get(column)):
            arguments["tools"] = tools_of(tools, column)
            if not self._files.writes_tools:
                raise BadChat(
                    f"the row has {column!r}, and the chat template of {self._folder} writes no tools: want a template "
                    "that does, or chat.tools = '' to leave them out"
                )
        return arguments

    def prompt(self, messages: Sequence[Message], arguments: Mapping[str, Any] | None = None) -> str:
        """The text of a conversation up to the start of the assistant's reply. Raises BadChat."""
        if not messages:
            raise BadChat("the conversation has no message before the reply")
        return self._write(messages, arguments, reply_next=True)

    def exchange(
        self,
        messages: Sequence[Message],
        answers: Sequence[Sequence[Message]],
        arguments: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[str]]:
        """`prompt(messages)`, and the text that each answer adds to it. An answer ends with a message of the assistant.

        The token that ends the turn, which tokenization adds, and whatever the template writes after it are cut off.

        A template may open the reply in the prompt (DeepSeek-R1 writes "<think>") and leave that out of an answered
        conversation. An answer with reasoning then goes on from the opening, which it may repeat or omit. For an answer
        without reasoning the opening is taken from the prompt, as TRL does. Where a template drops the reasoning of an
        answer, the answer's own text is the reply: it is what shall be learned. Raises BadChat.
        """
        prompt = self.prompt(messages, arguments)
        if any(not answer or answer[-1].get("role") != "assistant" for answer in answers):
            raise BadChat("the conversation does not end with a message of the assistant")
        wholes = [self._write([*messages, *answer], arguments, reply_next=False) for answer in answers]
        shared = prompt
        if not all(whole.startswith(prompt) for whole in wholes):
            shared = self._shared(messages, arguments, prompt, wholes)
        opening = prompt[len(shared) :]
        replies = [self._reply(whole, answer, prompt, opening) for whole, answer in zip(wholes, answers, strict=True)]
        if None not in replies:
            return prompt, cast(list[str], replies)
        unopened = [
            self._up_to_end(whole[len(shared) :]) if reply is None else opening + reply
            for whole, reply in zip(wholes, replies, strict=True)
        ]
        return shared, unopened

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that the template writes after the assistant's message; "" where it writes none."""
        answer = "the answer"
        try:
            conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
            _, found, after = self._files.write(conversation, {}, reply_next=False).rpartition(answer)
        except BadChat:  # it writes conversations of another form
            return ""
        special = [token.content for token in added_tokens_of(self._folder) if token.special]
        places = {after.find(token): token for token in special if token in after}
        return places[min(places)] if found and places else ""

    # --- replies

    def _shared(
        self, messages: Sequence[Message], arguments: Mapping[str, Any] | None, prompt: str, wholes: list[str]
    ) -> str:
        """The beginning that the prompt shares with every answered conversation. Raises BadChat for one without it."""
        answered = [
            self._write([*messages, {"role": "assistant", "content": text}], arguments, reply_next=False)
            for text in _PROBES
        ]
        shared = min((_common_start(prompt, text) for text in answered), key=len)
        asked = _letters(str(messages[-1].get("content") or ""))
        if shared and asked in _letters(shared) and all(whole.startswith(shared) for whole in wholes):
            return shared
        whole = next(whole for whole in wholes if not whole.startswith(prompt))
        raise BadChat(
            f"the chat template of {self._folder} writes a conversation differently once it is answered: "
            f"{whole[: len(prompt)][-40:]!r} where the prompt ends with {prompt[-40:]!r}"
        )

    def _reply(self, whole: str, answer: Sequence[Message], prompt: str, opening: str) -> str | None:
        """The text after the prompt; None for an answer that does not go on from the prompt's opening."""
        content = str(answer[-1].get("content") or "")
        if whole.startswith(prompt):
            reply = self._up_to_end(whole[len(prompt) :])
            if _has_all(reply, content):
                return reply
        elif (tag := opening.strip()) and content.lstrip().startswith(tag):
            content = content.lstrip().removeprefix(tag).removeprefix(opening[len(opening.rstrip()) :])
        elif not tag.startswith("<") or tag.replace("<", "</", 1) not in content:
            return None
        if len(answer) > 1:
            raise BadChat(f"the chat template of {self._folder} drops a part of the last of {len(answer)} messages")
        return content

    def _up_to_end(self, reply: str) -> str:
        end = self.end_of_turn or special_tokens_of(self._folder).get("eos_token", "")
        return reply[: reply.rindex(end)] if end and end in reply else reply

    def _write(self, messages: Sequence[Message], arguments: Mapping[str, Any] | None, *, reply_next: bool) -> str:
        given, system = list(messages), self._settings.system
        if system and not any(message.get("role") in ("system", "developer") for message in given):
            given = [{"role": "system", "content": system}, *given]
        return self._files.write(given, arguments or self._settings.arguments, reply_next=reply_next)


def _common_start(first: str, second: str) -> str:
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _letters(text: str) -> str:
    """A text without white space, which templates trim and add."""
    return "".join(text.split())


def _has_all(reply: str, content: str) -> bool:
    """Whether a reply has all of a content but its tags, which a template may write in another form."""
    letters = _letters(reply)
    return all(_letters(part) in letters for part in re.split(r"<[^<>]*>", content))
