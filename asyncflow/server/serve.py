"""The composition root of `asyncflow serve`: records, runs, routes, gate, and the web server around them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec
import uvloop

from asyncflow.client.http import TOKEN
from asyncflow.server.access import check_address, hosts_of, tokens_of
from asyncflow.server.app import application, guarded
from asyncflow.server.capacity import devices_here
from asyncflow.server.catalog import Catalog
from asyncflow.server.gate import RequestLimits
from asyncflow.server.same_user import is_known
from asyncflow.server.uvicorn_server import listen, server_of
from protocols.control.errors import BadInput


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a server is started."""

    root: Path  # of its runs, and of every path in a recipe
    host: str = "127.0.0.1"
    port: int = 8642  # 0: one that is free
    token_file: Path | None = None
    allow_hosts: list[str] = []  # further names by which clients may know it
    allow: list[str] = []  # functions "package.module:function" that recipes may name
    code: list[str] = []  # folders in which these are searched
    devices: int = 0  # that all runs together may use; 0: those of this machine
    limits: RequestLimits = RequestLimits()


def serve(options: Options, told: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. `told` gets the address. Raises BadInput before anything has started.

    The runs go on without the server, and a server that is started again goes on with them.
    """
    tokens = tokens_of(os.environ.get(TOKEN, ""), options.token_file)
    check_address(options.host, tokens)
    if not tokens.scopes and not is_known():
        raise BadInput("this system does not tell who opens a connection: set ASYNCFLOW_TOKEN, or give --token-file")
    root = options.root.absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--root {root}: can't be used: {error.strerror}") from error
    if options.token_file is not None and options.token_file.resolve().is_relative_to(root.resolve()):
        raise BadInput(f"--token-file {options.token_file}: it is below --root {root}, whose files runs read: move it")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")

    code = [str(Path(folder).absolute()) for folder in options.code]

    async def main() -> None:
        catalog = Catalog(root, options.devices or devices_here(), frozenset(options.allow), code)
        with listen(options.host, options.port) as bound:
            hosts = hosts_of(options.host, options.allow_hosts)
            server = server_of(guarded(application(catalog, version("asyncflow")), tokens, hosts, options.limits))
            shown = f"[{options.host}]" if ":" in options.host else options.host
            who = "who has a token" if tokens.scopes else "this user only"
            told(f"serves {root} at http://{shown}:{bound.getsockname()[1]} for {who}")
            starting = asyncio.create_task(catalog.run(), name="starts")
            serving = asyncio.create_task(server.serve(sockets=[bound]), name="http")
            try:
                await asyncio.wait({starting, serving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                server.should_exit = True
                await asyncio.gather(serving, return_exceptions=True)
                starting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await starting
                await catalog.close()

    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again
        uvloop.run(main())
