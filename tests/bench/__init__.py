"""Benchmarks and drills; not in the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from data_specs.io.errors import UserError

Roots = Mapping[str, Sequence[Path | str]]
"""Folders of each corpus."""


def run_parts(names: Sequence[str], parts: Mapping[str, Callable[[], None]]) -> int:
    """Run the named parts of a bench; returns the exit code."""
    for name in names:
        if name not in parts:
            raise UserError(f"unknown bench {name!r}: known are {', '.join(parts)}")
        parts[name]()
    return 0


def device_name(device: str | torch.device) -> str:
    """What the device is called, for a report."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def wait(device: str | torch.device) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: str | torch.device, repeat: int) -> float:
    """The quickest of some runs, after one that warms up."""
    found = []
    for _ in range(repeat + 1):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])


def matrix_rate(device: str | torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second of a product of square matrices, multiply and add counted as two."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, device, 5)


def command(*words: object, roots: Roots | None = None) -> list[str]:
    """``python -m WORDS``, with the options that name corpora."""
    named = (f"--corpus={name}={f}" for name, folders in (roots or {}).items() for f in folders)
    return [sys.executable, "-m", *map(str, words), *named]


def said_by(words: Sequence[str], **environment: str) -> str:
    """What a command prints; ``RuntimeError`` with its last words where it fails."""
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return done.stdout
