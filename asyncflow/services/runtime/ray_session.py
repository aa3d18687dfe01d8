"""This process's connection to Ray, which its runs share: the first of them makes it, the last one ends it.

A Ray that the user's program started with ray.init() is used as it is, and never shut down.

The kernel kills the processes of a Ray on this machine when the thread that started them ends, and the threads of an
event loop's pool end with the loop. Ray is therefore started in a thread of its own, which lasts until it is shut down.
Ray's processes ignore the signals that stop the program (signals.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

from asyncflow.services.channels.endpoint import ServiceError
from asyncflow.services.failpoints import passed_on
from asyncflow.services.runtime.ray_machine import ensure_token, small_shared_memory, temp_folder, why_not_started
from asyncflow.services.runtime.signals import shield_children
from workers.user_code import here, pythons_path

LOCAL = "local"
JOIN_SECONDS = 120.0  # deadline for starting Ray, twice if need be, or for connecting to one
REACH_SECONDS = 10.0  # for the address to accept a connection
STARTS = 2  # Ray gives a node a fixed time to start, which is too short on a busy machine
PROJECT = str(Path(__file__).parents[3])
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))

_lock = threading.Lock()
_runs = 0
_own_job = ""  # Ray's id of the connection that a run here made; "": the user's program made it
_own_address = ""
_inherited: dict[str, str] = {}  # of `environment`: what the processes of our own Ray have from this one
_shut_down = threading.Event()  # ends the thread that started our Ray


async def join_within(seconds: float, joining: Future[list[str]], address: str) -> list[str]:
    """The warnings of `join_in_thread`. Raises what it raises, and ServiceError after a deadline."""
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.shield(asyncio.wrap_future(joining))
    except TimeoutError:
        raise ServiceError(f"{_named(address)} can't be used: no answer within {seconds:g} s") from None


def join_in_thread(address: str, cpus: int | None, store_bytes: int) -> Future[list[str]]:
    """`join` in a thread that nobody has to wait for: what is at an address may never answer."""
    return _in_thread("asyncflow-join-ray", lambda: join(address, cpus, store_bytes))


def starts_ray(address: str) -> bool:
    """Whether `join` would start a Ray on this machine."""
    return not ray.is_initialized() and _resolved(address) == LOCAL


def join(address: str, cpus: int | None = None, store_bytes: int = 0) -> list[str]:
    """Use this process's connection to Ray, and make it if there is none. Blocks. Returns warnings.

    Args:
        address: of a cluster; "" takes RAY_ADDRESS, and without it starts a Ray on this machine.
        cpus, store_bytes: of a Ray that is started; None and 0 are Ray's defaults.

    Raises ServiceError, in one line, if Ray can't be started or reached, or is another one than `address` says.
    """
    global _runs, _own_job, _own_address  # noqa: PLW0603 - a process has one connection to Ray
    with _lock:
        if ray.is_initialized():
            _refuse_other(address)
            warnings = ["store_bytes is not used: Ray was there already"] if store_bytes else []
        else:
            address = _resolved(address)
            warnings = _in_lasting_thread(lambda: _connect(address, cpus, store_bytes))
            _runs, _own_job, _own_address = 0, _job(), address
        _runs += 1
    return warnings


def leave() -> None:
    """Stop using the connection, and end it if no other run here uses it and a run here made it. Blocks."""
    global _runs  # noqa: PLW0603
    with _lock:
        _runs -= 1
        if not _runs and ray.is_initialized() and _is_own():
            ray.shutdown()
            _shut_down.set()


def environment() -> dict[str, str]:
    """Environment variables of an actor's process, so that it imports what this program imports, whoever started Ray.

    A user's ray.init() may have set another working directory, and another PYTHONPATH for its workers. PYTHONPATH comes
    before the Python installation, so it holds only what comes before it in this program, too: else the user's json.py,
    say, would stand in for Python's json, and no process could start. See `later_paths` for the rest.
    """
    own: dict[str, Any] = ray.get_runtime_context().runtime_env or {}
    given: dict[str, str] = own.get("env_vars") or {}
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path(given.get("PYTHONPATH", "")), **passed_on()}


def process_options() -> dict[str, Any]:
    """Ray's options for an actor whose process has this `environment`.

    The processes of a Ray that this program started inherit it. They need none of their own then, for which Ray would
    import itself twice, and could use no process that waits already.
    """
    wanted = environment()
    return {} if _is_own() and wanted == _inherited else {"runtime_env": {"env_vars": wanted}}


def _python_path(given: str) -> str:
    first, _ = import_paths(pythons_path(), "".join(here()))
    return os.pathsep.join(dict.fromkeys([PROJECT, *first, *filter(None, given.split(os.pathsep))]))


def later_paths() -> list[str]:
    """The folders that this program imports from after it has looked into the Python installation."""
    return import_paths(pythons_path(), "".join(here()))[1]


def import_paths(paths: Sequence[str], cwd: str) -> tuple[list[str], list[str]]:
    """The existing entries of sys.path that are the user's own, absolute: before and after the standard library.

    `cwd`: the working directory, "" if there is none.
    """
    installed = [Path(prefix, "lib") for prefix in (sys.prefix, sys.base_prefix)]
    own: tuple[list[str], list[str]] = [], []
    after = False
    for entry in paths:
        path = Path(cwd, entry)  # "" is the working directory
        after = after or path == _STANDARD_LIBRARY
        if path.is_absolute() and path.exists() and not any(path.is_relative_to(folder) for folder in installed):
            own[after].append(str(path))
    return own


def _in_lasting_thread(connect: Callable[[], list[str]]) -> list[str]:
    """What `connect` returns or raises, called in a thread that lasts until `leave` shuts Ray down."""
    global _shut_down  # noqa: PLW0603
    _shut_down.set()  # the program may have shut down an earlier Ray of ours by itself
    _shut_down = ended = threading.Event()

    def shielded() -> list[str]:
        shield_children()
        return connect()

    return _in_thread("asyncflow-ray", shielded, lasting_until=ended).result()


def _in_thread(
    name: str, work: Callable[[], list[str]], lasting_until: threading.Event | None = None
) -> Future[list[str]]:
    """What `work` returns or raises in a thread of its own, which after a success lasts until an event."""
    done: Future[list[str]] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            done.set_exception(error)
            return
        done.set_result(result)
        if lasting_until is not None:
            lasting_until.wait()

    # A daemon, or the interpreter would wait for it at its end, before Ray's own exit handler runs.
    threading.Thread(target=run, name=name, daemon=True).start()
    return done


def _resolved(address: str) -> str:
    return address or os.environ.get("RAY_ADDRESS", "") or LOCAL


def _named(address: str) -> str:
    return "Ray on this machine" if _resolved(address) == LOCAL else f"Ray at {_resolved(address)}"


def _check_reachable(address: str) -> None:
    """Raise ServiceError if nothing listens at host:port, which Ray itself finds out after minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdecimal():  # "auto", or a proxy's ray://host:port
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except OSError as error:
        raise ServiceError(
            f"{_named(address)} can't be used: nothing answers there: {error}; start it, or correct ray_address or "
            f"RAY_ADDRESS"
        ) from error


@contextlib.contextmanager
def _passing_on(python_path: str) -> Iterator[None]:
    """Context in which the processes that this one starts get another PYTHONPATH; with "" the one that there is."""
    before = os.environ.get("PYTHONPATH")
    if python_path:
        os.environ["PYTHONPATH"] = python_path
    try:
        yield
    finally:
        if before is not None:
            os.environ["PYTHONPATH"] = before
        elif python_path:
            del os.environ["PYTHONPATH"]


def _connect(address: str, cpus: int | None, store_bytes: int) -> list[str]:
    global _inherited  # noqa: PLW0603
    local = address == LOCAL
    if not local:
        _check_reachable(address)
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own = {"num_cpus": cpus, "object_store_memory": store_bytes or None, "_temp_dir": f"{temp_folder(os.environ)}/ray"}
    _inherited = {}
    if local:
        ensure_token()
        threads = os.environ.get("OMP_NUM_THREADS", "1")  # Ray sets 1 where the variable is not there
        _inherited = {"OMP_NUM_THREADS": threads, "PYTHONPATH": _python_path("")}
    for attempt in range(1, STARTS + 1):
        try:
            with _passing_on(_inherited.get("PYTHONPATH", "")):
                ray.init(
                    address=address,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **(own if local else {}),
                )
            return small_shared_memory() if local else []
        except Exception as error:  # ray.init raises bare exceptions, too
            ray.shutdown()
            if local and "timed out" in str(error) and attempt < STARTS:
                continue
            known = why_not_started() if local else ""
            raise ServiceError(
                f"{_named(address)} can't be used: {type(error).__name__}: {_one_line(error)}{known and f'; {known}'}"
            ) from error
    raise AssertionError("every attempt returns or raises")


def _refuse_other(address: str) -> None:
    """Raise ServiceError if a run names another Ray than the one that this process is connected to."""
    if not address or (_is_own() and address == _own_address):
        return
    connected = str(ray.get_runtime_context().gcs_address)
    if address.rpartition(":")[2] != connected.rpartition(":")[2]:  # a host has several names: its port is compared
        raise ServiceError(
            f"ray_address = {address!r}: this program is connected to the Ray at {connected} already, and a process "
            f"has one connection: leave ray_address out, or start the run in another process"
        )


def _is_own() -> bool:
    return bool(_own_job) and _job() == _own_job


def _job() -> str:
    return f"{ray.get_runtime_context().gcs_address} {ray.get_runtime_context().get_job_id()}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
