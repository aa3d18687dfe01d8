"""Reads the chat templates of a transformers folder and writes conversations with them.

transformers renders, but without its tokenizer: that may be rebuilt by its class instead of being read from the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import msgspec

from workers.data.hf_folder import CHAT_TEMPLATES, json_of, special_tokens_of
from workers.data.messages import BadChat, Message, rendered

_log = logging.getLogger("asyncflow.data")


class TemplateFiles:
    """The chat templates of a folder, read when the first conversation is written."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._warned = False

    def write(self, messages: Sequence[Message], arguments: Mapping[str, Any], *, reply_next: bool) -> str:
        """The text of a conversation; `reply_next` adds the beginning of the assistant's reply.

        A template without tool calls leaves them out, with a warning. Raises BadChat for a folder without a template,
        and for what the template refuses.
        """
        text = rendered(messages, lambda given: self._write(given, arguments, reply_next=reply_next))
        if dropped := [name for message in messages for name in _called(message) if name not in text]:
            self._warn_of_calls(dropped[0])
        return text

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes the tools that it is given; raises BadChat for a folder without a template."""
        tool = {"type": "function", "function": {"name": "look_up", "description": "", "parameters": {}}}
        _ = self._templates
        try:
            return "look_up" in self.write([{"role": "user", "content": "a"}], {"tools": [tool]}, reply_next=True)
        except BadChat:
            return True  # this tool is not one that it can write: a row's own may be

    @cached_property
    def _templates(self) -> dict[str, str]:
        """Name -> template: "default", and others such as "tool_use"."""
        try:
            of_processor = json_of(self.folder / "chat_template.json").get("chat_template")
            given = json_of(self.folder / "tokenizer_config.json").get("chat_template", of_processor)
        except ValueError as error:
            raise BadChat(str(error)) from error
        named = {"default": given} if isinstance(given, str) else {one["name"]: one["template"] for one in given or ()}
        named |= {path.stem: path.read_text("utf-8") for path in self.folder.glob(f"{CHAT_TEMPLATES}/*.jinja")}
        if (path := self.folder / "chat_template.jinja").exists():
            named["default"] = path.read_text("utf-8")
        if not named:
            raise BadChat(
                f"the row is a conversation and the tokenizer of {self.folder} has no chat template: want a model that "
                "was trained on conversations, a chat_template.jinja in its folder, or prompts that are texts"
            )
        return named

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        return special_tokens_of(self.folder)

    def _write(self, messages: list[dict[str, Any]], arguments: Mapping[str, Any], *, reply_next: bool) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        kind = "tool_use" if arguments.get("tools") and "tool_use" in self._templates else "default"
        if kind not in self._templates:
            raise BadChat(f"{self.folder} has no default chat template, only {', '.join(self._templates)}")
        try:
            texts, _ = render_jinja_template(
                conversations=[messages],
                chat_template=self._templates[kind],
                add_generation_prompt=reply_next,
                **{**self._special_tokens, **arguments},
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadChat(f"the chat template of {self.folder} refuses it: {error}") from error
        return str(texts[0])

    def _warn_of_calls(self, name: str) -> None:
        """Warn once: a plain template is used for such data on purpose as often as by mistake."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "the chat template of %s does not write tool calls: that of %r, and all others, are left out of the "
                "text; want a template that writes them if they shall be learned",
                self.folder,
                name,
            )


def tools_of(value: Any, column: str) -> list[Any]:
    """A row's tools, which may be a list as JSON text. Raises BadChat, naming the column."""
    tools = value
    if isinstance(value, str):
        try:
            tools = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise BadChat(f"{column}: want a list of tools, or the list as JSON: {error}") from error
    if not isinstance(tools, list):
        raise BadChat(f"{column}: want a list of tools, each with its name and parameters, got {value!r:.100}")
    return cast(list[Any], tools)


def _called(message: Mapping[str, Any]) -> list[str]:
    """The names of the functions that a message calls."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, dict)]
    return [name for function in functions if isinstance(name := function.get("name"), str)]
