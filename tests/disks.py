"""File systems of a test's own: small ones, to fill up, and a process to which most of the machine is read-only."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, nbytes: int) -> Iterator[Path]:
    """Context in which a folder is a file system of its own. Skips the test where this user may not mount one."""
    folder.mkdir()
    try:
        mounting = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
        subprocess.run(mounting, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this user may not mount a file system: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def with_read_only(
    folders: Sequence[Path | str], writable: Path, command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command to which some folders are read-only but for one, which is empty; other processes see no change.

    Skips the test where this user may not change what a process sees.
    """
    binds = [f"mount --bind {f} {f}; mount -o remount,bind,ro {f}" for f in map(shlex.quote, map(str, folders))]
    mounting = "; ".join([*binds, f"mount -t tmpfs -o size=64m tmpfs {shlex.quote(str(writable))}"])
    apart = ["unshare", "--mount", "sh", "-ec"]
    try:
        subprocess.run([*apart, mounting], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this user may not mount a file system: {error}")
    return subprocess.run(
        [*apart, f"{mounting}; {shlex.join(command)}"],
        env=os.environ | environment,
        cwd=writable.parent,
        capture_output=True,
        text=True,
        check=False,
    )
