"""How this process holds memory."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt`` (``malloc.h``)."""

KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory (up to 1 GiB) instead of giving it back to the kernel at once.

    PyTorch frees and takes maps of many megabytes in every layer; by default each is a fresh
    mapping whose pages the kernel must zero, a quarter of a small student's training time on a
    CPU. False where there is no glibc to ask.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


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
