"""Server-sent events as they come over the wire, one frame at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple


class Frame(NamedTuple):
    """One event: the fields that its lines set."""

    kind: str
    data: str
    id: str  # "": it has none


async def frames_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[Frame]:
    """The frames of a stream. Comments, which are heartbeats, and a frame that is cut off are left out."""
    fields: dict[str, str] = {}
    async for whole in _lines_of(chunks):
        line = whole.decode()
        if not line:
            if "data" in fields:
                yield Frame(fields.get("event", ""), fields["data"], fields.get("id", ""))
            fields = {}
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        fields[name] = f"{fields['data']}\n{value}" if name == "data" and name in fields else value


async def _lines_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The whole lines. Only a line feed ends one: JSON may hold every other character at which `str` splits lines."""
    begun: list[bytes] = []
    async for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield b"".join([*begun, end])
            begun = []
        begun.append(rest)
