"""Frames in shared memory are sealed, read without a copy, and freed with their last descriptor."""

from __future__ import annotations

import fcntl
import gc
import mmap
import multiprocessing
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncflow.services.runtime.shared import SharedFrame, holdings

FRAME = np.arange(256, dtype=np.uint8).repeat(1000)


def memory_of(frame: SharedFrame) -> tuple[int, int]:
    """The frame's device and inode numbers, which identify its memory."""
    status = os.fstat(frame.fd)
    return status.st_dev, status.st_ino


def held_by(process: int | str) -> set[tuple[int, int]]:
    """The memory of all frames that a process has a descriptor of."""
    found: set[tuple[int, int]] = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        try:
            if "asyncflow frame" in str(entry.readlink()):
                status = entry.stat()
                found.add((status.st_dev, status.st_ino))
        except FileNotFoundError:  # the descriptor that lists this folder
            pass
    return found


def test_a_frame_is_read_as_it_was_written():
    frame = SharedFrame.of(FRAME)
    assert frame.nbytes == FRAME.nbytes
    mapped = frame.map()
    assert (mapped == FRAME).all()
    assert mapped.ctypes.data % mmap.PAGESIZE == 0, "so its columns are aligned, too"


def test_nobody_can_change_a_frame_or_cut_it_off_under_a_reader():
    frame = SharedFrame.of(FRAME)
    for change in (
        lambda: os.pwrite(frame.fd, b"x", 0),
        lambda: os.ftruncate(frame.fd, 1),
        lambda: os.ftruncate(frame.fd, 2 * FRAME.nbytes),
        lambda: fcntl.fcntl(frame.fd, fcntl.F_ADD_SEALS, 0),
        lambda: mmap.mmap(frame.fd, FRAME.nbytes),
    ):
        with pytest.raises(PermissionError):
            change()
    with pytest.raises(ValueError, match="read-only"):
        frame.map()[0] = 1


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_tensor_made_of_a_mapping_writes_to_itself_alone():
    frame = SharedFrame.of(FRAME)
    mapped, other = frame.map(), frame.map()
    torch.from_numpy(mapped).zero_()
    assert not mapped.any()
    assert (other == FRAME).all()
    assert (frame.map() == FRAME).all()


def test_memory_is_given_back_with_the_last_frame_or_mapping():
    frame = SharedFrame.of(FRAME)
    known = memory_of(frame)
    mapped = frame.map()
    del frame
    assert (mapped == FRAME).all(), "a mapping needs no frame"
    del mapped
    gc.collect()
    assert known not in held_by("self")


def test_what_is_held_is_counted():
    frames, nbytes = holdings().frames, holdings().nbytes
    held = [SharedFrame.of(FRAME) for _ in range(3)]
    assert (holdings().frames, holdings().nbytes) == (frames + 3, nbytes + 3 * FRAME.nbytes)
    most = holdings().nbytes
    assert holdings().room(most)
    assert holdings().room(most + 1, more=1)
    assert not holdings().room(most, more=1)
    del held[0]
    assert holdings().room(most, more=FRAME.nbytes)
    assert not holdings().room(most, more=FRAME.nbytes + 1)
    held.clear()
    assert (holdings().frames, holdings().nbytes) == (frames, nbytes)


def test_a_mapping_that_outlives_its_frame_is_counted_too():
    frames, nbytes = holdings().frames, holdings().nbytes
    mapped = SharedFrame.of(FRAME).map()
    part = mapped[10:20]
    del mapped
    assert (holdings().frames, holdings().nbytes) == (frames + 1, nbytes + FRAME.nbytes)
    del part
    assert (holdings().frames, holdings().nbytes) == (frames, nbytes)


def test_no_process_fills_its_descriptors_with_frames():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [SharedFrame.of(FRAME) for _ in range(8)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4 * holdings().frames, hard))
        assert holdings().room(1 << 40)
        assert not holdings().room(1 << 40, more=1)
        held.pop()
        assert holdings().room(1 << 40, more=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def unsealed() -> int:
    fd = os.memfd_create("no frame", os.MFD_ALLOW_SEALING)
    os.write(fd, b"changing")
    return fd


def empty() -> int:
    fd = os.memfd_create("no frame", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return fd


@pytest.mark.parametrize(
    "descriptor",
    [
        pytest.param(unsealed, id="memory that its writer can still change"),
        pytest.param(empty, id="nothing"),
        pytest.param(lambda: os.open("/dev/null", os.O_RDONLY), id="another file"),
        pytest.param(lambda: socket.socket().detach(), id="a socket"),
    ],
)
def test_what_is_no_frame_is_refused_and_closed(descriptor: Any):
    fd = descriptor()
    with pytest.raises(ValueError, match="no shared frame"):
        SharedFrame.received(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def send_frame(to: socket.socket) -> None:
    """Run in another process: write a frame, send its descriptor, and wait to be killed."""
    frame = SharedFrame.of(FRAME)
    socket.send_fds(to, [b"."], [frame.fd])
    to.recv(1)


def test_a_frame_outlives_the_process_that_wrote_it_and_is_gone_with_the_one_that_has_it():
    here, there = socket.socketpair()
    process = multiprocessing.get_context("fork").Process(target=send_frame, args=(there,))
    process.start()
    assert process.pid is not None
    _, [fd], _, _ = socket.recv_fds(here, 1, 1)
    frame = SharedFrame.received(fd)
    assert memory_of(frame) in held_by(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (frame.map() == FRAME).all()
    known = memory_of(frame)
    del frame
    assert known not in held_by("self")
