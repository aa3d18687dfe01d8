"""A signal ends a start at once, whatever it waits for."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

from asyncflow.recipe.config import recipe_text
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.pipeline.runs import ASYNCFLOW


def test_an_interrupt_ends_a_start_that_waits_for_a_ray_which_never_answers(make_recipe: MakeRecipe, tmp_path: Path):
    with socket.create_server(("", 0)) as listener:  # Ray takes another address of this machine for 127.0.0.1
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(recipe_text(make_recipe(runtime="ray", ray_address=address, deterministic=False)))
        command = [*ASYNCFLOW, "run", str(recipe), "--folder", str(tmp_path / "run")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            listener.settimeout(60)
            for _ in ("the check of the address", "Ray's own connection"):
                listener.accept()
            process.send_signal(signal.SIGINT)
            out, told = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    assert "interrupted before the run has started" in told.splitlines()
