"""The user's own functions, "package.module:function" or "file.py:function", and how changed ones come into a run.

A module is found on Python's own path, then in the recipe's folders (`search_in`); a file in those folders. Where both
have a module of that name the name is refused, so nobody gets another function than the one that they mean.

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
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar, cast

from protocols.control.code import CodeSource

_LOADING = threading.Lock()  # services that share a process share its modules

_FOLDERS: list[str] = []  # see `search_in`, the newest first
_OURS: set[str] = set()  # those of them that it put onto Python's path

F = TypeVar("F", bound=Callable[..., object])


class BadCode(Exception):
    """A changed file can't replace the running code; the message says what it raised or lacks."""


class NoSource(BadCode):
    """A module that is no Python file: it can be imported, but not replaced."""


def search_in(folders: Iterable[str]) -> None:
    """Find the user's modules and files in these folders too, in this process and in those of its rules.

    They come after Python's own path, so that a file of the user's can't replace a library's module, and before the
    folders of recipes that the process has loaded earlier.
    """
    own = dict.fromkeys(folders)
    kept = [folder for folder in _FOLDERS if folder not in own]
    _OURS.update(folder for folder in own if folder not in sys.path)
    before = pythons_path()
    _FOLDERS[:] = [*own, *kept]
    sys.path[:] = [*before, *(folder for folder in _FOLDERS if folder in _OURS)]
    importlib.invalidate_caches()  # the file may be younger than the last look into its folder


def here() -> list[str]:
    """The working directory, as a list; none where it was removed while the program ran."""
    try:
        return [str(Path.cwd())]
    except FileNotFoundError:
        return []


def pythons_path() -> list[str]:
    """sys.path without the folders that `search_in` added."""
    return [folder for folder in sys.path if folder not in _OURS]


def module_of(name: str) -> str:
    """The module or file in "package.module:function" and "file.py:function"; "" for a registered name."""
    module, colon, _ = name.partition(":")
    return module if colon else ""


def function_named(name: str, registered: Mapping[str, F], what: str) -> F:
    """A registered function, or the user's that the name says; `what` it is stands in errors.

    Raises LookupError for an unknown name, a module that fails to import (for whatever reason) and a missing function.
    """
    if name in registered:
        return registered[name]
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise LookupError(
            f"{what} {name!r} is none of {', '.join(registered)} and no package.module:function or file.py:function"
        )
    try:
        found = imported(module)
    except BadCode as error:
        raise LookupError(f"{what} {name!r}: {error}") from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise LookupError(f"{what} {name!r}: {_place_of(found)} has no function {attribute!r}")
    return cast(F, function)


def imported(module: str) -> ModuleType:
    """Import a module by its dotted name, or a file. Raises BadCode with what the import raises."""
    try:
        if not is_file(module):
            _refuse_two_files(module)
            return importlib.import_module(module)
        if module not in sys.modules:
            with new_module(source_of(module)) as made:
                pass
            sys.modules[module] = made
        return sys.modules[module]
    except BadCode:
        raise
    except Exception as error:
        raise BadCode(f"importing {module} raised {type(error).__name__}: {error}{_searched(error)}") from error


def is_file(module: str) -> bool:
    """Whether the part of a name before its colon is a file, not a module."""
    return module.endswith(".py")


def source_of(module: str) -> CodeSource:
    """Read a module's file as it is now. Raises BadCode where there is none, or two."""
    return _read(module, _path_of(module))


def _read(module: str, path: str) -> CodeSource:
    try:
        return CodeSource(module, path, Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadCode(f"{path}: can't be read: {error}") from error


def _path_of(module: str) -> str:
    """The file of a module, or the absolute path of a file. Raises BadCode."""
    if is_file(module):
        tried = [Path(folder, module).absolute() for folder in _FOLDERS or [""]]
        if found := next((path for path in tried if path.is_file()), None):
            return str(found)
        raise BadCode(f"there is no file {' or '.join(dict.fromkeys(map(str, tried)))}")
    _refuse_two_files(module)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise BadCode(f"module {module}: {error}{_searched(error)}") from error
    if spec is None:
        raise BadCode(f"No module named {module!r}{_searched(ModuleNotFoundError())}")
    if not spec.origin or not is_file(spec.origin) or not Path(spec.origin).is_file():
        raise NoSource(f"module {module} has no file")
    return spec.origin


def _refuse_two_files(module: str) -> None:
    """Refuse a name that means a file in the recipe's folders and another one before them. Raises BadCode."""
    stem = module.replace(".", os.sep)
    ends = (f"{stem}.py", str(Path(stem, "__init__.py")))
    own = next((path for folder in _FOLDERS for end in ends if (path := Path(folder, end)).is_file()), None)
    if own is None:
        return
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return
    taken = spec.origin if spec is not None else None
    if taken is not None and not (Path(taken).is_file() and own.samefile(taken)):
        raise BadCode(
            f"module {module} is {taken}, and there is {own} too: rename one, or give the file, '{own.name}:function'"
        )


def _searched(error: BaseException) -> str:
    """Where a module was searched, for the error about one that is not there."""
    if not isinstance(error, ModuleNotFoundError) or not _FOLDERS:
        return ""
    return f"; searched on Python's path and in {', '.join(_FOLDERS)}"


def _place_of(module: ModuleType) -> str:
    return f"module {module.__name__} ({module.__file__})" if getattr(module, "__file__", None) else module.__name__


def reread(source: CodeSource) -> CodeSource:
    """The file of a source as it is now. Raises BadCode if it can't be read."""
    return _read(source.module, source.path)


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
