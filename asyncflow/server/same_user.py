"""Whether a connection over loopback comes from this user: what stands for a token where a server has none."""

from __future__ import annotations

import os
import socket
from pathlib import Path

TABLES = {socket.AF_INET: Path("/proc/net/tcp"), socket.AF_INET6: Path("/proc/net/tcp6")}
ESTABLISHED = "01"


def is_known() -> bool:
    """Whether this system tells who owns a connection."""
    return TABLES[socket.AF_INET].exists()


def is_same_user(peer: tuple[str, int], own: tuple[str, int]) -> bool:
    """Whether the other end of a connection on this machine belongs to a process of this user, or of root."""
    for family in (socket.AF_INET6,) if ":" in peer[0] else (socket.AF_INET, socket.AF_INET6):
        wanted = (_as_listed(peer, family), _as_listed(own, family))
        try:
            lines = TABLES[family].read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            # One that its process has closed is listed as root's, without an inode.
            if (fields[1], fields[2]) == wanted and fields[3] == ESTABLISHED and fields[9] != "0":
                return int(fields[7]) in (os.getuid(), 0)
    return False


def _as_listed(address: tuple[str, int], family: int) -> str:
    """An address as the kernel lists it: words of 32 bits, each in the machine's order."""
    host = f"::ffff:{address[0]}" if family == socket.AF_INET6 and ":" not in address[0] else address[0]
    packed = socket.inet_pton(family, host)
    words = (int.from_bytes(packed[i : i + 4], "little") for i in range(0, len(packed), 4))
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"
