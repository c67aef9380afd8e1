"""How a process holds memory, while it trains and while it runs networks on a CPU."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt`` (``malloc.h``)."""

KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory (up to 1 GiB) instead of giving it back to the kernel at once.

    PyTorch frees and takes maps of many megabytes in every layer; by default each is a fresh
    mapping whose pages the kernel must zero: a quarter of a small student's training time on a
    CPU, a third of four clips' in Demucs. False where there is no glibc to ask.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
