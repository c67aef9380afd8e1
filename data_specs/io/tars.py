"""The samples of a shard's tar, read in place and not trusted.

A shard holds one plain ``KEY.flac`` and one plain ``KEY.json`` a sample, each up to a size; nothing
is unpacked, and no header makes this read, or take into memory, more than the file holds. Headers
are parsed by Python's ``tarfile``. Its reader and webdataset's are not used: they read whole PAX
headers into memory, and believe a sparse member's size.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from data_specs.io.errors import UserError
from data_specs.sample import MOST_AUDIO_BYTES, MOST_RECORD_BYTES

BLOCK = tarfile.BLOCKSIZE

MEMBER = re.compile(r"([A-Za-z0-9_-]+)\.(flac|json)")

MOST_BYTES = {"flac": MOST_AUDIO_BYTES, "json": MOST_RECORD_BYTES}

MOST_PAX_BYTES = 1 << 16

CHANGES_MEANING = re.compile(rb"(?:^|\n)\d+ (?:path|size|linkpath|GNU\.sparse[^=]*)=")
"""Keywords of a PAX header that would make its member another than the plain header says.
webdataset's writer has such headers before every member, for the time in fractions of a second."""

OCTAL = re.compile(rb" *[0-7]+[ \0]*")
"""A size, without the signs, underscores and base 256 that ``tarfile`` takes too."""


class Span(NamedTuple):
    """Where one sample's members lie in its tar, in bytes."""

    key: str
    audio_start: int
    audio_bytes: int
    record_start: int
    record_bytes: int


def index_of(file: int, where: str) -> list[Span]:
    """Find every sample of an open tar, in file order; reads the headers only.

    Raises ``UserError`` naming the tar (``where``) and the member: damaged, or anything but one
    plain ``KEY.flac`` and one plain ``KEY.json`` a sample, in any order.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}  # (start, bytes) of each member
    for info in _headers(file, where):
        found = MEMBER.fullmatch(info.name)
        if found is None or info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise UserError(
                f"{where}: unexpected member {info.name!r} of type {info.type!r}: a shard "
                "holds plain files KEY.flac and KEY.json"
            )
        key, ending = found.groups()
        if ending in samples.setdefault(key, {}):
            raise UserError(f"{where}: member {info.name} is there twice")
        if info.size > MOST_BYTES[ending]:
            raise UserError(f"{where}: member {info.name}: {info.size} bytes are too many")
        samples[key][ending] = (info.offset_data, info.size)
    return [_span(where, key, found) for key, found in samples.items()]


def _span(where: str, key: str, found: dict[str, tuple[int, int]]) -> Span:
    for ending, what in (("flac", "audio"), ("json", "label")):
        if ending not in found:
            raise UserError(
                f"{where}: sample {key} has no {what}: member {key}.{ending} is missing"
            )
    return Span(key, *found["flac"], *found["json"])


def _headers(file: int, where: str) -> Iterator[tarfile.TarInfo]:
    """Read every header but those of PAX, which must be harmless."""
    place, end = 0, os.fstat(file).st_size
    while place < end and any(block := os.pread(file, BLOCK, place)):  # zeros mark the end
        info = _header(block, place, where)
        if info.offset_data + info.size > end:
            raise UserError(
                f"{where}: member {info.name!r}: {info.size} bytes go past the end of the tar: "
                "truncated or damaged; delete it and its record, make it again"
            )
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            _require_harmless(file, info, where)
        else:
            yield info
        place = info.offset_data + -(-info.size // BLOCK) * BLOCK


def _header(block: bytes, place: int, where: str) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        info = None
    if info is None or not OCTAL.fullmatch(block[124:136]):
        raise UserError(
            f"{where}: damaged: no tar header at byte {place}; delete it and its record, make it "
            "again"
        )
    info.offset_data = place + BLOCK
    return info


def _require_harmless(file: int, info: tarfile.TarInfo, where: str) -> None:
    if info.size > MOST_PAX_BYTES:
        raise UserError(f"{where}: PAX header {info.name!r}: {info.size} bytes are too many")
    found = CHANGES_MEANING.search(os.pread(file, info.size, info.offset_data))
    if found:
        keyword = found[0].strip().partition(b" ")[2].decode("utf-8", "backslashreplace")
        raise UserError(f"{where}: PAX header {info.name!r} sets {keyword}: not read")


def audio_of(file: int, where: str, span: Span) -> bytes:
    """Read a sample's FLAC as it is stored. Raises ``UserError`` where it is cut."""
    return _content(file, span.audio_start, span.audio_bytes, f"{where}: {span.key}.flac")


def record_of(file: int, where: str, span: Span) -> bytes:
    """Read a sample's JSON as it is stored. Raises ``UserError`` where it is cut."""
    return _content(file, span.record_start, span.record_bytes, f"{where}: {span.key}.json")


def _content(file: int, start: int, size: int, where: str) -> bytes:
    data = os.pread(file, size, start)
    if len(data) != size:
        raise UserError(f"{where}: truncated ({len(data)} of {size} bytes)")
    return data
