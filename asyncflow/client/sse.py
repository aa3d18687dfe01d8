"""Server-sent events as they come over the wire, one frame at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple


class Frame(NamedTuple):
    """One event: the fields that its lines set."""

    kind: str
    data: str
    id: str  # "": it has none


async def frames_of(lines: AsyncIterator[str]) -> AsyncIterator[Frame]:
    """The frames of a stream's lines. Comments, which are heartbeats, and a frame that is cut off are left out."""
    fields: dict[str, str] = {}
    async for line in lines:
        if not line:
            if "data" in fields:
                yield Frame(fields.get("event", ""), fields["data"], fields.get("id", ""))
            fields = {}
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        fields[name] = f"{fields['data']}\n{value}" if name == "data" and name in fields else value
