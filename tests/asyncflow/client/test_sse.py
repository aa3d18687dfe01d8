"""Frames of server-sent events, however the network cuts them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from asyncflow.client.sse import Frame, frames_of

TEXT = "a\u2028b\u2029c\u0085d"  # JSON has them as they are; `str.splitlines` splits there


async def in_pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def test_only_a_line_feed_ends_a_line():
    data = f": heartbeat\n\nid: 7\nevent: Logged\ndata: {TEXT}\n\ndata: cut off".encode()
    for size in (1, 5, len(data)):
        assert [frame async for frame in frames_of(in_pieces(data, size))] == [Frame("Logged", TEXT, "7")]
