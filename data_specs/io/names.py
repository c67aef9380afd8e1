"""Names and texts from elsewhere: as paths that stay below a folder, as output that shows what it
holds, and as cells and Markdown in which nothing runs.

Listings of stores, index pages, archives, records, manifests and tables come from strangers. Every
such name passes ``inside`` or ``below`` before it becomes part of a path or of an address.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from data_specs.io.errors import UserError

MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 1024
"""Of one part of a path (what file systems hold), and of all of it (what S3 takes as a key)."""

ENCODED = re.compile(r"%(25)*(2f|5c|2e|00)", re.IGNORECASE)
"""A slash, backslash, dot or NUL that some reader would decode, however often it was encoded."""

UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
"""What moves a terminal's cursor, turns the writing's direction or is not seen, and bytes of a file
name that are no UTF-8."""

RUNS = re.compile("'*[=+@\t\r\n\uff0b\uff0d\uff1d\uff20-]")
"""How a cell begins that a spreadsheet takes for a formula, with or without our mark before it."""


def inside(name: str) -> str:
    """A relative path in its plain form. ``UserError`` for any that could lead out of a folder."""
    if wrong := _objection(name):
        raise UserError(f"{visible(name[:200])!r} is not a path inside its folder: {wrong}")
    return name


def _objection(name: str) -> str:
    parts = name.split("/")
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "it is absolute"
    if ".." in parts or not name:
        return "it has a .. or nothing"
    if {"", "."} & set(parts):
        return f"it is written {PurePosixPath(name).as_posix()!r}"
    if "\0" in name or "\\" in name or ENCODED.search(name):
        return "it has a NUL, a backslash, or an encoded slash or dot"
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in parts]
    if max(sizes) > MOST_NAME_BYTES or sum(sizes) + len(sizes) > MOST_PATH_BYTES:
        return "it is too long"
    return ""


def below(folder: Path, name: str) -> Path:
    """Where a name from elsewhere lies below a folder.

    ``UserError`` where it would lead out of it, by its spelling or by a link that is there.
    """
    path = folder / inside(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{visible(path)}: a link leads out of {visible(folder)}")
    return path


def visible(text: object) -> str:
    """A text with every control character, mark of direction and odd byte spelled out."""
    return UNSEEN.sub(_spelled, str(text))


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


# --- cells ----------------------------------------------------------------------------------------


def cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would run gets ``'`` before it.

    Numbers stay numbers; ``plain`` takes the mark away again.
    """
    if not isinstance(value, str) or not RUNS.match(value) or _is_number(value):
        return value
    return f"'{value}"


def plain(text: str) -> str:
    """What ``cell`` was given."""
    return text[1:] if text.startswith("'") and RUNS.match(text) else text


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-](inf|nan)", text) is not None


# --- Markdown -------------------------------------------------------------------------------------


def markdown(text: object) -> str:
    """A text inside a line or a table of Markdown: it is read as text, whatever it holds."""
    line = visible(re.sub(r"\s+", " ", str(text)).strip())
    escaped = re.sub(r"([\\`*\[\]|$]|(?<!\w)_|_(?!\w)|~(?=~))", r"\\\1", line)
    escaped = re.sub(r"^([#+=-]|\d+(?=[.)]))", r"\\\1", escaped)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """A plain word as code inside a line of Markdown; what is none as ``markdown`` has it."""
    return f"`{text}`" if re.fullmatch(r"[\w.:+/@-]+", str(text)) else markdown(text)
