"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.workers.ranks import Worlds

# A deadline an example measures how busy the machine is; a test that hangs is ended by pytest's own timeout.
settings.register_profile("asyncflow", deadline=None)
settings.load_profile("asyncflow")


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    """Ranks that work together, by their number: `worlds[4].call(...)`. A file's tests share them."""
    from tests.workers.ranks import Worlds

    with Worlds() as made:
        yield made
