"""The connection to Ray that the runs of a program share, and what it takes from the program's surroundings."""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from asyncflow.services.channels.endpoint import ServiceError
from asyncflow.services.runtime import ray_session
from asyncflow.services.runtime.ray_session import (
    environment,
    import_paths,
    join,
    join_in_thread,
    join_within,
    later_paths,
    leave,
    process_options,
    temp_folder,
)
from tests.disks import mounted
from workers.user_code import search_in

SHORT = "/tmp"


def process() -> tuple[int, dict[str, str]]:
    """The id of the process that calls this, and its environment."""
    return os.getpid(), dict(os.environ)


def test_the_users_own_import_paths_keep_their_place_before_or_after_pythons_installation(tmp_path: Path):
    for name in ("script", "appended"):
        (tmp_path / name).mkdir()
    script, appended = str(tmp_path / "script"), str(tmp_path / "appended")
    library, packages = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    assert import_paths([packages, "", "script", library, packages, "absent", appended], str(tmp_path)) == (
        [str(tmp_path), script],
        [appended],
    )
    assert import_paths(["script"], str(tmp_path)) == ([script], [])


def test_rays_folder_is_the_first_of_the_told_ones_that_can_hold_sockets(tmp_path: Path):
    long = tmp_path / ("d" * 80)
    long.mkdir()
    assert temp_folder({}) == SHORT
    assert temp_folder({"TMPDIR": "/var/tmp"}) == "/var/tmp"
    assert temp_folder({"TMPDIR": str(long)}) == SHORT
    assert temp_folder({"TMPDIR": "/absent"}) == SHORT
    assert temp_folder({"TMPDIR": "/absent", "RAY_TMPDIR": "/var/tmp"}) == "/var/tmp"
    with pytest.raises(ServiceError, match=r"/absent is no folder; set RAY_TMPDIR to a short writable one"):
        temp_folder({"RAY_TMPDIR": "/absent"})


def test_a_folder_without_room_for_rays_logs_is_no_folder_for_ray():
    with tempfile.TemporaryDirectory(dir=SHORT) as short, mounted(Path(short, "d"), 1 << 20) as small:
        assert temp_folder({"TMPDIR": str(small)}) == SHORT
        with pytest.raises(ServiceError, match=rf"{small} has 1\.0 MB free, and Ray's logs want 16; set RAY_TMPDIR"):
            temp_folder({"RAY_TMPDIR": str(small)})


@pytest.mark.ray
@pytest.mark.usefixtures("ray_started")
def test_folders_of_a_recipe_stand_in_for_no_library_in_an_actors_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A process whose json is the user's json.py can't start, and Ray would try again without end."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "json.py").write_text("")
    search_in([str(tmp_path)])
    assert str(tmp_path) in sys.path
    assert str(tmp_path) not in environment()["PYTHONPATH"].split(os.pathsep)
    sys.path.append(str(tmp_path / ".."))
    assert later_paths()[-1] == str(tmp_path / "..")


@pytest.mark.usefixtures("no_ray")
async def test_an_address_where_no_ray_answers_is_named_within_a_deadline():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(ServiceError, match=f"Ray at {nobody} can't be used: nothing answers there: .*ray_address"):
        await join_within(60.0, join_in_thread(nobody, None, 0), nobody)
    silent: Future[list[str]] = Future()
    with pytest.raises(ServiceError, match=r"Ray at head:6379 can't be used: no answer within 0\.01 s"):
        await join_within(0.01, silent, "head:6379")
    assert not silent.cancelled(), "a connection that comes late is left again"


@pytest.mark.ray
@pytest.mark.usefixtures("no_ray")
def test_ray_lives_until_its_last_user_leaves_whichever_thread_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The kernel kills Ray's processes when the thread that started them ends. They import what this program does."""
    import ray

    first = threading.Thread(target=join, args=("", 1))
    first.start()
    first.join()
    join("")
    leave()
    remote: Any = ray.remote(num_cpus=0)(process)
    other, inherited = ray.get(remote.remote(), timeout=60)
    assert other != os.getpid(), "a task needs Ray's processes"
    assert {name: inherited[name] for name in environment()} == environment()
    assert ray_session.PROJECT in environment()["PYTHONPATH"]
    assert process_options() == {}, "it needs no environment of its own"
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert process_options() == {"runtime_env": {"env_vars": environment()}}, "the program imports from elsewhere now"
    assert str(tmp_path) in environment()["PYTHONPATH"]
    (starter,) = (thread for thread in threading.enumerate() if thread.name == "asyncflow-ray")
    leave()
    assert not ray.is_initialized()
    starter.join(10)
    assert not starter.is_alive()
