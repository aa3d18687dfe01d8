"""The memory that a process holds now: resident, and of accelerators where it uses torch."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STATM = Path("/proc/self/statm")

PROCESS, RESIDENT, DEVICE = "process", "resident_bytes", "device_bytes"
THIS = float(secrets.randbits(52))  # names this process among those of all machines


def memory_here() -> dict[str, float]:
    """PROCESS, RESIDENT and DEVICE of this process; bytes of the latter are those that torch's allocator has taken."""
    return {PROCESS: THIS, RESIDENT: resident_bytes(), DEVICE: _device_bytes()}


def total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The memory of all processes that answered, each counted once; PROCESS is that of this one."""
    known = {THIS: memory_here()} | {part[PROCESS]: part for part in parts if PROCESS in part}
    return {PROCESS: THIS} | {name: sum(part[name] for part in known.values()) for name in (RESIDENT, DEVICE)}


def resident_bytes() -> float:
    """0 where the system does not tell."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATM.exists() else 0.0


def _device_bytes() -> float:
    torch: Any = sys.modules.get("torch")  # not imported for this
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    return float(sum(torch.cuda.memory_reserved(device) for device in range(torch.cuda.device_count())))


def by_service(answers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics "memory.<service>_resident_bytes" and, where there is any, "memory.<service>_device_bytes".

    `answers`: what each service's `total` was. The controller's own stands there too; it includes the services that
    share its process.
    """
    parts = {"controller": memory_here()} | {s: part for s, part in answers.items() if part.get(PROCESS) != THIS}
    return {
        f"memory.{service}_{name}": part[name]
        for service, part in parts.items()
        for name in (RESIDENT, DEVICE)
        if part.get(name)
    }
