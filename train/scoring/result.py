"""What scoring answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Window(NamedTuple):
    """The score of one window of a clip; seconds from the clip's start."""

    start_seconds: float
    end_seconds: float
    mos: float


@dataclass(frozen=True)
class Score:
    """The score of one channel of a clip, or why there is none, and what made it.

    ``path`` is None for a wave in memory; ``channel`` counts from 0. ``windows`` are what the
    score is the mean of.
    """

    path: Path | None
    mos: float | None
    seconds: float | None
    error: str | None = None
    model: str = ""
    weights_sha256: str = ""
    version: str = ""
    channel: int = 0
    windows: tuple[Window, ...] = ()
