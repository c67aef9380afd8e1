"""The members of an uncompressed tar, read in place and not trusted: no header makes this read, or
take into memory, more than it says, and none says more than the file holds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from data_specs.io.errors import UserError

BLOCK = 512

PLAIN = (b"0", b"\0")
"""Type flags of plain files; a sparse one, a link or a device is none."""

MOST_PAX_BYTES = 1 << 16

CHANGES_MEANING = re.compile(rb"(?:^|\n)\d+ (?:path|size|linkpath|GNU\.sparse[^=]*)=")
"""Keywords of a PAX header that would make its member another than the plain header says.
webdataset's writer has such headers before every member, for the time in fractions of a second."""


class Member(NamedTuple):
    """A tar's header: ``kind`` is its type flag, the content is ``size`` bytes from ``start``."""

    name: str
    kind: bytes
    start: int
    size: int


def members(file: int, where: str) -> Iterator[Member]:
    """Every member of an open file but PAX headers. ``UserError`` where it is damaged.

    Python's ``tarfile`` reads whole PAX headers into memory, and believes a sparse member's size.
    """
    place, end = 0, os.fstat(file).st_size
    while place < end:
        block = os.pread(file, BLOCK, place)
        if not any(block):  # the mark of the end
            return
        member = _header(block, place, where)
        if member.start + member.size > end:
            raise UserError(
                f"{where}: member {member.name!r}: {member.size} bytes go past the end of the tar: "
                "truncated or damaged; delete it and its record, make it again"
            )
        if member.kind in (b"x", b"g"):
            _require_harmless(file, member, where)
        else:
            yield member
        place = member.start + -(-member.size // BLOCK) * BLOCK


def _header(block: bytes, place: int, where: str) -> Member:
    checksum, size = (_octal(block[field]) for field in (slice(148, 156), slice(124, 136)))
    actual = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if len(block) != BLOCK or size is None or checksum != actual:
        raise UserError(
            f"{where}: damaged: no tar header at byte {place}; delete it and its record, make it "
            "again"
        )
    prefix = block[345:500] if block[257:263] == b"ustar\0" else b""
    parts = [part.partition(b"\0")[0] for part in (prefix, block[:100])]
    name = b"/".join(part for part in parts if part).decode("utf-8", "backslashreplace")
    return Member(name, block[156:157], place + BLOCK, size)


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(b"[0-7]+", digits) else None


def _require_harmless(file: int, member: Member, where: str) -> None:
    if member.size > MOST_PAX_BYTES:
        raise UserError(f"{where}: PAX header {member.name!r}: {member.size} bytes are too many")
    found = CHANGES_MEANING.search(os.pread(file, member.size, member.start))
    if found:
        keyword = found[0].strip().partition(b" ")[2].decode("utf-8", "backslashreplace")
        raise UserError(f"{where}: PAX header {member.name!r} sets {keyword}: not read")


def content(file: int, start: int, size: int, where: str) -> bytes:
    """Bytes of a member; ``UserError`` naming ``where`` if they are not all there."""
    data = os.pread(file, size, start)
    if len(data) != size:
        raise UserError(f"{where}: truncated ({len(data)} of {size} bytes)")
    return data
