"""The routes over real folders: who may ask, what is answered, and that nothing that is sent makes the server fail."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from litestar import Litestar
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from asyncflow.server.access import hosts_of, tokens_of
from asyncflow.server.app import application, guarded
from asyncflow.server.catalog import Catalog
from asyncflow.server.gate import Gate, RequestLimits
from protocols.control.problems import MEDIA_TYPE, Problem
from tests.asyncflow.server.folders import EVENTS, ended_run

READ, SUBMIT, ADMIN = "reads-0123456789", "submits-0123456789", "administers-0123456789"
NO_CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
HOSTS = hosts_of("127.0.0.1", ["server"])


@pytest.fixture
def cursors(tmp_path: Path) -> list[int]:
    return ended_run(tmp_path)


@pytest.fixture
async def routes(tmp_path: Path, cursors: list[int]) -> AsyncIterator[Litestar]:
    catalog = Catalog(tmp_path, 1, frozenset(), [])
    yield application(catalog, "0")
    await catalog.close()


def gate(routes: Litestar, tmp_path: Path, limits: RequestLimits = RequestLimits()) -> Gate:  # noqa: B008
    file = tmp_path / "tokens"
    file.touch(mode=0o600)
    file.write_text(f"read {READ}\nsubmit {SUBMIT}\nadmin {ADMIN}\n")
    return guarded(routes, tokens_of("", file), HOSTS, limits)


def client(application: Any, token: str = "", **headers: str) -> httpx.AsyncClient:
    if token:
        headers["Authorization"] = f"Bearer {token}"
    transport = httpx.ASGITransport(application, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers)


def problem(answer: httpx.Response) -> Problem:
    assert answer.headers["content-type"].startswith(MEDIA_TYPE), answer.text
    found = msgspec.json.decode(answer.content, type=Problem)
    assert found.status == answer.status_code
    return found


def every_route(routes: Litestar) -> list[tuple[str, str]]:
    """Method and path of every route, from the router's own list, with a value for each parameter."""
    values = {"run": "done", "service": "controller", "path": "recipe.toml", "sample_id": "1"}
    found: list[tuple[str, str]] = []
    for route in routes.routes:
        path = re.sub(r"{(\w+)(:\w+)?}", lambda part: values[part[1]], route.path)
        found += [(method, path) for method in getattr(route, "methods", ["GET"])]
    return found


async def test_every_route_wants_a_token(routes: Litestar, tmp_path: Path):
    paths = every_route(routes)
    assert {"/v1/runs", "/healthz", "/v1/runs/done/events", "/v1/runs/done/cancel"} <= {path for _, path in paths}
    for token in ("", "wrong-0123456789", "Basic"):
        async with client(gate(routes, tmp_path, RequestLimits(failures_per_minute=1000)), token) as http:
            for method, path in paths:
                answer = await http.request(method, path)
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_path_that_does_not_exist_is_guarded_too(routes: Litestar, tmp_path: Path):
    async with client(gate(routes, tmp_path)) as http:
        assert problem(await http.get("/nowhere")).type == "unauthenticated"
    async with client(gate(routes, tmp_path), READ) as http:
        assert problem(await http.get("/nowhere")).type == "not-found"
        assert problem(await http.delete("/v1/runs")).type == "not-allowed"


async def test_a_token_allows_what_its_scope_says(routes: Litestar, tmp_path: Path):
    changes = [(method, path) for method, path in every_route(routes) if method == "POST"]
    async with client(gate(routes, tmp_path), READ) as http:
        for method, path in changes:
            found = problem(await http.request(method, path, json={}))
            assert (found.type, "read" in found.detail) == ("forbidden", True), path
    async with client(gate(routes, tmp_path), SUBMIT) as http:
        denied = {path for method, path in changes if (await http.request(method, path, json={})).status_code == 403}
    assert denied == {"/v1/runs/done/cancel", "/v1/runs/done/reload"}


async def test_other_hosts_and_pages_of_other_sites_are_refused(routes: Litestar, tmp_path: Path):
    async with client(gate(routes, tmp_path), ADMIN) as http:
        assert problem(await http.get("/healthz", headers={"Host": "evil.example"})).type == "wrong-host"
        assert problem(await http.post("/v1/runs", headers={"Origin": "http://evil.example"})).type == "forbidden"
        own = {"Host": "server:8642", "Origin": "http://server:8642"}
        assert (await http.get("/healthz", headers=own)).status_code == 200
        other = own | {"Origin": "http://server:3000"}
        assert problem(await http.get("/healthz", headers=other)).type == "forbidden", "another program's page"


async def test_a_large_a_slow_and_a_deep_body_are_refused(routes: Litestar, tmp_path: Path):
    async def pieces(seconds: float) -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b'{"recipe": "' + b"x" * 50
            await asyncio.sleep(seconds)

    json = {"Content-Type": "application/json"}
    guarded = gate(routes, tmp_path, RequestLimits(body_bytes=100, body_seconds=5.0))
    async with client(guarded, ADMIN) as http:
        assert problem(await http.post("/v1/runs", json={"recipe": "x" * 200})).type == "too-large"
        assert problem(await http.post("/v1/runs", content=pieces(0.0), headers=json)).type == "too-large"
        found = problem(await http.post("/v1/runs", content=b'{"recipe": {"a":' + b"[" * 80, headers=json))
        assert found.type == "bad-input"
    async with client(gate(routes, tmp_path), ADMIN) as http:
        deep = b'{"recipe": {"a":' + b"[" * 50_000
        assert problem(await http.post("/v1/runs", content=deep, headers=json)).type == "bad-input"

    async def late() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [
        (b"host", b"server"),
        (b"authorization", f"Bearer {ADMIN}".encode()),
        (b"content-type", b"application/json"),
    ]
    scope = {"type": "http", "method": "POST", "path": "/v1/runs", "raw_path": b"/v1/runs", "headers": headers}
    scope |= {"query_string": b"", "client": ("127.0.0.1", 1), "server": ("server", 80), "http_version": "1.1"}
    scope |= {"scheme": "http", "root_path": "", "asgi": {"version": "3.0"}, "extensions": {}}
    await gate(routes, tmp_path, RequestLimits(body_seconds=0.05))(scope, late, send)
    assert sent[0]["status"] == 408


async def test_who_asks_too_often_or_guesses_tokens_has_to_wait(routes: Litestar, tmp_path: Path):
    limits = RequestLimits(requests_per_second=0.001, burst=2, failures_per_minute=2)
    guarded = gate(routes, tmp_path, limits)
    async with client(guarded, READ) as http:
        assert [(await http.get("/healthz")).status_code for _ in range(3)] == [200, 200, 429]
    async with client(guarded, "wrong-0123456789") as http:
        assert [(await http.get("/healthz")).status_code for _ in range(3)] == [401, 401, 429]
    async with client(guarded, SUBMIT) as http:
        assert (await http.get("/healthz")).status_code == 200, "a right token doesn't pay for wrong ones"


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "endpoint.json", "%2e%2e/x", "logs", "..%2F..%2Fetc%2Fpasswd", "%00"]
)
async def test_no_file_outside_of_the_run_and_none_of_its_secrets_is_read(routes: Litestar, tmp_path: Path, path: str):
    async with client(gate(routes, tmp_path), ADMIN) as http:
        answer = await http.get(f"/v1/runs/done/artifacts/{path}")
    assert answer.status_code == 404, answer.text


async def test_a_runs_folder_is_read(routes: Litestar, tmp_path: Path):
    async with client(gate(routes, tmp_path), READ) as http:
        (run,) = (await http.get("/v1/runs")).json()
        assert (run["name"], run["state"], run["steps"]) == ("done", "stopped", 2)
        paths = [file["path"] for file in (await http.get("/v1/runs/done/artifacts")).json()]
        assert "recipe.toml" in paths
        assert "endpoint.json" not in paths
        assert (await http.get("/v1/runs/done/artifacts/recipe.toml")).text.startswith("name")
        assert (await http.get("/v1/runs/done/logs/controller", params={"last_bytes": 14})).text == "the last line\n"
        assert (await http.get("/v1/runs/done/recipe")).json()["algorithm"] == "ppo"
        failed = (await http.get("/v1/runs/done/samples", params={"state": "failed"})).json()
        assert [(sample["sample_id"], sample["reason"]) for sample in failed] == [(1, "why")]
        assert (await http.get("/v1/runs/done/samples/2")).json()["state"] == "created"
        assert problem(await http.get("/v1/runs/done/samples/9")).type == "not-found"


async def test_events_come_from_a_cursor_with_their_ids_and_an_end(
    routes: Litestar, tmp_path: Path, cursors: list[int]
):
    async with client(gate(routes, tmp_path), READ) as http:
        whole = (await http.get("/v1/runs/done/events")).text
        rest = (await http.get("/v1/runs/done/events", headers={"Last-Event-ID": str(cursors[2])})).text
        seen = (await http.get("/v1/runs/done/events", params={"cursor": cursors[3]})).text
        wrong = problem(await http.get("/v1/runs/done/events", params={"cursor": 1}))
    assert [int(line[4:]) for line in whole.splitlines() if line.startswith("id: ")] == cursors
    kinds = [type(event).__name__ for event in EVENTS]
    assert [line[7:] for line in whole.splitlines() if line.startswith("event: ")] == [*kinds, "end"]
    assert [line[7:] for line in rest.splitlines() if line.startswith("event: ")] == ["RunEnded", "end"]
    assert [line[7:] for line in seen.splitlines() if line.startswith("event: ")] == ["end"]
    assert (wrong.type, "cursor 1 is none of this run" in wrong.detail) == ("bad-input", True)


async def test_a_line_that_is_not_whole_holds_up_no_reader(routes: Litestar, tmp_path: Path, cursors: list[int]):
    with (tmp_path / "done" / "events.jsonl").open("ab") as file:
        file.write(b'{"at": 1.0, "ev')
    async with client(gate(routes, tmp_path), READ) as http, asyncio.timeout(20):
        rest = (await http.get("/v1/runs/done/events", params={"cursor": cursors[2]})).text
    assert [line[7:] for line in rest.splitlines() if line.startswith("event: ")] == ["RunEnded", "end"]


@pytest.mark.parametrize("override", ["loss={policy='os:system'}", "data={train='/etc/passwd'}"])
async def test_a_run_is_not_started_again_with_what_a_submission_may_not_say(
    routes: Litestar, tmp_path: Path, override: str
):
    async with client(gate(routes, tmp_path), SUBMIT) as http:
        key = {"Idempotency-Key": "the-key-of-it"}
        found = problem(await http.post("/v1/runs/done/start", json={"overrides": [override]}, headers=key))
    assert found.type == "bad-input"
    assert "server" in found.detail


def test_nothing_that_the_openapi_document_allows_or_forbids_makes_the_server_fail(tmp_path: Path):
    """Requests are made from the document, valid ones and others."""
    ended_run(tmp_path)
    guarded = gate(application(Catalog(tmp_path, 0, frozenset(), []), "0"), tmp_path)
    headers = {"Authorization": f"Bearer {ADMIN}", "Host": "server"}
    schema = schemathesis.openapi.from_asgi("/schema/openapi.json", guarded, headers=headers)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) > 15
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=8, deadline=None, suppress_health_check=NO_CHECKS, derandomize=True)
            def send(case: Any) -> None:
                answer = case.call(headers=headers)
                assert answer.status_code < 500, (case.method, case.path, answer.text)

            with contextlib.suppress(Unsatisfiable):  # nothing that it takes could be wrong
                send()
