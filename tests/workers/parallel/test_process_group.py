"""Processes that share only one address form a process group."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest

from workers.parallel.process_group import connect_store, create_store, join_world

COLLECTIVE_TIMEOUT = timedelta(seconds=60)


def come(pipe: Connection, rank: int, size: int) -> None:
    """Rank 0 creates the store and sends its address to the others; every rank reports its number."""
    if rank == 0:
        meeting, address = create_store("127.0.0.1")
        pipe.send(address)
    else:
        meeting = connect_store(pipe.recv())
    world = join_world(meeting, rank, size, timeout=COLLECTIVE_TIMEOUT)
    said = world.exchange(b"%d" % rank * rank)
    world.leave()
    pipe.send((world.rank, world.device.type, said))


def test_ranks_meet_at_the_first_ones_address_and_hear_each_other():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workers.parallel.process_group"])
    pipes, processes = [], []
    for rank in range(3):
        own, theirs = context.Pipe()
        processes.append(context.Process(target=come, args=(theirs, rank, 3), daemon=True))
        processes[-1].start()
        pipes.append(own)
    address = pipes[0].recv()
    for pipe in pipes[1:]:
        pipe.send(address)
    answers = [pipe.recv() if pipe.poll(COLLECTIVE_TIMEOUT.total_seconds()) else None for pipe in pipes]
    for process in processes:
        process.join(10)
    assert answers == [(rank, "cpu", [b"", b"1", b"22"]) for rank in range(3)]


def test_a_place_where_nobody_is_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workers.parallel.process_group.RENDEZVOUS", timedelta(seconds=1))
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1"):
        connect_store("127.0.0.1:9")
