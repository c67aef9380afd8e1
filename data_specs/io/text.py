"""Text files: users' lists and tables, with any line ending and byte order mark, and our tables."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_specs.io.errors import UserError
from data_specs.io.names import cell, plain

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

LARGEST_TEXT = 1 << 30
"""Bytes of a list or a table; a larger one is none."""

LINE_END = re.compile("\r\n|\r|\n")


def text_of(data: bytes, where: str, errors: str = "strict") -> str:
    """UTF-8, or UTF-16 by its mark. ``UserError`` naming where it is, and the line, if it is not.

    ``errors`` is "surrogateescape" for lists of names, which may be in no encoding.
    """
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding, "strict" if encoding == "utf-16" else errors)
    except UnicodeDecodeError as error:
        line = len(LINE_END.findall(data[: error.start].decode("latin-1"))) + 1
        raise UserError(f"{where}: line {line}: not text in UTF-8: save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{where}: not a text file: it holds zero bytes")
    return text


def read_text(path: Path | str, errors: str = "strict") -> str:
    """A text file. ``UserError`` naming the file that cannot be read as text."""
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        if path.stat().st_size > LARGEST_TEXT:
            raise UserError(f"{path}: larger than {LARGEST_TEXT >> 30} GiB: not a list or a table")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return text_of(data, str(path), errors)


def printable(text: str) -> str:
    """Text without what is no Unicode (bytes of a name) and without control characters."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def names_in(text: str, base: Path | None = None) -> list[Path]:
    """The paths of a list, one a line, those that are relative below ``base``.

    Blanks around a name are no part of it, unless a file is called so.
    """
    base = base or Path()
    names = [(line, line.strip()) for line in LINE_END.split(text)]
    return [
        base / (line if line != name and os.path.lexists(base / line) else name)
        for line, name in names
        if name
    ]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as CSV; None is empty. ``csv_rows`` reads them back."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def csv_rows(path: Path) -> list[dict[str, str]]:
    """What ``csv_text`` was given, as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: plain(value or "") for name, value in row.items() if name is not None}
            for row in csv.DictReader(file)
        ]
