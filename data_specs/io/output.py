"""What a command prints: names from elsewhere move no cursor, turn no line and end no command."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from data_specs.io.addresses import has_secret, redacted_in
from data_specs.io.names import UNSEEN, visible


class Visible:
    """A text stream that spells out what ``names.visible`` does, but ends of lines and tabs, and
    what its encoding does not have; and shows no login and no signature of an address.

    ``unfiltered`` is for what draws on purpose.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unfiltered = stream

    def write(self, text: str) -> int:
        seen = UNSEEN.sub(_spelled, redacted_in(text) if has_secret(text) else text)
        if encoding := getattr(self.unfiltered, "encoding", None):
            seen = seen.encode(encoding, "backslashreplace").decode(encoding)
        self.unfiltered.write(seen)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


def _spelled(found: re.Match[str]) -> str:
    return found[0] if found[0] in "\n\t" else visible(found[0])


def unfiltered(stream: TextIO) -> TextIO:
    """The stream itself, for a bar that draws over its own line."""
    return getattr(stream, "unfiltered", stream)


@contextmanager
def visible_output() -> Iterator[None]:
    """Filter standard output and errors for as long as a command runs."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Visible(unfiltered(stream)) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
