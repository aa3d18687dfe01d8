"""All services switch to new code together or none does, also a successor that starts during the switch."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from asyncflow.control.user_code import UserCode
from asyncflow.services.channels.endpoint import Payload, ServiceGone
from protocols.control.code import CodeSource
from protocols.control.delivery import Delivery
from protocols.control.notices import Notice
from protocols.control.replies import Done, Refused, Reply
from protocols.control.requests import PrepareCode, Request, SwitchCode
from workers.user_code import BadCode

NAME = "a_users_own"


class Service:
    """A service that executes source text. Its answer to a preparation waits until the test releases it."""

    def __init__(self, name: str, runs: str = "old") -> None:
        self.name, self.runs = name, runs
        self.refuses, self.gone = False, False
        self.asked, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()
        self._next: str | None = None

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        if self.gone:
            raise ServiceGone(f"{self.name}: its process is gone")
        match request:
            case PrepareCode():
                self.asked.set()
                await self.go.wait()
                if self.refuses:
                    return Refused("BadCode: it raised"), []
                (source,) = request.sources
                self._next = source.text
            case SwitchCode():
                if request.take and self._next is not None:
                    self.runs = self._next
                self._next = None
        return Done(), []

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None: ...

    async def notices(self) -> list[Notice]:
        return []


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / f"{NAME}.py"
    path.write_text("old")
    importlib.invalidate_caches()
    yield path
    sys.modules.pop(NAME, None)


def changed(code: UserCode, file: Path) -> list[CodeSource]:
    file.write_text("new")
    return code.changed()


async def test_all_take_the_new_file_and_then_nothing_has_changed(file: Path):
    code, services = UserCode([NAME]), {name: Service(name) for name in ("policy", "reward")}
    await code.give(changed(code, file), services)
    assert [service.runs for service in services.values()] == ["new", "new"]
    assert code.changed() == []


@pytest.mark.parametrize("fault", ["refuses", "gone"])
async def test_none_takes_it_where_one_can_not(file: Path, fault: str):
    code, services = UserCode([NAME]), {name: Service(name) for name in ("policy", "reward")}
    setattr(services["reward"], fault, True)
    with pytest.raises(BadCode, match="reward"):
        await code.give(changed(code, file), services)
    assert [service.runs for service in services.values()] == ["old", "old"]
    assert [source.text for source in code.changed()] == ["new"], "it can be asked for again"


async def test_a_successor_that_came_after_its_service_had_prepared_takes_the_new_file(file: Path):
    code, services = UserCode([NAME]), {name: Service(name) for name in ("policy", "reward")}
    slow, dying = services["policy"], services["reward"]
    slow.go.clear()
    giving = asyncio.create_task(code.give(changed(code, file), services))
    await dying.asked.wait()
    dying.gone = True
    successor = services["reward"] = Service("reward")
    await code.give_running(successor)
    assert successor.runs == "old"
    slow.go.set()
    await giving
    assert [service.runs for service in services.values()] == ["new", "new"]


async def test_a_successor_that_is_given_the_old_file_as_the_others_switch_takes_the_new_one(file: Path):
    code, services = UserCode([NAME]), {name: Service(name) for name in ("policy", "reward")}
    sources = changed(code, file)
    successor = Service("reward")
    successor.go.clear()
    starting = asyncio.create_task(code.give_running(successor))
    await successor.asked.wait()
    await code.give(sources, services)
    successor.go.set()
    await starting
    assert successor.runs == "new"


async def test_a_successor_is_given_what_runs_whatever_stands_on_disk(file: Path):
    code, successor = UserCode([NAME]), Service("reward", runs="")
    file.write_text("half")
    await code.give_running(successor)
    assert successor.runs == "old"
