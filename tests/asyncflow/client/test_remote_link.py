"""A follower goes on over connections that break off."""

from __future__ import annotations

import asyncio

import msgspec

from asyncflow.client.http import HttpConnection
from asyncflow.client.remote_link import RemoteLink
from protocols.control.problems import MEDIA_TYPE, TooMany, problem_of

PATIENCE_SECONDS = 0.5


async def test_a_stream_that_was_open_for_long_is_opened_again_and_so_is_one_that_is_refused_for_now():
    refusal = msgspec.json.encode(problem_of(TooMany("wait")))
    served = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        await reader.readuntil(b"\r\n\r\n")
        served += 1
        status, kind = ("429 Wait", MEDIA_TYPE) if served == 2 else ("200 OK", "text/event-stream")
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: {kind}\r\n\r\n".encode())
        if served == 1:
            writer.write(b": events\n\n")
            await writer.drain()
            await asyncio.sleep(1.2 * PATIENCE_SECONDS)
        else:
            writer.write(refusal if served == 2 else b"event: end\ndata: {}\n\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with HttpConnection(f"http://127.0.0.1:{port}", "") as connection:
            assert [e async for e in RemoteLink(connection, "one", PATIENCE_SECONDS).follow(0)] == []
    assert served == 3
