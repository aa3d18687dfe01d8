"""The fixtures stand one folder up, where recipes are tested as well; here is the name that pipeline tests annotate."""

from __future__ import annotations

from tests.asyncflow.conftest import MakeRecipe

__all__ = ["MakeRecipe"]
