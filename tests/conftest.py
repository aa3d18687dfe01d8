"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# A deadline an example measures how busy the machine is; a test that hangs is ended by pytest's own timeout.
settings.register_profile("asyncflow", deadline=None)
settings.load_profile("asyncflow")
