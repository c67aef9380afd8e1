"""What made a score, besides weights and audio: the code around the weights, and what runs it."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from train.files import version

ROOT = Path(__file__).resolve().parents[2]

SOURCES = (
    *("train/scoring", "train/models", "train/audio.py"),
    *("train/evaluation/external_scorers.py", "data_specs"),
)
"""Files and folders whose code decides what score a clip gets."""


@cache
def code_sha256() -> str:
    """Hash of the source files that make a score: names and contents."""
    found = hashlib.sha256()
    for source in SOURCES:
        for file in sorted((ROOT / source).rglob("*.py")) or [ROOT / source]:
            data = file.read_bytes()
            found.update(f"{file.relative_to(ROOT).as_posix()} {len(data)}\n".encode() + data)
    return found.hexdigest()


def made_with(runtime: str) -> str:
    """Package version, code and runtime in words: stored scores of another one are not reused."""
    return f"{version()} code {code_sha256()[:12]} {runtime}"
