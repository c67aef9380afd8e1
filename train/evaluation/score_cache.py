"""Scores that were made before, so that another run scores only what is new.

``cache.jsonl`` in the results' folder has a line a clip, written as soon as it is scored: whose
weights, by what code, packages, precision and device (``version``), how short clips were padded,
the hash of the clip's bytes, and the scores. A path is no part of it, so moved clips count as
known. A line that a crash cut is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

Key = tuple[str, str, str, str]
"""SHA-256 of the weights, the scorer's version, padding, SHA-256 of the clip."""

FIELDS = ("weights", "version", "padding", "clip")


class ScoreCache:
    """Known scores by key; in a ``with`` block new ones are written to ``path`` at once."""

    def __init__(self, path: Path | None = None, fresh: bool = False) -> None:
        text = ""
        if path and path.is_file() and not fresh:
            text = path.read_text("utf-8", errors="replace")
        self.path, self._mode = path, "w" if fresh else "a"
        self._known = dict(entry for line in text.splitlines() if (entry := _entry(line)))
        # What a crash cut has no end of line.
        self._mend = "\n" if text and not text.endswith("\n") else ""
        self._file: IO[str] | None = None

    def __enter__(self) -> ScoreCache:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open(self._mode, encoding="utf-8")
            self._file.write(self._mend)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def get(self, key: Key, names: tuple[str, ...]) -> dict[str, float] | None:
        """The scores of a clip if all of these are known."""
        found = self._known.get(key, {})
        return {name: found[name] for name in names} if set(names) <= found.keys() else None

    def put(self, key: Key, scores: dict[str, float]) -> None:
        """Keep a clip's scores."""
        self._known[key] = scores
        if self._file:
            line = dict(zip(FIELDS, key, strict=True)) | {"scores": scores}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def _entry(line: str) -> tuple[Key, dict[str, float]] | None:
    """A line's key and scores; None for a line that a crash cut."""
    try:
        content: dict[str, Any] = json.loads(line)
        weights, version, padding, clip = (str(content[name]) for name in FIELDS)
        scores = {str(name): float(value) for name, value in content["scores"].items()}
        return (weights, version, padding, clip), scores
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
