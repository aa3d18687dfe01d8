"""The application of a server: routes, scopes, problems and the OpenAPI document, behind the gate."""

from __future__ import annotations

import logging
from typing import Any, cast

from litestar import Litestar, Request, Response
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.di import Provide
from litestar.exceptions import HTTPException, ValidationException
from litestar.handlers import BaseRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from asyncflow.server.access import Tokens, includes
from asyncflow.server.event_stream import Feeds
from asyncflow.server.gate import SCOPE, Application, Gate, RequestLimits
from asyncflow.server.routes import ROUTES
from asyncflow.server.runs import Runs
from protocols.control.problems import MEDIA_TYPE, Forbidden, Problem, Unavailable, problem_of, problem_of_status

_log = logging.getLogger(__name__)


def application(runs: Runs, version: str) -> Litestar:
    """The routes over some runs. It does not know who asks: see `guarded`."""
    feeds = Feeds()
    return Litestar(
        route_handlers=ROUTES,
        guards=[_needs_scope],
        dependencies={
            "runs": Provide(lambda: runs, sync_to_thread=False),
            "feeds": Provide(lambda: feeds, sync_to_thread=False),
        },
        exception_handlers={Exception: _problem},
        openapi_config=OpenAPIConfig(
            title="asyncflow", version=version, path="/schema", render_plugins=[JsonRenderPlugin()]
        ),
        logging_config=None,
        debug=False,
    )


def guarded(
    application: Litestar,
    tokens: Tokens,
    hosts: frozenset[str],
    limits: RequestLimits = RequestLimits(),  # noqa: B008 - it is frozen
) -> Gate:
    """The application for those who may ask."""
    return Gate(cast(Application, application), tokens, hosts, limits)


def _needs_scope(connection: ASGIConnection[Any, Any, Any, State], handler: BaseRouteHandler) -> None:
    """Reading needs "read"; every other route says what it needs, or needs everything."""
    reads = connection.scope.get("method") in ("GET", "HEAD", "OPTIONS")
    needed = handler.opt.get("needs", "read" if reads else "admin")
    given = connection.scope[SCOPE]  # type: ignore[literal-required]
    if not includes(given, needed):
        raise Forbidden(f"it needs a token with the scope {needed!r}; this one has {given!r}")


def _problem(request: Request[Any, Any, State], error: Exception) -> Response[Problem]:
    headers: dict[str, str] = {}
    if isinstance(error, ValidationException):
        found = problem_of_status(422, _text_of(error), request.url.path)
    elif isinstance(error, HTTPException):
        found = problem_of_status(error.status_code, error.detail, request.url.path)
        headers = {k: v for k, v in (error.headers or {}).items() if k.lower() == "allow"}
    elif isinstance(error, RecursionError):  # of the decoder
        found = problem_of_status(422, "the body is nested too deeply", request.url.path)
    else:
        found = problem_of(error, request.url.path)
    if found.status == 500:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    if isinstance(error, Unavailable):
        headers["Retry-After"] = "1"
    return Response(found, status_code=found.status, media_type=MEDIA_TYPE, headers=headers)


def _text_of(error: ValidationException) -> str:
    """What is wrong with which parameter."""
    extra = error.extra if isinstance(error.extra, list) else []
    parts = [f"{e.get('key', 'the body')}: {e.get('message', '')}" for e in extra if isinstance(e, dict)]
    return "; ".join(parts) or error.detail
