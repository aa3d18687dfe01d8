"""Services of one process load their models one at a time, while none computes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from asyncflow.services.ranks.shared_process import computing, loading

SECONDS = 20.0


def in_threads(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own, to its end."""
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"


@pytest.mark.parametrize("count", [2, 5])
def test_services_that_start_together_load_in_turn(count: int):
    """Each is inside its own work when it loads, so each would wait for the others' work to end."""
    together, inside, most = threading.Barrier(count), [0], [0]

    def start() -> None:
        with computing():
            together.wait(SECONDS)
            with loading(""):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1
            with computing():  # what it computes with the model, still inside its work
                pass

    in_threads(*[start] * count)
    assert most == [1]


def test_nothing_computes_while_a_model_is_loaded():
    order: list[str] = []
    loads, computes = threading.Event(), threading.Event()

    def load() -> None:
        with loading(""):
            loads.set()
            assert not computes.wait(0.05)
            order.append("loaded")

    def compute() -> None:
        loads.wait(SECONDS)
        with computing():
            computes.set()
            order.append("computed")

    in_threads(load, compute)
    assert order == ["loaded", "computed"]
