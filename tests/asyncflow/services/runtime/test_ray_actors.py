"""The classes of the Ray actors, without Ray: a rank that failed to start can be stopped like any other."""

from __future__ import annotations

import msgspec
import pytest

from asyncflow.services.runtime.ray_actors import RankActor
from tests.asyncflow.services.specs import service


@pytest.mark.timeout(5)
@pytest.mark.parametrize("wire", ["", "a-rank"])
async def test_a_rank_that_never_started_stops_at_once(wire: str):
    await RankActor(msgspec.msgpack.encode(service("reward")), wire, 0).stop()
