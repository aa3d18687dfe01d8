"""What one process writes to a window, another reads; and nobody else's memory is left behind."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.workers.ranks import Ranks
from workers.generation.shared_buffer import BufferHandle, SharedBuffer


def read(window: BufferHandle) -> list[int]:
    return window.open().tolist()


def test_another_process_reads_what_is_written():
    own = SharedBuffer(16, torch.device("cpu"))
    with Ranks(1) as other:
        for value in (3, 5):  # the reader keeps the window open
            own.memory.fill_(value)
            assert other.call(read, own.window) == [[value] * 16]
    own.close()


def test_a_closed_window_leaves_no_file():
    own = SharedBuffer(16, torch.device("cpu"))
    assert Path(own.window.path).stat().st_size == 16
    own.close()
    assert not Path(own.window.path).exists()
