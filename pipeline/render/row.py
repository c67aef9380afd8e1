"""What rendering and labelling give to a shard."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One sample on its way into a shard: audio and record, or the reason why it was dropped."""

    key: str
    flac: bytes | None
    record: bytes | None
    reason: str = ""
    detail: str = ""
