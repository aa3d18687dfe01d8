"""`asyncflow serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asyncflow.cli.console import out

Serve = Annotated[
    bool, typer.Option("--serve", help="Answer clients on this machine while it runs; see `asyncflow serve --help`.")
]
ServePort = Annotated[int, typer.Option("--port", help="The port of --serve; 0: one that is free.", min=0, max=65535)]


def serve(
    root: Annotated[Path, typer.Option(help="The folder of the runs, and of all that recipes name.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="0: one that is free.", min=0, max=65535)] = 8642,
    host: Annotated[str, typer.Option(help="An address that others reach needs a token.")] = "127.0.0.1",
    token_file: Annotated[
        Path | None,
        typer.Option(help="A file of mode 600, in each line a token, or read, submit or admin and a token."),
    ] = None,
    allow_host: Annotated[list[str], typer.Option(help="Another name by which clients know this host.")] = [],  # noqa: B006
    allow: Annotated[list[str], typer.Option(help="A package.module:function that recipes may name.")] = [],  # noqa: B006
    code: Annotated[list[str], typer.Option(help="A folder in which these functions are searched.")] = [],  # noqa: B006
    devices: Annotated[
        int, typer.Option(help="Devices that all runs together may use; 0: those of this machine.", min=0)
    ] = 0,
) -> None:
    """Serve runs over HTTP: clients start, follow and drive them. Each is a process that outlives the server.

    The token is that of the environment's ASYNCFLOW_TOKEN, or in --token-file. Without one the server answers only this
    user on this machine. Ctrl-C or SIGTERM ends the server and no run; started again, it goes on with them.
    """
    from asyncflow.server.serve import Options
    from asyncflow.server.serve import serve as serve_runs

    options = Options(
        root=root,
        host=host,
        port=port,
        token_file=token_file,
        allow_hosts=allow_host,
        allow=allow,
        code=code,
        devices=devices,
    )
    serve_runs(options, lambda line: out.print(line, markup=False, soft_wrap=True))
