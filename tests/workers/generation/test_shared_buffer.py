"""A shared buffer is written by one process and read by another, and its memory is freed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from tests.disks import mounted
from tests.workers.ranks import Ranks
from workers.generation import shared_buffer
from workers.generation.shared_buffer import BufferHandle, SharedBuffer


def read(handle: BufferHandle) -> list[int]:
    return handle.open().tolist()


def test_another_process_reads_what_is_written():
    own = SharedBuffer(16, torch.device("cpu"))
    with Ranks(1) as other:
        for value in (3, 5):  # the reader keeps the buffer open
            own.memory.fill_(value)
            assert other.call(read, own.handle) == [[value] * 16]
    own.close()


def test_a_closed_buffer_leaves_no_file():
    own = SharedBuffer(16, torch.device("cpu"))
    assert Path(own.handle.path).stat().st_size == 16
    own.close()
    assert not Path(own.handle.path).exists()


def test_without_room_in_shared_memory_it_lies_in_the_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As in a container, whose /dev/shm holds 64 MB by default."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with mounted(tmp_path / "shm", 1 << 20) as small:
        monkeypatch.setattr(shared_buffer, "_MEMORY", small)
        own = SharedBuffer(4 << 20, torch.device("cpu"))
        assert Path(own.handle.path).parent == tmp_path
        own.memory.fill_(1)  # a page that is missing would end this process by SIGBUS
        own.close()
        assert list(small.iterdir()) == []


def test_without_room_anywhere_it_is_refused_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with mounted(tmp_path / "shm", 1 << 20) as small:
        monkeypatch.setattr(shared_buffer, "_MEMORY", tmp_path / "none")
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        with pytest.raises(shared_buffer.NoRoom, match=r"4\.2 MB finds no room: .*none: No such file.*1\.0 MB free"):
            SharedBuffer(4 << 20, torch.device("cpu"))
        assert list(small.iterdir()) == []
