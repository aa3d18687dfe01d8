"""Reload of the user's code: all services switch to newer files together, or none of them does.

    changed files ──PrepareCode──> every service loads and checks them ──all succeed──> SwitchCode(take)
                                                                       ──one fails────> SwitchCode(drop), its error

The successor of a dead service gets the code that the others run, whatever is on disk by then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence

from asyncflow.services.channels.endpoint import Endpoint, ServiceError, ServiceGone, ask
from protocols.control.code import CodeSource
from protocols.control.requests import PrepareCode, SwitchCode
from workers.user_code import BadCode, reread, source_of


class UserCode:
    """The user's modules that a recipe names by "package.module:function", and the text of them that runs."""

    def __init__(
        self, modules: Sequence[str] = (), check: Callable[[Sequence[CodeSource]], None] = lambda _: None
    ) -> None:
        """Read the files as the services import them. A module without a file never changes.

        `check` raises BadCode, blocking, for changed files that no service has to load to know that they can't be used.
        """
        self.check = check
        self._running: dict[str, CodeSource] = {}
        for module in modules:
            with contextlib.suppress(BadCode):
                self._running[module] = source_of(module)

    def changed(self) -> list[CodeSource]:
        """The files that differ from the running code. Blocking. Raises BadCode for a file that can't be read."""
        return [source for source in map(reread, self._running.values()) if source != self._running[source.module]]

    async def give_running(self, service: Endpoint) -> None:
        """Have a service that has just started run the code of the others, whatever its files contain by now."""
        given: dict[str, CodeSource] = {}
        while given != self._running:  # the others may have switched meanwhile
            given = self._running
            await ask(service, PrepareCode(list(given.values())))
            await ask(service, SwitchCode(True))

    async def give(self, sources: list[CodeSource], services: Mapping[str, Endpoint]) -> None:
        """Have all services switch to the files; each one picks those that it uses.

        Raises BadCode with every service's error if one refuses: then all keep the code that they have.
        """
        prepared = dict(services)
        asked = [ask(service, PrepareCode(sources)) for service in prepared.values()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in errors:
            if not isinstance(error, ServiceError):
                raise error
        if not errors:  # before the switch: the successor of a service that dies during it gets these
            self._running = self._running | {source.module: source for source in sources}
        async with asyncio.TaskGroup() as group:
            for name, service in prepared.items():
                group.create_task(_switch(service, take=not errors), name=f"switch code of {name}")
        # A service that was replaced since it prepared has nothing prepared to switch to.
        for service in [service for name, service in services.items() if service is not prepared[name]]:
            with contextlib.suppress(ServiceGone):
                await self.give_running(service)
        if errors:
            raise BadCode("; ".join(dict.fromkeys(map(str, errors))))


async def _switch(service: Endpoint, take: bool) -> None:
    with contextlib.suppress(ServiceGone):  # its successor gets the running code
        await ask(service, SwitchCode(take))
