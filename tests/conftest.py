"""Settings and fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.workers.ranks import Worlds

# A deadline per example would measure how busy the machine is; pytest's own timeout ends a test that hangs.
settings.register_profile("asyncflow", deadline=None)
settings.load_profile("asyncflow")


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    """Process groups by size, `worlds[4].call(...)`; the tests of a file share them."""
    from tests.workers.ranks import Worlds

    with Worlds() as made:
        yield made
