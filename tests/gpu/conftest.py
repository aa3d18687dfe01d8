"""Fixtures of the tests that measure on a device: which devices the machine has, and how figures are reported.

The tests take a kind of device: on the CPU they run small, which checks their code; on CUDA they measure.
`pytest tests/gpu -m gpu -rP` shows the figures.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

Figure = Callable[[str, float, str], None]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kind(request: pytest.FixtureRequest) -> str:
    """A kind of device; the test is skipped if the machine has none of it."""
    if request.param == "cuda":
        need_cuda(1)
    return request.param


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Figure:
    """Report a measured figure: its name, value and unit."""

    def report(name: str, value: float, unit: str) -> None:
        record_property(f"{name} [{unit}]", value)
        print(f"figure: {name} = {value:.6g} {unit}")

    return report


def need_cuda(devices: int) -> None:
    """Skip, with the reason, if the machine has fewer CUDA devices."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < devices:
        pytest.skip(f"needs {devices} CUDA device(s); torch {torch.__version__} sees {found} here")
