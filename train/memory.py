"""How much memory a process may take, and has taken."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Limit and use of a container: control groups version 2, and 1."""


def free_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that this process may still take: the machine's, or its container's if less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit_file, use_file in LIMITS:
        try:
            limit, use = ((cgroup / name).read_text() for name in (limit_file, use_file))
            free = min(free, max(int(limit) - int(use), 0))
        except (OSError, ValueError):  # no such version, or "max": no limit
            continue
    return free


def peak_reset() -> int:
    """Forget the peak so far (Linux); returns the memory that the process holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The most memory that the process held since ``peak_reset``, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM: not Linux")
