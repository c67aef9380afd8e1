"""What made a score, besides weights and audio: the code around the weights, and what runs it."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from train.files import version

ROOT = Path(__file__).resolve().parents[2]

SOURCES = (
    *("train/scoring", "train/models", "train/audio.py", "train/scoring/onnx_scorer.py"),
    *("train/evaluation/external_scorers.py", "data_specs"),
)
"""Files and folders whose code decides what score a clip gets."""


@cache
def code_sha256() -> str:
    """Hash of the source files that make a score: names and contents."""
    found = hashlib.sha256()
    places = [ROOT / name for name in SOURCES]
    files = [file for place in places for file in ([place] if place.is_file() else _in(place))]
    for file in files:
        data = file.read_bytes()
        found.update(f"{file.relative_to(ROOT).as_posix()} {len(data)}\n".encode() + data)
    return found.hexdigest()


def _in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def made_with(runtime: str) -> str:
    """Package version, code and runtime in words: stored scores of another one are not reused."""
    return f"{version()} code {code_sha256()[:12]} {runtime}"
