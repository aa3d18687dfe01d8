"""A shared buffer is written by one process and read by another, and its memory is freed."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.workers.ranks import Ranks
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
