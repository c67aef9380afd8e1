"""Cores and memory that this process may use (the machine's, or its container's), and how it keeps
memory."""

from __future__ import annotations

import ctypes
import math
import os
from contextlib import suppress
from pathlib import Path

from data_specs.io.errors import UserError

CGROUP = Path("/sys/fs/cgroup")
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, use and the name of what the kernel can give back, in control groups version 2 and 1."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt`` (``malloc.h``)."""

KEPT_BYTES = 1 << 30


def cpus(cgroup: Path = CGROUP) -> int:
    """Cores of this process: by affinity, and by the container's quota rounded up. At least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    return max(1, min(cores, math.ceil(_cpu_quota(cgroup) or cores)))


def _cpu_quota(cgroup: Path) -> float | None:
    """Cores that a container may use (control groups version 2, then 1); None without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # no such version, or "max"
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            if int(quota) > 0:
                return int(quota) / int(period)
    return None


def available_memory(cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that this process may still take. Pages of files that can be dropped count as free."""
    rows = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = 1024 * int(rows["MemAvailable"].removesuffix("kB"))
    for limit_file, use_file, inactive in MEMORY_FILES:
        try:
            limit, use = (int((cgroup / name).read_text()) for name in (limit_file, use_file))
            statistics = (cgroup / use_file).with_name("memory.stat").read_text()
        except (OSError, ValueError):  # no such version, or "max": no limit
            continue
        given_back = dict(line.split() for line in statistics.splitlines()).get(inactive, 0)
        available = min(available, max(limit - use + int(given_back), 0))
    return available


def use_threads(threads: int | None) -> None:
    """Let torch compute on so many cores; without a number on all that it takes within ``cpus``,
    which it does not ask a container for. ``UserError`` for a number below 1."""
    import torch

    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: must be at least 1")
    torch.set_num_threads(threads or min(torch.get_num_threads(), cpus()))


def require_device(device: str, option: str = "--device") -> None:
    """Raise ``UserError`` where torch cannot compute on a device of this machine."""
    if device in ("", "cpu"):
        return
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"{option} {device}: no such device: write cpu, cuda or cuda:N") from None
    if found.type != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (found.index or 0) >= count:
        there = f"{count} GPUs" if count else "no GPU"
        raise UserError(
            f"{option} {device}: torch finds {there} here: give {option} cpu, or mend "
            "the driver (nvidia-smi shows what there is)"
        )


def keep_freed_memory() -> None:
    """Let glibc keep freed memory (up to 1 GiB) instead of giving it back to the kernel at once.

    PyTorch frees and takes maps of many megabytes in every layer; by default each is a fresh
    mapping whose pages the kernel must zero: a quarter of a small student's training time on a
    CPU, a third of four clips' in Demucs.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # musl has none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
