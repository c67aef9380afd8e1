"""Progress: a bar on a terminal, and in a log a line now and then."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

LINE_S = 30.0
"""How often a log without a terminal gets a line."""

BRIEF_S = 5.0
"""What takes less is not worth a line."""


class _Lines(io.TextIOBase):
    """What a bar draws over itself, each time as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if line := text.strip():
            self.stream.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(rows: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A ``tqdm`` on stderr with its own options, or lines where that is no terminal."""
    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "ascii": True, "delay": BRIEF_S}
        options |= {"mininterval": LINE_S, "maxinterval": LINE_S}
    return tqdm(rows, **options)
