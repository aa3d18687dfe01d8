"""The connection to Ray that the runs of a program share, and what it takes from the program's surroundings."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from asyncflow.services.channels.endpoint import ServiceError
from asyncflow.services.runtime import ray_session
from asyncflow.services.runtime.ray_session import environment, import_paths, join, leave, temp_folder

SHORT = "/tmp"


def process() -> int:
    """The id of the process that calls this."""
    return os.getpid()


def test_the_users_own_import_paths_reach_the_actors_and_the_installations_do_not(tmp_path: Path):
    own = tmp_path / "own"
    own.mkdir()
    installed = str(Path(sys.base_prefix, "lib", "python3.11"))
    assert import_paths(["", "own", str(own), installed, "absent"], str(tmp_path)) == [
        str(tmp_path),
        str(own),
        str(own),
    ]


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


@pytest.mark.ray
@pytest.mark.usefixtures("no_ray")
def test_ray_lives_until_its_last_user_leaves_whichever_thread_started_it():
    """The kernel kills Ray's processes when the thread that started them ends."""
    import ray

    first = threading.Thread(target=join, args=("", 1))
    first.start()
    first.join()
    join("")
    leave()
    remote: Any = ray.remote(num_cpus=0)(process)
    assert ray.get(remote.remote(), timeout=60) != process(), "a task needs Ray's processes"
    assert ray_session.PROJECT in environment()["PYTHONPATH"]
    (starter,) = (thread for thread in threading.enumerate() if thread.name == "asyncflow-ray")
    leave()
    assert not ray.is_initialized()
    starter.join(10)
    assert not starter.is_alive()
