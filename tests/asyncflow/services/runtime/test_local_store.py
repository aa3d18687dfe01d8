"""The store of one process keeps frames in memory within its budget and on disk beyond it; both read the same."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import numpy as np
import pytest

from asyncflow.services.runtime.local_store import LocalStore, Spilled
from tests.asyncflow.services.rows import held_bytes
from tests.disks import mounted


def frame(value: int, nbytes: int = 1000) -> np.ndarray:
    return np.full(nbytes, value, np.uint8)


async def test_a_frame_is_read_without_a_copy_and_can_not_be_written():
    store, made = LocalStore(), frame(1)
    read = await store.get(store.put(made))
    assert np.shares_memory(read, made)
    with pytest.raises(ValueError, match="read-only"):
        read[0] = 2


async def test_what_exceeds_the_budget_goes_to_a_file_and_reads_the_same():
    store = LocalStore(budget_bytes=2500)
    payloads = [store.put(frame(i)) for i in range(4)]
    assert [isinstance(p, Spilled) for p in payloads] == [False, False, True, True]
    assert held_bytes(store) == 2000
    for i, payload in enumerate(payloads):
        assert np.array_equal(await store.get(payload), frame(i))
    with pytest.raises(ValueError, match="read-only"):
        (await store.get(payloads[3]))[0] = 1
    store.close()


async def test_memory_and_files_are_free_when_nobody_holds_the_frame():
    store = LocalStore(budget_bytes=1000)
    held, spilled = store.put(frame(1)), store.put(frame(2))
    path: Path = spilled.path
    assert path.exists()
    read = await store.get(spilled)
    del held, spilled
    gc.collect()
    assert held_bytes(store) == 0
    assert not path.exists()
    assert np.array_equal(read, frame(2)), "who reads it still has it"
    assert not isinstance(store.put(frame(3)), Spilled)
    store.close()


def test_closing_leaves_nothing_behind():
    store = LocalStore(budget_bytes=0)
    spilled = store.put(frame(1))
    store.close()
    assert not spilled.path.parent.exists()


def test_a_frame_that_fits_nowhere_is_refused_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with mounted(tmp_path / "tmp", 1 << 20) as small:
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        store = LocalStore(budget_bytes=0)
        with pytest.raises(OSError, match=r"rows of 2\.1 MB beyond store_bytes don't fit .* 1\.0 MB are free"):
            store.put(frame(1, 2 << 20))
        store.close()
