"""Progress: a bar on a terminal, and in a log a line now and then."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from data_specs.io.output import unfiltered

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


class _Calm(tqdm):  # type: ignore[type-arg]
    """What is said behind a bar waits for its next line."""

    def set_postfix(self, ordered_dict: Any = None, refresh: Any = None, **said: Any) -> None:
        super().set_postfix(ordered_dict, False, **said)

    def set_postfix_str(self, s: str = "", refresh: bool = False) -> None:
        super().set_postfix_str(s, refresh=False)


def progress_bar(rows: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A ``tqdm`` on stderr with its own options, or lines where that is no terminal."""
    if sys.stderr.isatty():
        return tqdm(rows, **{"file": unfiltered(sys.stderr), **options})
    options |= {"file": _Lines(sys.stderr), "ascii": True, "delay": BRIEF_S}
    return _Calm(rows, **options, mininterval=LINE_S, maxinterval=LINE_S)
