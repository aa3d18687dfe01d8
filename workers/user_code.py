"""The user's own functions, "package.module:function", and how a changed file replaces one during a run.

    prepare   execute the source that was sent as a new module beside the running one and check the new function
    switch    put the new function in place of the running one, or drop it

The source is executed, not imported: an import could read stale byte code, or a file that has changed once more.
Modules that the file itself imports are not reloaded.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import linecache
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar, cast

from protocols.control.requests import CodeSource

_LOADING = threading.Lock()  # services that share a process share its modules

F = TypeVar("F", bound=Callable[..., object])


class BadCode(Exception):
    """A changed file can't replace the running code; the message says what it raised or lacks."""


def module_of(name: str) -> str:
    """The module in "package.module:function"; "" for a registered name."""
    module, colon, _ = name.partition(":")
    return module if colon else ""


def function_named(name: str, registered: Mapping[str, F], what: str) -> F:
    """A registered function, or the one that "package.module:function" names; `what` it is stands in errors.

    Raises LookupError for an unknown name, a module that fails to import (for whatever reason) and a missing function.
    """
    if name in registered:
        return registered[name]
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise LookupError(f"{what} {name!r} is none of {', '.join(registered)} and no package.module:function")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise LookupError(f"{what} {name!r}: importing {module} raised {type(error).__name__}: {error}") from error
    if not callable(function):
        raise LookupError(f"{what} {name!r}: module {module} has no function {attribute!r}")
    return cast(F, function)


def source_of(module: str) -> CodeSource:
    """Read a module's file as it is now. Raises BadCode where there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise BadCode(f"module {module}: {error}") from error
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise BadCode(f"module {module} has no file")
    try:
        return CodeSource(module, spec.origin, Path(spec.origin).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadCode(f"{spec.origin}: can't be read: {error}") from error


def digest_of(source: CodeSource) -> str:
    """blake2b-128 of the text."""
    return hashlib.blake2b(source.text.encode(), digest_size=16).hexdigest()


@contextmanager
def new_module(source: CodeSource) -> Iterator[ModuleType]:
    """Execute a source as a new module, which is in sys.modules inside the block only; one at a time in a process.

    Check its functions inside the block: dataclasses and annotations look their module up by name. Raises BadCode with
    what the source raises.
    """
    spec = importlib.util.spec_from_file_location(source.module, source.path)
    assert spec is not None, f"{source.path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    with _LOADING:
        before = sys.modules.get(source.module)
        sys.modules[source.module] = module
        try:
            _execute(source, module)
            yield module
        except SystemExit as error:  # it would end the service that others wait for
            raise BadCode(f"{source.path} raised SystemExit: {error}") from error
        finally:
            if before is None:
                del sys.modules[source.module]
            else:
                sys.modules[source.module] = before


def _execute(source: CodeSource, module: ModuleType) -> None:
    try:
        exec(compile(source.text, source.path, "exec"), module.__dict__)
    except Exception as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise BadCode(f"{source.path}{line} raised {type(error).__name__}: {error}") from error


def function_in(module: ModuleType, name: str) -> Callable[..., object]:
    """Get the function of "package.module:function" from its module. Raises BadCode."""
    attribute = name.partition(":")[2]
    function = getattr(module, attribute, None)
    if not callable(function):
        raise BadCode(f"{module.__file__} has no function {attribute!r}")
    return function


class UserFunction(Generic[F]):
    """The function in use under a name, and the prepared one that may replace it."""

    def __init__(self, name: str, function: F, check: Callable[[F], None]) -> None:
        """`check` raises if a function can't be used."""
        self.current = function
        self._name, self._check = name, check
        self._next: tuple[F, ModuleType] | None = None

    def prepare(self, sources: Sequence[CodeSource]) -> None:
        """Load the next function if its file is among the sources. Raises BadCode; `current` is unchanged."""
        self._next = None
        for source in sources:
            if source.module == module_of(self._name):
                with new_module(source) as module:
                    function: F = function_in(module, self._name)  # type: ignore[assignment]
                    try:
                        self._check(function)
                    except Exception as error:
                        raise BadCode(f"{self._name} failed its check with {type(error).__name__}: {error}") from error
                self._next = function, module

    def switch(self, take: bool) -> None:
        """Use the prepared function from now on, or drop it. Does nothing where none is prepared."""
        if take and self._next is not None:
            self.current, module = self._next
            install(module)
        self._next = None


def install(module: ModuleType) -> None:
    """Put a reloaded module into sys.modules under its name."""
    sys.modules[module.__name__] = module
    linecache.checkcache(module.__file__)
