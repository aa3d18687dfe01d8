"""The run's own code on disk: what of it runs, and how all services take newer files together, or none of them.

    changed files ──PrepareCode──> every service makes and tries them out ──all can──> SwitchCode(take)
                                                                          ──one can't─> SwitchCode(drop), the error

A service that takes a dead one's place is given what runs, whatever stands on disk by then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

from asyncflow.services.channels.endpoint import Endpoint, ServiceError, ServiceGone, ask
from protocols.control.requests import CodeSource, PrepareCode, SwitchCode
from workers.user_code import BadCode, source_of


class UserCode:
    """The modules that a recipe names, each by "package.module:function"."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        """Reads them as they are now: what the services have imported. A module without a file never changes."""
        self._running: dict[str, CodeSource] = {}
        for module in modules:
            with contextlib.suppress(BadCode):
                self._running[module] = source_of(module)

    def changed(self) -> list[CodeSource]:
        """The files that differ from what runs. Blocking. Raises BadCode for one that can't be read."""
        return [source for source in map(source_of, self._running) if source != self._running[source.module]]

    async def give_running(self, service: Endpoint) -> None:
        """Have a service that has just started run what the others run, whatever its files hold by now."""
        given: dict[str, CodeSource] = {}
        while given != self._running:  # the others may have taken newer files meanwhile
            given = self._running
            await ask(service, PrepareCode(list(given.values())))
            await ask(service, SwitchCode(True))

    async def give(self, sources: list[CodeSource], services: Mapping[str, Endpoint]) -> None:
        """Have all services take the files; each of them reads its own out of all.

        Raises BadCode with every service's error where one refuses: then all go on with what they have.
        """
        prepared = dict(services)
        asked = [ask(service, PrepareCode(sources)) for service in prepared.values()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in errors:
            if not isinstance(error, ServiceError):
                raise error
        if not errors:  # before the switch: a service that dies during it has a successor that is given these
            self._running = self._running | {source.module: source for source in sources}
        await self._switch(prepared, take=not errors)
        # Who took a dead one's place after that one had prepared has nothing to take.
        for service in [service for name, service in services.items() if service is not prepared[name]]:
            with contextlib.suppress(ServiceGone):
                await self.give_running(service)
        if errors:
            raise BadCode("; ".join(dict.fromkeys(map(str, errors))))

    @staticmethod
    async def _switch(services: Mapping[str, Endpoint], take: bool) -> None:
        async def switch(service: Endpoint) -> None:
            with contextlib.suppress(ServiceGone):  # its successor is given what runs
                await ask(service, SwitchCode(take))

        async with asyncio.TaskGroup() as group:
            for name, service in services.items():
                group.create_task(switch(service), name=f"switch code of {name}")
